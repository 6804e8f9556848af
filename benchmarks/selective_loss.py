"""Selective loss, forward and backward, against plain PyTorch: time and extra peak memory.

Usage: python benchmarks/selective_loss.py [--compile] [--json benchmarks/results/x.json]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import MIB, alternate, environment, extra_peak_bytes, write_json
from torch import Tensor

from mmdistill_ext.losses import SelectiveLoss
from mmdistill_ext.units.base import Units

CASES = {  # name -> full size of the logits, stride at which they are given
    '19 classes': ((4, 19, 512, 1024), 1),
    '150 classes': ((2, 150, 512, 512), 1),
    '19 classes, 1/4': ((4, 19, 512, 1024), 4),
    '150 classes, 1/4': ((2, 150, 512, 512), 4),
}


def reference(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """The same loss as one would write it, every step on the whole tensor."""
    if student.shape[2:] != target.shape[1:]:
        student = F.interpolate(student, target.shape[1:], mode='bilinear')
        teacher = F.interpolate(teacher, target.shape[1:], mode='bilinear')
    own = F.cross_entropy(student, target, reduction='none', ignore_index=255)
    with torch.no_grad():
        other = F.cross_entropy(teacher, target, reduction='none', ignore_index=255)
        selected = (other < own) & (target != 255)
        soft = F.softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(F.log_softmax(student / temperature, dim=1), soft, reduction='none')
    divergence = divergence.sum(1) * temperature**2
    return (divergence * selected).sum() / selected.sum().clamp(min=1)


def make(full: tuple[int, ...], stride: int, device: torch.device) -> tuple[Tensor, ...]:
    """Random logits at the given stride and labels at full size, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    given = (*full[:2], full[2] // stride, full[3] // stride)
    student, teacher = (torch.randn(given, generator=generator).to(device) for _ in range(2))
    target = torch.randint(0, full[1], (full[0], *full[2:]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return student.requires_grad_(), teacher, target.to(device)


def step(loss: Callable[..., Tensor], student: Tensor) -> Callable[[], Tensor]:
    """Forward and backward, as a training step needs them."""

    def run() -> Tensor:
        student.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return run


def measure(
    full: tuple[int, ...], stride: int, device: torch.device, options: argparse.Namespace
) -> dict:
    """One case: all sides in turns."""
    student, teacher, target = make(full, stride, device)
    selective = SelectiveLoss(temperature=2.0).to(device)
    units = Units(student, teacher, target)
    sides = {
        'reference': step(lambda: reference(student, teacher, target, 2.0), student),
        'block-wise': step(lambda: selective(units)['loss'], student),
    }
    if options.compile:
        compiled = torch.compile(reference, dynamic=False)
        sides['reference, compiled'] = step(
            lambda: compiled(student, teacher, target, 2.0), student
        )
    values = {name: (side().item(), student.grad.clone()) for name, side in sides.items()}
    value, gradient = values.pop('reference')
    apart = {
        name: dict(
            value=abs(other - value) / abs(value),
            gradient=((g - gradient).abs().max() / gradient.abs().max()).item(),
        )
        for name, (other, g) in values.items()
    }
    del values, gradient
    times = alternate(sides, device, options.repeats)
    logits_bytes = 4 * torch.Size(full).numel()
    found = {}
    for name, side in sides.items():
        student.grad = None
        extra = extra_peak_bytes(side, device)
        found[name] = dict(
            seconds=times[name],
            speedup=times['reference']['median'] / times[name]['median'],
            extra_peak_mib=extra / MIB,
            extra_peak_in_logits=extra / logits_bytes,
            relative_difference=apart.get(name),
        )
    result = dict(full=full, stride=stride, logits_mib=logits_bytes / MIB, sides=found)
    if device.type == 'cuda':
        result |= bandwidth(student, target, times['block-wise']['median'], device)
    return result


def bandwidth(student: Tensor, target: Tensor, seconds: float, device: torch.device) -> dict:
    """Time against the least possible: read both logits and the labels, write the gradient."""
    moved = 3 * student.nbytes + target.nbytes
    source = torch.empty(2**28, device=device)
    copy = alternate({'copy': source.clone}, device, 10)['copy']['median']
    least = moved / (2 * source.nbytes / copy)
    return dict(bytes_moved=moved, least_seconds=least, times_of_least=seconds / least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, help="CPU threads; PyTorch's choice by default")
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--compile', action='store_true', help='also the compiled reference')
    parser.add_argument('--cases', nargs='+', choices=list(CASES), default=list(CASES))
    parser.add_argument('--json', help='where to write the result')
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    result = dict(environment=environment(device), cases={})
    print('| logits | side | time (median, least to largest) | faster | extra peak | in logits |')
    print('|---|---|---|---|---|---|')
    for name in options.cases:
        case = result['cases'][name] = measure(*CASES[name], device, options)
        for side, found in case['sides'].items():
            t = {key: value for key, value in found['seconds'].items() if key != 'all'}
            print(
                f'| {name} | {side} | {{median:.3f}} s ({{least:.3f}} to {{largest:.3f}}) '.format(
                    **t
                )
                + f'| {found["speedup"]:.1f}x | {found["extra_peak_mib"]:.0f} MiB '
                f'| {found["extra_peak_in_logits"]:.2f} |',
                flush=True,
            )
        if 'times_of_least' in case:
            print(f'block-wise: {case["times_of_least"]:.2f} times bytes moved / bandwidth')
    write_json(options.json, result)


if __name__ == '__main__':
    main()
