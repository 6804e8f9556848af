"""Train the model of a config: mmseg's or mmdet's, distilled or plain."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

import mmdistill_ext  # noqa: F401  before the config is read: `mmdistill_ext::` and `mmseg::` in it
from mmdistill_ext import cli
from mmdistill_ext.first_checkpoint import CheckFirstCheckpoint, check_before_loading, load_teachers
from mmdistill_ext.work_dir import latest_checkpoint, locked


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = cli.config_parser('Train a model')
    cli.add_run_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by batch size over auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint, or from the latest in the work folder when none is named',
    )
    parser.add_argument(
        '--share-work-dir',
        action='store_true',
        help='train although another run works in the same folder',
    )
    return parser.parse_args(argv)


def use_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision, with dynamic loss scaling."""
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind == 'AmpOptimWrapper':
        print_log('The config uses automatic mixed precision already.', logger='current')
        return
    if kind != 'OptimWrapper':
        raise ValueError(f"`--amp` needs `optim_wrapper.type`='OptimWrapper'. Found '{kind}'.")
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def use_auto_scale_lr(cfg: Config) -> None:
    """Turn on the linear scaling rule that the config describes."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise ValueError('`--auto-scale-lr` needs `auto_scale_lr.base_batch_size` in the config.')
    cfg.auto_scale_lr.enable = True


def use_resume(cfg: Config, resume: str) -> None:
    """Go on from ``resume``; ``'auto'``: from the work folder's latest, else start anew."""
    found = latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume
    if found is None:
        cfg.resume = False
        print_log(f'Nothing to resume in {cfg.work_dir}: starts anew.', 'current', logging.WARNING)
        return
    cfg.resume, cfg.load_from = True, found


def check_start(runner: Runner) -> None:
    """Check what the run starts from: the teacher's weights, and the checkpoint, if any."""
    load_teachers(runner.model)
    resume, source = runner.cfg.get('resume'), runner.cfg.get('load_from')
    if source is not None:
        key = 'resume' if resume else 'load_from'
        hook = CheckFirstCheckpoint(str(source), key, partial=not resume)
        check_before_loading(runner, hook)


def train(cfg: Config) -> None:
    """Build the runner, check what it starts from, train."""
    runner = cli.build_runner(cfg)
    check_start(runner)
    cli.train(runner)


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = parse_args(argv)
    cfg = cli.load_config(args.config, args.cfg_options, args.trust)
    cli.set_run_options(cfg, args)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        use_auto_scale_lr(cfg)
    alone = not args.share_work_dir and cli.is_first_process(args.launcher)
    with locked(cfg.work_dir) if alone else nullcontext():
        if args.resume is not None or (cfg.get('resume') and cfg.get('load_from') is None):
            named = cfg.resume if isinstance(cfg.get('resume'), str) else None  # FlexibleRunner's
            use_resume(cfg, args.resume or named or 'auto')
        train(cfg)
    cli.leave_process_group()


if __name__ == '__main__':
    main()
