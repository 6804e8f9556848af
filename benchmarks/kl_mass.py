"""Where a distillation's pull comes from: shares of pixels and of KL divergence, by who is right.

Runs student and teacher of a distillation config over the validation images, without training.

Usage: python benchmarks/kl_mass.py CONFIG STUDENT.pth [--cfg-options model.teacher.checkpoint=...]
"""

from __future__ import annotations

import json

import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmdistill_ext import cli
from mmdistill_ext.distillers.teacher import Teacher
from mmdistill_ext.export import load_student
from mmdistill_ext.functional import unit_difference, unit_distillation
from mmdistill_ext.plain_config import plain_config


@torch.no_grad()
def main() -> None:
    parser = cli.config_parser(__doc__)
    parser.add_argument('checkpoint', help="the student's")
    parser.add_argument('--temperature', type=float, default=2.0)
    args = parser.parse_args()
    cfg = cli.load_config(args.config, args.cfg_options, args.trust)
    init_default_scope(cfg.default_scope)
    student = load_student(plain_config(cfg), args.checkpoint)[0]
    teacher = Teacher(**cfg.model.teacher).model
    sums: dict[str, list[float]] = {}
    for data in Runner.build_dataloader(cfg.val_dataloader, seed=0):
        samples = [model.test_step(data)[0] for model in (student, teacher)]
        own, other = (sample.seg_logits.data[None] for sample in samples)
        labels = samples[0].gt_sem_seg.data
        valid = labels != student.decode_head.ignore_index
        better = unit_difference(other, labels) < unit_difference(own, labels)
        right = {'teacher': other.argmax(1) == labels, 'student': own.argmax(1) == labels}
        kl = unit_distillation(own, other, temperature=args.temperature)
        groups = {
            'all': valid,
            'teacher better': valid & better,
            'student better': valid & ~better,
            'student better, teacher wrong': valid & ~better & ~right['teacher'],
            'teacher wrong, student right': valid & ~right['teacher'] & right['student'],
            'teacher right, student wrong': valid & right['teacher'] & ~right['student'],
        }
        for name, group in groups.items():
            found = sums.setdefault(name, [0.0, 0.0])
            found[0] += group.sum().item()
            found[1] += kl[group].double().sum().item()
    pixels, total = sums['all']
    shares = {name: dict(pixels=n / pixels, kl=k / total) for name, (n, k) in sums.items()}
    print(json.dumps(dict(mean_kl=total / pixels, shares=shares), indent=1))


if __name__ == '__main__':
    main()
