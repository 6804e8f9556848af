"""What a run starts from is checked, whichever runner loads it."""

from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader

from mmdistill_ext import safe_loading
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.first_checkpoint import (
    CheckFirstCheckpoint,
    check_checkpoint,
    check_resumable,
)
from tests import tiny_seg
from tests.evil import Evil
from tests.runs import logged


@pytest.fixture(scope='module')
def student() -> torch.nn.Module:
    return build_model({'_scope_': 'mmseg', **tiny_seg.model(8)})


def saved(path: Path, state: dict) -> str:
    torch.save(dict(state_dict=state), path)
    return str(path)


def check(model: torch.nn.Module, path: str, key: str, partial: bool = False) -> None:
    check_checkpoint(model, CheckpointLoader.load_checkpoint(path), path, key, partial)


def test_checkpoint_that_fits(student: torch.nn.Module, tmp_path: Path):
    state = {
        **student.state_dict(),
        'connectors.w': torch.ones(1),
        'auxiliary_head.w': torch.ones(1),
    }
    check(student, saved(tmp_path / 'a.pth', state), 'checkpoint')


def test_checkpoint_with_a_missing_key(student: torch.nn.Module, tmp_path: Path):
    state = student.state_dict()
    del state['backbone.stem.0.weight']
    path = saved(tmp_path / 'a.pth', state)
    with pytest.raises(ValueError, match=r'`checkpoint` .*a\.pth.*backbone\.stem\.0\.weight'):
        check(student, path, 'checkpoint')
    check(student, path, 'load_from', partial=True)


def test_partial_start_from_a_backbone_or_a_larger_model(student: torch.nn.Module, tmp_path: Path):
    backbone = {k: v for k, v in student.state_dict().items() if k.startswith('backbone.stem')}
    larger = {**student.state_dict(), **{f'teacher.{i}': torch.ones(1) for i in range(500)}}
    for state in (backbone, larger):
        check(student, saved(tmp_path / 'a.pth', state), 'load_from', partial=True)


def test_partial_start_from_another_model(student: torch.nn.Module, tmp_path: Path):
    other = build_model({'_scope_': 'mmseg', **tiny_seg.model(16)}).state_dict()
    path = saved(tmp_path / 'other.pth', other)
    with pytest.raises(ValueError, match=r'`load_from` .*another model: only \d+ of its \d+'):
        check(student, path, 'load_from', partial=True)


def test_weights_alone_cannot_be_resumed():
    whole = dict(meta=dict(epoch=0, iter=2), message_hub={})
    check_resumable(whole, 'a.pth', 'resume')
    for content in ({}, dict(meta=None), dict(whole, meta=dict(epoch=1)), dict(meta=whole['meta'])):
        with pytest.raises(ValueError, match="`resume` .*'a.pth' has no .*`load_from`"):
            check_resumable(content, 'a.pth', 'resume')


RUNNERS = ('Runner', 'FlexibleRunner')
STARTS = ('load_from', 'resume', 'checkpoint')


