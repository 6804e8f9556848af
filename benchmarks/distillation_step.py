"""Whole training step with a teacher against plain student step + bare teacher forward.

PSPNet R50 -> R18 of mmsegmentation, 19 classes, optimizer included. Weights are random: they do not
change the time, but a random teacher and student share the pixels about evenly.

Usage: python benchmarks/distillation_step.py [--size 2 256 512] [--json benchmarks/results/x.json]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import alternate, environment, step_parser, training_steps, write_json
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.distillers.teacher_student import build_teacher_student

PSPNET = 'mmseg::pspnet/pspnet_{}-d8_4xb2-80k_cityscapes-512x1024.py'


def model_cfg(depth: str) -> dict:
    cfg = resolve_model_cfg(PSPNET.format(depth))
    cfg.pretrained = None
    for part in (cfg.backbone, cfg.decode_head, cfg.auxiliary_head):
        part.norm_cfg = dict(type='BN', requires_grad=True)
    return cfg


def raw_batch(batch: int, height: int, width: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    images, samples = [], []
    for _ in range(batch):
        images.append(torch.randint(0, 256, (3, height, width), generator=generator).byte())
        label = torch.randint(0, 19, (1, height, width), generator=generator)
        label[:, :8] = 255
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label)))
    return dict(inputs=images, data_samples=samples)


def main() -> None:
    args = step_parser(__doc__, repeats=7).parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)

    student, teacher = model_cfg('r18'), model_cfg('r50')
    student.data_preprocessor.size = teacher.data_preprocessor.size = tuple(args.size[1:])
    losses = dict(sel=dict(type='SelectiveLoss', temperature=2.0))
    bare = build_model(teacher).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, 'teacher.pth'))
        torch.save(dict(state_dict=bare.state_dict()), path)
        models = dict(plain=build_model(student))
        for name, fused in (('distillation', False), ('distillation, fused task loss', True)):
            models[name] = build_teacher_student(
                student, dict(model=teacher, checkpoint=path), losses, fuse_task_loss=fused
            )
    sides = training_steps(models, raw_batch(*args.size), device)
    images = torch.randn(args.size[0], 3, *args.size[1:], device=device)

    def teacher_forward() -> None:
        with torch.no_grad():
            bare(images, mode='tensor')

    times = alternate(dict(**sides, teacher=teacher_forward), device, args.repeats)
    floor = times['plain']['median'] + times['teacher']['median']
    print(f'{"side":32} {"median s":>9} {"least":>7} {"largest":>8} {"/ (plain + teacher)":>20}')
    for name, found in times.items():
        ratio = f'{found["median"] / floor:.3f}' if name.startswith('distillation') else ''
        row = f'{found["median"]:9.3f} {found["least"]:7.3f} {found["largest"]:8.3f}'
        print(f'{name:32} {row} {ratio:>20}')
    ratios = {n: t['median'] / floor for n, t in times.items() if n.startswith('distillation')}
    write_json(
        args.json,
        dict(size=list(args.size), times=times, ratios=ratios, environment=environment(device)),
    )


if __name__ == '__main__':
    main()
