"""Test a checkpoint: mmseg's or mmdet's model; of a distilled one the plain student."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy

from mmengine.config import Config, ConfigDict

import mmdistill_ext  # noqa: F401  before the config is read: `mmdistill_ext::` and `mmseg::` in it
from mmdistill_ext import cli
from mmdistill_ext.dataset_configs import innermost_config
from mmdistill_ext.first_checkpoint import CheckFirstCheckpoint, check_before_loading
from mmdistill_ext.plain_config import network_names, plain_config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = cli.config_parser('Test (and evaluate) a model; of a distilled one, the student')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    cli.add_run_arguments(parser)
    parser.add_argument(
        '--out',
        help='keep the predictions: segmentation in this folder, detection in this .pkl file',
    )
    parser.add_argument('--show', action='store_true', help='show the predictions')
    parser.add_argument('--show-dir', help='folder for painted images')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds per image shown')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args(argv)


def use_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Let the config's visualization hook draw, show, and save where each framework expects it."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise ValueError(
            '`--show` and `--show-dir` need `default_hooks.visualization`. Found none.'
        )
    hook.draw = True
    if args.show:
        hook.show, hook.wait_time = True, args.wait_time
    if cfg.get('default_scope') != 'mmdet':
        hook.interval = 1  # mmseg 1.2 would draw one in 50
        if args.show_dir:
            cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        hook.test_out_dir = args.show_dir


def use_tta(cfg: Config) -> None:
    """Wrap the model and change the pipeline for test-time augmentation.

    mmdet's default (a horizontal flip) stands in for a detection config that describes none.
    """
    if network_names(cfg):
        raise ValueError(
            '`--tta` is for one model: export a network first, with tools/export_student.py '
            '--network.'
        )
    innermost = innermost_config(cfg.test_dataloader.dataset)
    if cfg.get('default_scope') == 'mmdet':
        nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        cfg.setdefault('tta_model', ConfigDict(type='DetTTAModel', tta_cfg=nms))
        flip = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pack = deepcopy(innermost.pipeline[-1])
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        pack.meta_keys = (*keys, 'flip', 'flip_direction')
        branches = dict(type='TestTimeAug', transforms=[flip, [pack]])
        cfg.setdefault('tta_pipeline', [*deepcopy(innermost.pipeline[:-1]), branches])
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise ValueError(f'`--tta` needs `{key}` in the config. Found none.')
    innermost.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def keep_predictions(cfg: Config, out: str) -> None:
    """Save the predictions as ``--out`` asks, beside the evaluation."""
    if network_names(cfg):
        raise ValueError(
            '`--out` keeps the predictions of one model: export a network first, with '
            'tools/export_student.py --network.'
        )
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if cfg.get('default_scope') == 'mmdet':
        dump = dict(type='DumpDetResults', out_file_path=out)
        cfg.test_evaluator = [*metrics, dump]
    else:
        metrics[0].output_dir = out


def test(cfg: Config) -> None:
    """Build the runner, check the checkpoint, test."""
    runner = cli.build_runner(cfg)
    check_before_loading(runner, CheckFirstCheckpoint(cfg.load_from, 'checkpoint'))
    runner.test()


def main(argv: Sequence[str] | None = None) -> None:
    """Test."""
    args = parse_args(argv)
    cfg = plain_config(cli.load_config(args.config, args.cfg_options, args.trust))
    cli.set_run_options(cfg, args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show or args.show_dir:
        use_visualization(cfg, args)
    if args.tta:
        use_tta(cfg)
    if args.out:
        keep_predictions(cfg, args.out)
    test(cfg)
    cli.leave_process_group()


if __name__ == '__main__':
    main()
