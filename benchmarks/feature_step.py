"""Whole step with a loss of features on the neck, against plain step + teacher up to the neck.

RetinaNet R50 -> R18 of mmdetection, all five levels of the neck, optimizer included. Weights are
random: they do not change the time.

Usage: python benchmarks/feature_step.py [--size 2 256 512] [--json benchmarks/results/x.json]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import alternate, environment, report_ratios, step_parser, training_steps, write_json
from detection_step import model_cfg, raw_batch

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.teacher_student import build_teacher_student

SIDES = {
    'mse': dict(type='FeatureLoss', tap='neck'),
    'mse, in boxes': dict(type='FeatureLoss', tap='neck', weight_by='labels'),
    'mse, through Conv1x1': dict(type='FeatureLoss', tap='neck', connector=dict(type='Conv1x1')),
    'CWD': dict(type='CWDLoss', tap='neck'),
}


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
        for name, loss in SIDES.items():
            spec = dict(model=teacher, checkpoint=path)
            models[name] = build_teacher_student(student, spec, dict(features=loss))
    sides = training_steps(models, raw_batch(*args.size), device)
    images = torch.randn(args.size[0], 3, *args.size[1:], device=device)

    def teacher_to_neck() -> None:
        with torch.no_grad():
            bare.extract_feat(images)

    times = alternate({**sides, 'teacher to the neck': teacher_to_neck}, device, args.repeats)
    ratios = report_ratios(times, tuple(SIDES), ('plain', 'teacher to the neck'), 'plain + teacher')
    write_json(
        args.json,
        dict(size=list(args.size), times=times, ratios=ratios, environment=environment(device)),
    )


if __name__ == '__main__':
    main()
