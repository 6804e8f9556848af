"""Write contrast masks of a whole data set: where the teacher beats the student (SEL-4, SEL-8)."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import mmcv
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.utils import ProgressBar
from torch import Tensor, nn

import mmdistill_ext  # noqa: F401  before the config is read: `mmdistill_ext::` and `mmseg::` in it
from mmdistill_ext import cli
from mmdistill_ext.checkpoint import write_atomic
from mmdistill_ext.dataset_configs import find_pipeline, with_pipeline
from mmdistill_ext.distillers.teacher import Teacher
from mmdistill_ext.distillers.whole_images import whole_logits
from mmdistill_ext.export import load_student
from mmdistill_ext.functional import contrast_mask, select_units, unit_difference
from mmdistill_ext.functional.checks import check_labels
from mmdistill_ext.plain_config import is_distillation, plain_config
from mmdistill_ext.units.pairing import pair_heads
from mmdistill_ext.units.pixel.head import FoundHead
from mmdistill_ext.visualization.contrast import check_contrast_values, contrast_overlay, write_png


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = cli.config_parser(__doc__)
    parser.add_argument(
        'checkpoint', help="the student's checkpoint; the teacher's is in the config"
    )
    parser.add_argument('out_dir', help='folder for masks/, overlays/ and summary.json')
    parser.add_argument('--split', choices=['train', 'val', 'test'], default='val')
    parser.add_argument(
        '--values',
        nargs='+',
        action=DictAction,
        metavar='NAME=VALUE',
        help='grey values of the masks, default: teacher=255 student=0 void=128',
    )
    parser.add_argument('--overlay', action='store_true', help='also colour the images')
    parser.add_argument(
        '--loss', help='name of the loss whose heads are compared; default: the first of heads'
    )
    parser.add_argument(
        '--difference',
        choices=['ce', 'bce'],
        help="how a prediction is compared with its label; default: as the config's loss does",
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser.parse_args(argv)


def split_loader(cfg: Config, split: str):
    """Images of a split one by one, in order, whole and with labels: through val's pipeline."""
    for name in ('val', split):
        if not cfg.get(f'{name}_dataloader'):
            raise ValueError(
                f'`--split {split}` needs `{name}_dataloader` in the config. Found none.'
            )
    loader = deepcopy(cfg.val_dataloader)
    pipeline = find_pipeline(loader.dataset)
    loader.dataset = with_pipeline(cfg[f'{split}_dataloader'].dataset, pipeline)
    loader.batch_size = 1
    return Runner.build_dataloader(loader, seed=0)


