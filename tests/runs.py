"""Whole runs on tiny data: trained here or by a tool, and read when they are over."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmdistill_ext.compat import allow_training_checkpoints
from tests import tiny_seg

ROOT = Path(__file__).resolve().parents[1]


def plain_config(root: Path, work_dir: Path, iterations: int = 4) -> Config:
    """A segmenter without a teacher, on images in random order."""
    cfg = tiny_seg.config(root, work_dir)
    cfg.train_cfg.max_iters = iterations
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=0.01)
    cfg.param_scheduler = [dict(type='PolyLR', power=0.9, by_epoch=False, end=4)]
    cfg.default_hooks.pop('visualization')
    cfg.experiment_name = f'{work_dir.parent.name}-{work_dir.name}'
    return cfg


def train(cfg: Config) -> Path:
    """Train in this process; return the work folder."""
    tiny_seg.forget_runs()
    Runner.from_cfg(cfg).train()
    return Path(cfg.work_dir)


def run_tool(*arguments: object, cwd: Path) -> str:
    """Run a script in a process of its own; return what it printed."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, arguments)],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def state_of(checkpoint: Path) -> dict:
    return torch.load(checkpoint, weights_only=False)


def last(folder: Path) -> dict:
    """The last checkpoint of the run in ``folder / 'work'``, read as users do."""
    files = sorted((folder / 'work').glob('iter_*.pth'), key=lambda path: int(path.stem[5:]))
    allow_training_checkpoints()
    return torch.load(files[-1], weights_only=True)


def logged(work_dir: Path) -> list[dict]:
    """What the latest run in a folder logged, a line each."""
    latest = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in latest.read_text().splitlines()]


def scalars(folder: Path, *names: str) -> dict[int, list]:
    """Iteration -> values, over all starts of the run in ``folder / 'work'``.

    Later writing wins, as after a resumption.
    """
    rows = {}
    for file in sorted((folder / 'work').glob('*/vis_data/scalars.json')):
        for line in map(json.loads, file.read_text().splitlines()):
            if 'iter' in line:
                rows[line['iter']] = [line.get(name) for name in names]
    return rows


def metrics_of_test(work_dir: Path) -> dict:
    """What the latest test in a folder found."""
    return json.loads(max(work_dir.glob('*/*.json')).read_text())


def assert_identical(first: object, second: object, key: object = '') -> None:
    """Equal to the bit, and of the same types, all the way down."""
    assert type(first) is type(second), key
    if isinstance(first, dict):
        assert first.keys() == second.keys(), key
        for name, value in first.items():
            assert_identical(value, second[name], name)
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), key
        for a, b in zip(first, second, strict=True):
            assert_identical(a, b, key)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), key
    else:
        assert first == second, key
