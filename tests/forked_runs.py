"""Runs of ``tools/train.py`` in forked processes: quick to start, two together, or killed."""

import os
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from mmengine.config import Config

from tests import tiny_seg
from tests.runs import free_port

TIMEOUT = 240
FORK = get_context('fork')  # the frameworks are imported already


def run(cfg: Config, folder: Path, *options: str) -> None:
    """tools/train.py in a process of its own; the run is in ``folder / 'work'``."""
    process = start(write(cfg, folder), *options)
    process.join(TIMEOUT)
    assert process.exitcode == 0


def run_two(cfg: Config, folder: Path) -> None:
    """tools/train.py in two processes that train together."""
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    write(cfg, folder)
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), WORLD_SIZE='2')
    ranks = [
        start(folder, '--launcher', 'pytorch', RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            rank.join(TIMEOUT)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def write(cfg: Config, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    cfg.dump(folder / 'run.py')
    return folder


def start(folder: Path, *options: str, **environment: str) -> BaseProcess:
    """Start the run that was written to a folder, and do not wait for it."""
    arguments = (folder / 'run.py', '--work-dir', folder / 'work', *options)
    process = FORK.Process(target=_child, args=(arguments, environment), daemon=True)
    process.start()
    return process


def _child(arguments: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    tiny_seg.tool('train')(*arguments)
    assert not threads_of_gloo()


def threads_of_gloo() -> list[str]:
    """Threads of a process group that is still alive: at exit they may abort the process."""
    names = [file.read_text().strip() for file in Path('/proc/self/task').glob('*/comm')]
    return [name for name in names if 'gloo' in name]
