"""From training to the shipped student, through the tools."""

import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmdistill_ext.distillers.build import build_model
from tests import tiny_seg
from tests.runs import logged, metrics_of_test
from tests.tiny_seg import tool


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two iterations with a teacher that is gone afterwards."""
    root = tmp_path_factory.mktemp('run')
    for split in ('train', 'val'):
        tiny_seg.write_data(root / 'data', split)
    teacher = tiny_seg.save_weights(root / 'teacher.pth', tiny_seg.model(16), seed=1)
    tiny_seg.distil(tiny_seg.config(root / 'data', None), teacher).dump(root / 'run.py')
    tool('train')(root / 'run.py', '--work-dir', root / 'work')
    (root / 'teacher.pth').rename(root / 'kept.pth')
    return root


def metrics(work_dir: Path) -> dict:
    """What the latest test in a folder found, but for times."""
    return {key: value for key, value in metrics_of_test(work_dir).items() if 'time' not in key}


def test_training_logs_every_term_and_saves_the_plain_student(run: Path):
    first = logged(run / 'work')[0]
    assert {'loss', 'decode.loss_ce', 'decode.loss_sel', 'lr', 'time'} <= set(first)
    assert first['loss'] == pytest.approx(first['decode.loss_ce'] + first['decode.loss_sel'])
    state = torch.load(run / 'work/iter_2.pth', weights_only=False)['state_dict']
    plain = build_model({'_scope_': 'mmseg', **tiny_seg.model(8)})
    assert list(state) == list(plain.state_dict())


def test_resume_goes_on(run: Path, tmp_path: Path):
    options = ['--cfg-options', f'model.teacher.checkpoint={run / "kept.pth"}']
    longer = ['train_cfg.max_iters=3', 'train_cfg.val_interval=3']
    (tmp_path / 'last_checkpoint').write_text(str(run / 'work/iter_2.pth'))
    tool('train')(run / 'run.py', '--work-dir', tmp_path, '--resume', *options, *longer)
    assert [row['step'] for row in logged(tmp_path) if 'loss' in row] == [3]


def test_nothing_to_resume_starts_anew_from_load_from(run: Path, tmp_path: Path):
    use_resume = runpy.run_path(str(tiny_seg.ROOT / 'tools/train.py'))['use_resume']
    cfg = Config(dict(work_dir=str(tmp_path), load_from='a.pth', resume=False))
    use_resume(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == ('a.pth', False)
    use_resume(cfg, 'b.pth')
    assert (cfg.load_from, cfg.resume) == ('b.pth', True)


@pytest.mark.parametrize(
    ('options', 'key'),
    [
        (['--resume', 'kept.pth', '--cfg-options'], 'resume'),
        (['--cfg-options', 'load_from=kept.pth'], 'load_from'),
    ],
)
def test_training_refuses_the_checkpoint_of_another_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], key: str
):
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match=f'`{key}` .*kept.pth.* of another model'):
        tool('train')(
            'run.py', '--work-dir', tmp_path, *options, 'model.teacher.checkpoint=kept.pth'
        )


def test_amp_and_auto_scale_lr_change_the_config():
    train = runpy.run_path(str(tiny_seg.ROOT / 'tools/train.py'))
    cfg = Config(
        dict(optim_wrapper=dict(type='OptimWrapper'), auto_scale_lr=dict(base_batch_size=8))
    )
    train['use_amp'](cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    train['use_auto_scale_lr'](cfg)
    assert cfg.auto_scale_lr.enable is True
    with pytest.raises(ValueError, match=r"`--amp` needs .* Found 'Other'"):
        train['use_amp'](Config(dict(optim_wrapper=dict(type='Other'))))
    with pytest.raises(ValueError, match='`--auto-scale-lr` needs'):
        train['use_auto_scale_lr'](Config({}))


def test_test_evaluates_the_student_without_the_teacher(run: Path, tmp_path: Path):
    checkpoint = run / 'work/iter_2.pth'
    folders = ['--out', tmp_path / 'out', '--show-dir', tmp_path / 'shown']
    tool('test')(run / 'run.py', checkpoint, '--work-dir', tmp_path / 'work', *folders)
    validated = logged(run / 'work')[-1]
    assert metrics(tmp_path / 'work') == {key: validated[key] for key in ('aAcc', 'mIoU', 'mAcc')}
    predicted = cv2.imread(str(tmp_path / 'out/2.png'), cv2.IMREAD_UNCHANGED)
    assert predicted.shape == tiny_seg.SIZES[2]
    assert predicted.max() < 3
    assert len(list((tmp_path / 'shown').rglob('test_*.png'))) == len(tiny_seg.SIZES)


def test_mmseg_tests_the_exported_student_alike(run: Path, tmp_path: Path):
    checkpoint = run / 'work/iter_2.pth'
    tool('test')(run / 'run.py', checkpoint, '--work-dir', tmp_path / 'ours')
    tool('export_student')(run / 'run.py', checkpoint, tmp_path)
    script = Path(mmseg.__file__).parent / '.mim/tools/test.py'
    work_dir = ['--work-dir', str(tmp_path / 'theirs')]
    (tmp_path / 'mmdistill_ext.py').write_text('raise ImportError("not to be imported")')
    subprocess.run(
        [sys.executable, str(script), 'student.py', 'student.pth', *work_dir],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
        check=True,
        capture_output=True,
    )
    assert metrics(tmp_path / 'theirs') == metrics(tmp_path / 'ours')


@pytest.mark.parametrize(
    ('checkpoint', 'error', 'message'),
    [
        ('kept.pth', ValueError, '`checkpoint` .*kept.pth.* of another model'),
        ('none.pth', FileNotFoundError, '`checkpoint` .*none.pth'),
    ],
)
def test_test_refuses_other_checkpoints(run: Path, tmp_path: Path, checkpoint, error, message):
    with pytest.raises(error, match=message):
        tool('test')(run / 'run.py', run / checkpoint, '--work-dir', tmp_path)


def test_tta_changes_model_and_pipeline(run: Path):
    use_tta = runpy.run_path(str(tiny_seg.ROOT / 'tools/test.py'))['use_tta']
    cfg = tiny_seg.config(run / 'data', run)
    with pytest.raises(ValueError, match='`--tta` needs `tta_model`'):
        use_tta(cfg)
    student, cfg.tta_model, cfg.tta_pipeline = cfg.model, dict(type='SegTTAModel'), [dict(type='A')]
    use_tta(cfg)
    assert cfg.model == dict(type='SegTTAModel', module=student)
    assert cfg.test_dataloader.dataset.pipeline == [dict(type='A')]


def test_detection_options_follow_mmdet():
    test = runpy.run_path(str(tiny_seg.ROOT / 'tools/test.py'))
    pipeline = [dict(type='Load'), dict(type='PackDetInputs', meta_keys=('img_id',))]
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=dict(type='RetinaNet'),
            default_hooks=dict(visualization=dict(type='DetVisualizationHook')),
            test_evaluator=dict(type='CocoMetric'),
            test_dataloader=dict(dataset=dict(type='CocoDataset', pipeline=pipeline)),
        )
    )
    test['use_visualization'](cfg, Namespace(show=True, show_dir='shown', wait_time=1.0))
    hook = cfg.default_hooks.visualization
    assert hook == dict(
        type='DetVisualizationHook', draw=True, show=True, wait_time=1.0, test_out_dir='shown'
    )
    test['keep_predictions'](cfg, 'out.pkl')
    assert [metric['type'] for metric in cfg.test_evaluator] == ['CocoMetric', 'DumpDetResults']
    test['use_tta'](cfg)
    assert (cfg.model.type, cfg.model.module) == ('DetTTAModel', dict(type='RetinaNet'))
    branches = cfg.test_dataloader.dataset.pipeline[-1]
    assert branches.type == 'TestTimeAug'
    assert branches.transforms[1][0].meta_keys[-2:] == ('flip', 'flip_direction')


def test_print_config_plain(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ['--cfg-options', 'model.student.backbone.depth=34']
    tool('print_config')(
        run / 'run.py', '--plain', '--save-path', tmp_path / 'x/plain.py', *options
    )
    saved = Config.fromfile(tmp_path / 'x/plain.py')
    assert (saved.model.type, saved.model.backbone.depth) == ('EncoderDecoder', 34)
    printed = capsys.readouterr().out
    assert saved.pretty_text in printed
    assert 'mmdistill_ext' not in printed
    with pytest.raises(ValueError, match=r"`--save-path` .* Found 'plain\.txt'"):
        tool('print_config')(run / 'run.py', '--save-path', 'plain.txt')


def test_contrast_masks_of_a_data_set(run: Path, tmp_path: Path):
    teacher = ['--cfg-options', f'model.teacher.checkpoint={run / "kept.pth"}']
    values = ['--values', 'teacher=200', 'student=10', 'void=99']
    checkpoint = run / 'work/iter_2.pth'
    tool('contrast_masks')(
        run / 'run.py', checkpoint, tmp_path, '--overlay', '--split', 'train', *values, *teacher
    )
    summary = json.loads((tmp_path / 'summary.json').read_text())
    masks = [cv2.imread(str(tmp_path / f'masks/{i}.png'), cv2.IMREAD_UNCHANGED) for i in range(4)]
    labels = [cv2.imread(str(run / f'data/ann/train/{i}.png'), 0) for i in range(4)]
    assert [mask.shape for mask in masks] == list(tiny_seg.SIZES)
    assert cv2.imread(str(tmp_path / 'overlays/2.png')).shape[1] == tiny_seg.SIZES[2][1]
    for mask, label in zip(masks, labels, strict=True):
        assert np.array_equal(mask == 99, label == 255)
        assert set(np.unique(mask)) <= {200, 10, 99}
    for index, name in enumerate(tiny_seg.CLASSES):
        of_class = np.concatenate(
            [m[label == index] for m, label in zip(masks, labels, strict=True)]
        )
        row = summary['classes'][name]
        assert row['pixels'] == of_class.size
        assert row['teacher_better'] == pytest.approx((of_class == 200).mean())
    won = sum((mask == 200).sum() for mask in masks)
    assert won > 0
    assert summary['overall']['teacher_better'] * summary['overall']['pixels'] == pytest.approx(won)
