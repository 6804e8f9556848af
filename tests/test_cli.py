"""What the tools read and set before they run."""

from argparse import Namespace
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdistill_ext import cli
from tests import tiny_seg


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