def mask_names(paths: Sequence[str]) -> dict[str, Path]:
    """Image path -> path of its mask below the output folder, subfolders kept."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = {p: Path(os.path.relpath(os.path.abspath(p), root)).with_suffix('.png') for p in paths}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f'The images should differ by more than their suffix. Found such in {root}.'
        )
    return names


def choose_loss(losses: Mapping[str, Mapping], name: str | None) -> tuple[str, dict]:
    """Name and config of the loss whose comparison is shown: by default the first of heads.

    Without a loss of heads the two are those that the models predict with.
    """
    of_heads = {key: loss for key, loss in losses.items() if not loss.get('tap')}
    if name is not None and name not in of_heads:
        raise ValueError(
            f'`--loss` should name a loss of heads, one of {sorted(of_heads)}. Found {name!r}.'
        )
    name = name or next(iter(of_heads), None)
    return (name, of_heads[name]) if name else ('', {})


def logits_and_labels(model: nn.Module, head: FoundHead, data: dict) -> tuple[Tensor, Tensor]:
    """Logits ``(1, C, H, W)`` and labels ``(1, H, W)`` of one image at its original size."""
    logits, (sample,) = whole_logits(model, head, data)
    if 'gt_sem_seg' not in sample:
        raise ValueError('The pipeline of `val_dataloader` should load labels. It loads none.')
    labels = sample.gt_sem_seg.data
    if labels.shape[-2:] != logits.shape[-2:]:
        raise ValueError(
            f"Labels should have the image's size {tuple(logits.shape[-2:])}: put LoadAnnotations "
            f'after Resize in the pipeline of `val_dataloader`. Found {tuple(labels.shape[-2:])}.'
        )
    return logits, labels


def summarise(wins: Tensor, valid: Tensor, classes: Sequence[str]) -> dict:
    """Share of pixels where the teacher wins, overall and per class; None where there are none."""

    def share(won: int, of: int) -> dict:
        return dict(pixels=of, teacher_better=won / of if of else None)

    pairs = zip(wins.tolist(), valid.tolist(), strict=True)
    return dict(
        overall=share(int(wins.sum()), int(valid.sum())),
        classes={name: share(*pair) for name, pair in zip(classes, pairs, strict=True)},
    )


def print_table(summary: Mapping) -> None:
    """Print the summary for people."""
    print(f'\n{"class":<24}{"pixels":>14}{"teacher better":>18}')
    for name, row in {**summary['classes'], 'all': summary['overall']}.items():
        share = '-' if row['teacher_better'] is None else f'{row["teacher_better"]:.2%}'
        print(f'{name:<24}{row["pixels"]:>14}{share:>18}')


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Write masks and summary."""
    args = parse_args(argv)
    values = check_contrast_values(args.values, '--values')
    cfg = cli.load_config(args.config, args.cfg_options, args.trust)
    if not is_distillation(cfg):
        raise ValueError(f"`config` should have a teacher and a student. Found '{args.config}'.")
    if cfg.get('default_scope') == 'mmdet':
        raise ValueError(
            '`config` should be of segmenters: for detectors, whose units belong to the target '
            f"assignment of the training, use `ContrastMaskHook`. Found '{args.config}'."
        )
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    student = load_student(plain_config(cfg), args.checkpoint)[0].to(args.device)
    teacher = Teacher(**cfg.model.teacher).model.to(args.device)
    if not hasattr(teacher.data_preprocessor, '_enable_normalize'):
        teacher.data_preprocessor = student.data_preprocessor
    name, loss = choose_loss(cfg.model.losses, args.loss)
    pair = pair_heads(
        student, teacher, loss.get('head'), loss.get('teacher_head'), f'losses.{name}'
    )
    difference = args.difference or loss.get('difference') or ('bce' if pair.sigmoid else 'ce')
    ignore_index = pair.ignore_index

    loader = split_loader(cfg, args.split)
    dataset, out = loader.dataset, Path(args.out_dir)
    names = mask_names([dataset.get_data_info(i)['img_path'] for i in range(len(dataset))])
    classes = pair.label_names(tuple(dataset.metainfo['classes']))
    counts = torch.zeros(2, len(classes), dtype=torch.long)
    progress = ProgressBar(len(dataset))
    for data in loader:
        own, labels = logits_and_labels(student, pair.student_head, data)
        other = pair.convert(logits_and_labels(teacher, pair.other_head, data)[0])
        check_labels(labels, len(classes), ignore_index)
        valid = labels != ignore_index
        wins = select_units(
            unit_difference(other, labels, difference, ignore_index),
            unit_difference(own, labels, difference, ignore_index),
            valid,
        )
        for row, chosen in zip(counts, (wins, valid), strict=True):
            row += labels[chosen].bincount(minlength=len(classes)).cpu()
        path = data['data_samples'][0].img_path
        mask = contrast_mask(wins, valid, **values)[0].cpu().numpy()
        write_png(out / 'masks' / names[path], mask)
        if args.overlay:
            image = mmcv.imread(path, channel_order='rgb')
            overlay = contrast_overlay(image, mask, values, legend=True)
            write_png(out / 'overlays' / names[path], overlay)
        progress.update()

    summary = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        teacher_checkpoint=str(cfg.model.teacher.get('checkpoint', 'pretrained')),
        split=args.split,
        loss=name or None,
        heads=pair.heads,
        difference=difference,
        images=len(dataset),
        values=values,
        **summarise(*counts, classes),
    )
    write_atomic(out / 'summary.json', lambda file: file.write_text(json.dumps(summary, indent=2)))
    print_table(summary)


if __name__ == '__main__':
    main()
