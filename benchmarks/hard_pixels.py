"""What is hard in FIT: the pixels of the training images that the teacher gets wrong, by class.

With checkpoints of students, their GT loss on training and on validation images too, in eval mode.

Usage: python benchmarks/hard_pixels.py CONFIG [STUDENT.pth ...] \
           --cfg-options data_root=... model.teacher.checkpoint=...
"""

from __future__ import annotations

import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import Tensor

from mmdistill_ext import cli
from mmdistill_ext.checkpoint import load_weights
from mmdistill_ext.dataset_configs import find_pipeline, with_pipeline
from mmdistill_ext.functional import simple_units
from mmdistill_ext.registry import MODELS


@torch.no_grad()
def count(model, loader, ignore_index: int, classes: int) -> Tensor:
    """``(2, classes)``: labelled pixels, and those that the model gets wrong."""
    counts = torch.zeros(2, classes)
    for batch in loader:
        batch = model.data_preprocessor(batch, False)
        (sample,) = batch['data_samples']
        label = sample.gt_sem_seg.data
        logits = model.inference(batch['inputs'], [sample.metainfo])
        logits = logits[..., : label.shape[1], : label.shape[2]]  # padding is right and below
        valid = label != ignore_index
        wrong = valid & ~simple_units(logits, label, ignore_index)
        for row, chosen in enumerate((valid, wrong)):
            counts[row] += torch.bincount(label[chosen], minlength=classes)
    return counts


def main() -> None:
    parser = cli.config_parser(__doc__)
    parser.add_argument('checkpoints', nargs='*', help='of students')
    args = parser.parse_args()
    cfg = cli.load_config(args.config, args.cfg_options, args.trust)
    init_default_scope(cfg.default_scope)
    loaders = {}
    pipeline = find_pipeline(cfg.val_dataloader.dataset)
    for name in ('train', 'val'):
        dataset = with_pipeline(cfg[f'{name}_dataloader'].dataset, pipeline)
        sampler = dict(type='DefaultSampler', shuffle=False)
        loader = dict(batch_size=1, num_workers=0, sampler=sampler, dataset=dataset)
        loaders[name] = Runner.build_dataloader(loader, seed=0)
    model = MODELS.build(cfg.model).eval()
    distillation, term = model.distillation, model.distillation.main_term
    head = term.pair.head

    counts = count(
        distillation.teacher.model, loaders['train'], head.ignore_index, head.num_classes
    )
    print('| class | share of pixels | of them hard |\n|---|---|---|')
    for name, (all_pixels, hard) in zip(distillation.classes, counts.T.tolist(), strict=True):
        print(f'| {name} | {all_pixels / counts[0].sum():.1%} | {hard / max(all_pixels, 1):.1%} |')
    print(f'| all | | {counts[1].sum() / counts[0].sum():.1%} |')

    for path in args.checkpoints:
        model.load_state_dict(load_weights(path)['state_dict'])
        losses = []
        for loader in loaders.values():
            total, weight = sum(term.pair.gt_loss(model, batch, term.fused) for batch in loader)
            losses.append((total / weight).item())
        print(f'{path}: GT loss {losses[0]:.3f} (training), {losses[1]:.3f} (validation)')


if __name__ == '__main__':
    main()
