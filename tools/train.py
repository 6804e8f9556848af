"""Train the model of a config: mmseg's or mmdet's, distilled or plain."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner, find_latest_checkpoint

import mmdistill_ext  # noqa: F401  before the config is read: `mmdistill_ext::` and `mmseg::` in it
from mmdistill_ext import cli


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
    found = find_latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume
    if found is None:
        print_log(f'Nothing to resume in {cfg.work_dir}: starts anew.', 'current', logging.WARNING)
        return
    cfg.resume, cfg.load_from = True, found


def check_start(runner: Runner) -> None:
    """Check the checkpoint that the run starts from, if any, before it starts."""
    resume, source = runner.cfg.get('resume'), runner.cfg.get('load_from')
    if resume and source is None:
        source = find_latest_checkpoint(runner.work_dir)
    if source is not None and ('://' not in source or source.startswith('http')):
        key = 'resume' if resume else 'load_from'
        cli.check_checkpoint(runner.model, source, key, partial=not resume)


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = parse_args(argv)
    cfg = cli.load_config(args.config, args.cfg_options)
    cli.set_run_options(cfg, args)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        use_auto_scale_lr(cfg)
    if args.resume is not None:
        use_resume(cfg, args.resume)
    runner = cli.build_runner(cfg)
    check_start(runner)
    cli.train(runner)
    cli.leave_process_group()


if __name__ == '__main__':
    main()
