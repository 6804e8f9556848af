"""What the tools check before they run."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmdistill_ext import cli
from mmdistill_ext.distillers.build import build_model
from tests import tiny_seg


@pytest.fixture(scope='module')
def student() -> torch.nn.Module:
    return build_model({'_scope_': 'mmseg', **tiny_seg.model(8)})


def saved(path: Path, state: dict) -> str:
    torch.save(dict(state_dict=state), path)
    return str(path)


def test_config_is_read_with_options(tmp_path: Path):
    tiny_seg.config(tmp_path, tmp_path).dump(tmp_path / 'run.py')
    options = cli.config_parser('').parse_args(
        [str(tmp_path / 'run.py'), '--cfg-options', 'model.backbone.depth=50', 'train_cfg.a=[1,2]']
    )
    cfg = cli.load_config(options.config, options.cfg_options)
    assert (cfg.model.backbone.depth, cfg.train_cfg.a) == (50, [1, 2])


def test_missing_config_is_named():
    with pytest.raises(FileNotFoundError, match=r"`config`.*Found 'no/run\.py'"):
        cli.load_config('no/run.py')


@pytest.mark.parametrize(
    ('option', 'in_config', 'expected'),
    [('here', 'there', 'here'), (None, 'there', 'there'), (None, None, './work_dirs/run')],
)
def test_work_dir_priority(option, in_config, expected):
    cfg = Config(dict(work_dir=in_config))
    args = Namespace(work_dir=option, config='configs/run.py', launcher='none', local_rank=0)
    cli.set_run_options(cfg, args)
    assert (cfg.work_dir, cfg.launcher) == (expected, 'none')


def test_processes_without_accelerator_use_gloo(monkeypatch: pytest.MonkeyPatch):
    args = Namespace(work_dir='x', config='run.py', launcher='pytorch', local_rank=0)
    cfg = Config(dict(env_cfg=dict(dist_cfg=dict(backend='nccl'))))
    monkeypatch.setattr(cli, 'get_device', lambda: 'cuda')
    cli.set_run_options(cfg, args)
    assert (cfg.env_cfg.dist_cfg.backend, 'model_wrapper_cfg' in cfg) == ('nccl', False)
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')
    cli.set_run_options(cfg, args)
    assert (cfg.env_cfg.dist_cfg.backend, cfg.model_wrapper_cfg.device_ids) == ('gloo', None)


def test_checkpoint_that_fits(student: torch.nn.Module, tmp_path: Path):
    state = {
        **student.state_dict(),
        'connectors.w': torch.ones(1),
        'auxiliary_head.w': torch.ones(1),
    }
    cli.check_checkpoint(student, saved(tmp_path / 'a.pth', state), 'checkpoint')


def test_checkpoint_with_a_missing_key(student: torch.nn.Module, tmp_path: Path):
    state = student.state_dict()
    del state['backbone.stem.0.weight']
    path = saved(tmp_path / 'a.pth', state)
    with pytest.raises(ValueError, match=r'`checkpoint` .*a\.pth.*backbone\.stem\.0\.weight'):
        cli.check_checkpoint(student, path, 'checkpoint')
    cli.check_checkpoint(student, path, 'load_from', partial=True)


def test_partial_start_from_a_backbone_or_a_larger_model(student: torch.nn.Module, tmp_path: Path):
    backbone = {k: v for k, v in student.state_dict().items() if k.startswith('backbone.stem')}
    larger = {**student.state_dict(), **{f'teacher.{i}': torch.ones(1) for i in range(500)}}
    for state in (backbone, larger):
        cli.check_checkpoint(student, saved(tmp_path / 'a.pth', state), 'load_from', partial=True)


def test_partial_start_from_another_model(student: torch.nn.Module, tmp_path: Path):
    other = build_model({'_scope_': 'mmseg', **tiny_seg.model(16)}).state_dict()
    path = saved(tmp_path / 'other.pth', other)
    with pytest.raises(ValueError, match=r'`load_from` .*another model: only \d+ of its \d+'):
        cli.check_checkpoint(student, path, 'load_from', partial=True)


def test_missing_checkpoint_is_named(student: torch.nn.Module):
    with pytest.raises(FileNotFoundError, match=r'`checkpoint`.*no\.pth'):
        cli.check_checkpoint(student, 'no.pth', 'checkpoint')


def test_data_root_option_reaches_every_data_set(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        "data_root = 'old'\n"
        'parts = [dict(data_root=data_root), dict(data_root="x")]\n'
        'train_dataloader = dict(dataset=dict(datasets=parts))\n'
        "val_evaluator = dict(ann_file=data_root + '/val.json')\n"
    )
    cfg = cli.load_config(str(path), dict(data_root='new/place'))
    roots = [part.data_root for part in cfg.train_dataloader.dataset.datasets]
    assert (cfg.data_root, roots) == ('new/place', ['new/place', 'x'])
    assert cfg.val_evaluator.ann_file == 'new/place/val.json'


def test_the_process_group_is_left_at_the_end(tmp_path):
    from torch import distributed as dist

    cli.leave_process_group()  # there is none
    store = dist.FileStore(str(tmp_path / 'store'), 1)
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    cli.leave_process_group()
    assert not dist.is_initialized()
