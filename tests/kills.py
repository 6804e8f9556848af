"""Kill trainings at random moments; resumed, they have to end as if they had never stopped.

``python -m tests.kills --kills 100 --seed 0`` kills runs of SEL, FIT and COL in turn.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config

from tests import tiny_collaboration, tiny_seg
from tests.forked_runs import TIMEOUT, run, start, write
from tests.runs import assert_identical, last, plain_config

PARTS = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'fit')
ITERATIONS = 12


def selective(root: Path, teacher: str) -> Config:
    """A selective teacher, with an average of the weights."""
    ema = dict(type='EMAHook', momentum=0.1)
    share = dict(type='mmdistill_ext.TeacherShareHook', interval=2)
    masks = dict(type='mmdistill_ext.ContrastMaskHook', interval=3, max_images=1)
    cfg = tiny_seg.distil(plain_config(root, root), teacher, ema=ema, share=share, masks=masks)
    cfg.model.losses = dict(sel=dict(type='SelectiveLoss', temperature=2.0, warmup=6))
    return cfg


def fit(root: Path, teacher: str) -> Config:
    """The fit loss over plain distillation."""
    hook = dict(type='mmdistill_ext.FitHook', interval=3, batches=2, window=5, measure_train=True)
    cfg = tiny_seg.distil(plain_config(root, root), teacher, fit=hook)
    cfg.model.losses = dict(kd=dict(type='KDLoss', temperature=2.0))
    cfg.model.fit = dict(function=dict(type='LogisticFit', b=1e3))
    cfg.model.student.decode_head.loss_decode.avg_non_ignore = True
    return cfg


def collaborative(root: Path, teacher: str) -> Config:
    """Two networks; their weights come from the validation."""
    weighted = dict(type='ValidationWeighted', metric='mIoU', temperature=1.0)
    return tiny_collaboration.config(root, root, weighted)


METHODS: dict[str, Callable[[Path, str], Config]] = dict(sel=selective, fit=fit, col=collaborative)


def config(method: str, root: Path, teacher: str) -> Config:
    """A run of 12 iterations with a checkpoint after every second one."""
    cfg = METHODS[method](root, teacher)
    cfg.train_cfg.update(max_iters=ITERATIONS, val_interval=4)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.param_scheduler[0].end = ITERATIONS
    cfg.train_dataloader.num_workers = 0
    for key in ('work_dir', 'experiment_name'):
        cfg.pop(key, None)
    return cfg


def kill_at_random(cfg: Config, folder: Path, draw: random.Random, seconds: float) -> bool:
    """Start or resume the run, kill it within so many seconds; whether it was over before."""
    process = start(write(cfg, folder), '--resume')
    process.join(draw.uniform(0, seconds))
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return False
    assert process.exitcode == 0, f'{folder}: exit code {process.exitcode}'
    return True


def kill_runs(method: str, folder: Path, kills: int, seed: int) -> int:
    """Kill runs of a method, each until it is over.

    Returns:
        How many runs ended, bit for bit as the one that nobody killed.

    Raises:
        AssertionError: One ended otherwise, or did not start again.
    """
    draw = random.Random(seed)
    root, teacher = folder / 'data', tiny_seg.save_weights(folder / 't.pth', tiny_seg.model(16), 1)
    for split in ('train', 'val'):
        tiny_seg.write_data(root, split)
    cfg = config(method, root, teacher)
    begun = time.monotonic()
    run(cfg, folder / 'whole')
    seconds = time.monotonic() - begun
    whole, ended = last(folder / 'whole'), 0
    while kills:
        run_folder = folder / f'killed{ended}'
        over = False
        while kills and not over:
            over = kill_at_random(cfg, run_folder, draw, seconds)
            kills -= not over
        if not over:
            process = start(run_folder, '--resume')
            process.join(TIMEOUT)
            assert process.exitcode == 0, f'{run_folder}: exit code {process.exitcode}'
        killed = last(run_folder)
        for part in set(PARTS) & whole.keys():
            assert_identical(killed[part], whole[part])
        left = list(run_folder.rglob('.mmdistill-*'))
        assert not left, f'not swept: {left}'
        ended += 1
    return ended


def main() -> None:
    """Kill runs of all methods."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    for place, method in enumerate(METHODS):
        kills = args.kills // len(METHODS) + (place < args.kills % len(METHODS))
        with tempfile.TemporaryDirectory() as folder:
            ended = kill_runs(method, Path(folder), kills, args.seed + place)
        print(f'{method}: {kills} kills, {ended} runs, all equal to the one not killed', flush=True)


if __name__ == '__main__':
    main()