@pytest.fixture(scope='module', params=RUNNERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.py, distilled for two iterations by either runner."""
    root = tmp_path_factory.mktemp(request.param)
    for split in ('train', 'val'):
        tiny_seg.write_data(root / 'data', split)
    teacher = tiny_seg.save_weights(root / 'teacher.pth', tiny_seg.model(16), seed=1)
    cfg = tiny_seg.distil(tiny_seg.config(root / 'data', None), teacher)
    cfg.default_hooks.pop('visualization')
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))  # FlexibleRunner has no default
    cfg.runner_type = request.param
    cfg.dump(root / 'run.py')
    tiny_seg.tool('train')(root / 'run.py', '--work-dir', root / 'work')
    return root


def start(root: Path, how: str, source: str, work_dir: Path) -> None:
    """Start a run or a test from a checkpoint."""
    options = ['train_cfg.max_iters=3', 'train_cfg.val_interval=9', 'load_from=None']
    if how == 'checkpoint':
        tiny_seg.tool('test')(root / 'run.py', source, '--work-dir', work_dir)
        return
    resume = ['--resume', source] if how == 'resume' else []
    options += [f'load_from={source}'] if how == 'load_from' else []
    tiny_seg.tool('train')(
        root / 'run.py', '--work-dir', work_dir, *resume, '--cfg-options', *options
    )


@pytest.mark.parametrize('how', STARTS)
def test_a_start_reads_its_checkpoint_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
):
    read, unpickle = [], safe_loading._unpickle

    def count(file: object, **options: object) -> object:
        read.append(Path(str(file)).name)
        return unpickle(file, **options)

    monkeypatch.setattr(safe_loading, '_unpickle', count)
    start(trained, how, str(trained / 'work/iter_2.pth'), tmp_path)
    assert read == ['iter_2.pth'] if how == 'checkpoint' else ['teacher.pth', 'iter_2.pth']
    if how != 'checkpoint':
        steps = [row['step'] for row in logged(tmp_path) if 'loss' in row]
        assert steps == ([3] if how == 'resume' else [1, 2, 3])


def broken(root: Path, folder: Path, kind: str) -> str:
    """The run's checkpoint with something wrong; its name is what is wrong."""
    path = folder / f'{kind}.pth'
    content = torch.load(root / 'work/iter_2.pth', weights_only=False)
    name = next(k for k in content['state_dict'] if k.endswith('conv_seg.weight'))
    if kind == 'code':
        content['meta']['extra'] = Evil(folder / 'ran')
    if kind == 'names':
        content['state_dict'][3] = torch.ones(1)
    if kind == 'meta':
        content['meta'] = 7
    if kind == 'nan':
        content['state_dict'][name] *= float('nan')
    if kind == 'model':
        content['state_dict'] = torch.load(root / 'teacher.pth')['state_dict']
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize('how', STARTS)
def test_a_start_refuses_code(trained: Path, tmp_path: Path, how: str):
    source = broken(trained, tmp_path, 'code')
    with pytest.raises(ValueError, match=f'`{how}` .*weights only.*code.pth.*`--trust .*code.pth'):
        start(trained, how, source, tmp_path / 'work')
    assert not (tmp_path / 'ran').exists()


def test_a_start_refuses_what_the_hook_refuses(trained: Path, tmp_path: Path):
    with pytest.raises(ValueError, match='`resume` .*model.pth.* of another model'):
        start(trained, 'resume', broken(trained, tmp_path, 'model'), tmp_path / 'work')
    with pytest.raises(FileNotFoundError, match='`load_from` .*nowhere.pth'):
        start(trained, 'load_from', 'nowhere.pth', tmp_path / 'work')


class FakeRunner:
    """What the hook reads of a runner."""

    def __init__(self, model: torch.nn.Module, resume: bool) -> None:
        self.model, self._resume = model, resume


@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('names', 'name 3, which is no text'),
        ('meta', '`meta` should be a dict'),
        ('nan', "NaN or infinite values in 'decode_head.conv_seg.weight'"),
        ('model', 'of another model'),
    ],
)
def test_the_hook_refuses(
    student: torch.nn.Module, trained: Path, tmp_path: Path, resume: bool, kind: str, message: str
):
    runner = FakeRunner(student, resume)
    content = torch.load(broken(trained, tmp_path, kind), weights_only=False)
    hook = CheckFirstCheckpoint('a.pth', 'resume' if resume else 'load_from', partial=not resume)
    with pytest.raises(ValueError, match=f"`{hook.key}` .*'a.pth'.*{message}"):
        hook.after_load_checkpoint(runner, content)
    hook.after_load_checkpoint(runner, content)  # later loads are not the run's start


def test_trusted_by_option_a_checkpoint_is_unpickled(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(safe_loading, '_TRUSTED', set())
    source = broken(trained, tmp_path, 'code')
    tiny_seg.tool('test')(
        trained / 'run.py', source, '--work-dir', tmp_path / 'work', '--trust', source
    )
    assert (tmp_path / 'ran').exists()


def test_a_missing_teacher_is_refused_at_the_start(trained: Path, tmp_path: Path):
    """By mmengine's runner before data are read; FlexibleRunner builds its model after them."""
    options = ['model.teacher.checkpoint=nowhere.pth']
    if trained.name.startswith('Runner'):
        options.append('train_dataloader.dataset.data_root=nowhere')
    with pytest.raises(FileNotFoundError, match="`teacher.checkpoint` .*'nowhere.pth'"):
        tiny_seg.tool('train')(
            trained / 'run.py', '--work-dir', tmp_path, '--cfg-options', *options
        )
    assert not list(tmp_path.glob('*/vis_data/scalars.json'))
