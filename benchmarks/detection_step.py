"""Whole step of a distilled detector against plain student step + bare teacher forward.

RetinaNet R50 -> R18 of mmdetection, 80 classes, optimizer included. Weights are random: they do not
change the time, but a random teacher and student share the anchors about evenly.

Usage: python benchmarks/detection_step.py [--size 2 256 512] [--json benchmarks/results/x.json]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import alternate, environment, report_ratios, step_parser, training_steps, write_json
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.distillers.teacher_student import build_teacher_student

BOX = dict(average='positive', box=dict(distance='iou'))
SIDES = {
    'distillation, KD': dict(kd=dict(type='KDLoss', **BOX)),
    'distillation, SEL': dict(sel=dict(type='SelectiveLoss', **BOX)),
}


def model_cfg(depth: int) -> dict:
    cfg = resolve_model_cfg('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    cfg.backbone.update(depth=depth, init_cfg=None)
    cfg.neck.in_channels = [64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048]
    return cfg


def raw_batch(batch: int, height: int, width: int, boxes: int = 8) -> dict:
    generator = torch.Generator().manual_seed(0)
    images, samples = [], []
    for _ in range(batch):
        images.append(torch.randint(0, 256, (3, height, width), generator=generator).byte())
        corner = torch.rand(boxes, 2, generator=generator) * torch.tensor([width, height]) * 0.7
        side = 20 + torch.rand(boxes, 2, generator=generator) * 80
        labels = torch.randint(0, 80, (boxes,), generator=generator)
        shape = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=shape)
        sample.gt_instances = InstanceData(
            bboxes=torch.cat((corner, corner + side), 1), labels=labels
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


def main() -> None:
    args = step_parser(__doc__, repeats=9).parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)

    student, teacher = model_cfg(18), model_cfg(50)
    bare = build_model(teacher).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, 'teacher.pth'))
        torch.save(dict(state_dict=bare.state_dict()), path)
        models = dict(plain=build_model(student))
        for name, losses in SIDES.items():
            spec = dict(model=teacher, checkpoint=path)
            models[name] = build_teacher_student(student, spec, losses)
    sides = training_steps(models, raw_batch(*args.size), device)
    images = torch.randn(args.size[0], 3, *args.size[1:], device=device)

    def teacher_forward() -> None:
        with torch.no_grad():
            bare(images, mode='tensor')

    times = alternate(dict(**sides, teacher=teacher_forward), device, args.repeats)
    ratios = report_ratios(times, tuple(SIDES), ('plain', 'teacher'), 'plain + teacher')
    write_json(
        args.json,
        dict(size=list(args.size), times=times, ratios=ratios, environment=environment(device)),
    )


if __name__ == '__main__':
    main()
