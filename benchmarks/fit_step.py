"""A training step with the fit loss against the same step with plain distillation.

PSPNet R50 -> R18 of mmsegmentation, 19 classes, optimizer included, the measurement of the
validation loss excluded. Weights are random, so the teacher is wrong almost everywhere: time and
memory do not depend on it.

Usage: python benchmarks/fit_step.py [--size 2 256 512] [--json benchmarks/results/x.json]
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from common import (
    MIB,
    alternate,
    environment,
    extra_peak_bytes,
    step_parser,
    training_steps,
    write_json,
)
from distillation_step import model_cfg, raw_batch

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.teacher_student import build_teacher_student

HALF = dict(type='ConstantFit', c=0.5)
SIDES = {
    'KD': dict(),
    'KD, fused task loss': dict(fuse_task_loss=True),
    'FIT by pixel': dict(fit=dict(function=HALF, split='unit')),
    'FIT by image': dict(fit=dict(function=HALF, split='image', threshold=0.9)),
}


def main() -> None:
    args = step_parser(__doc__, repeats=9).parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)

    student, teacher = model_cfg('r18'), model_cfg('r50')
    student.data_preprocessor.size = teacher.data_preprocessor.size = tuple(args.size[1:])
    losses = dict(kd=dict(type='KDLoss', temperature=2.0))
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, 'teacher.pth'))
        torch.save(dict(state_dict=build_model(teacher).state_dict()), path)
        for name, options in SIDES.items():
            spec = dict(model=teacher, checkpoint=path)
            models[name] = build_teacher_student(student, spec, losses, **options)
    sides = training_steps(models, raw_batch(*args.size), device)

    times = alternate(sides, device, args.repeats)
    turns = [
        {name: extra_peak_bytes(side, device) for name, side in sides.items()} for _ in range(5)
    ]
    peaks = {name: statistics.median(turn[name] for turn in turns) for name in sides}
    base, ratios = 'KD, fused task loss', {}
    print('| side | time (median, least to largest) | / KD, fused | extra peak | / KD, fused |')
    print('|---|---|---|---|---|')
    for name, found in times.items():
        time, peak = found['median'] / times[base]['median'], peaks[name] / peaks[base]
        ratios[name] = dict(time=time, memory=peak)
        spread = f'{found["least"]:.3f} to {found["largest"]:.3f}'
        print(
            f'| {name} | {found["median"]:.3f} s ({spread}) | {time:.3f} | '
            f'{peaks[name] / MIB:.0f} MiB | {peak:.3f} |'
        )
    write_json(
        args.json,
        dict(
            size=list(args.size),
            times=times,
            extra_peak_bytes=peaks,
            ratios=ratios,
            environment=environment(device),
        ),
    )


if __name__ == '__main__':
    main()
