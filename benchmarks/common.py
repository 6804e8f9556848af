"""What the benchmarks share: time, memory, versions, results."""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from mmengine.optim import OptimWrapper
from torch import nn

MIB = 2**20


def alternate(
    sides: dict[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int = 2
) -> dict[str, dict]:
    """Time each side ``repeats`` times, in turns, so that a slow minute of the machine hits all.

    Each turn begins with another side, because what ran before leaves caches and memory behind.

    Returns:
        Side -> median, least and largest time in seconds, and all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            _wait(device)
            begin = time.perf_counter()
            sides[name]()
            _wait(device)
            if turn >= warmup:
                times[name].append(time.perf_counter() - begin)
    return {
        name: dict(median=statistics.median(t), least=min(t), largest=max(t), all=t)
        for name, t in times.items()
    }


def extra_peak_bytes(side: Callable[[], object], device: torch.device) -> int:
    """Most memory that a call holds beyond what is held before it.

    On a GPU as PyTorch's allocator counts it. On a CPU by the kernel's high-water mark of the
    resident set (``VmHWM``), reset before the call, after free heap memory went back to the system:
    that includes what libraries allocate past PyTorch and misses no short peak.

    Raises:
        OSError: On a CPU without Linux's ``/proc/self/clear_refs``.
    """
    gc.collect()
    _wait(device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        side()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # VmHWM := VmRSS
    before = _status('VmRSS')
    side()
    return _status('VmHWM') - before


def environment(device: torch.device) -> dict:
    """Machine and versions, to be kept with every result."""
    found = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cpu=_cpu_name(),
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
    )
    for name in ('mmdistill-ext', 'mmengine', 'mmsegmentation'):
        for distribution in (name, f'onedl-{name}'):
            try:
                found[distribution] = version(distribution)
            except PackageNotFoundError:
                continue
    return found


def write_json(path: str | None, result: dict) -> None:
    """Write a result, if a path was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=2) + '\n')


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _status(key: str) -> int:
    found = re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    return int(found[1]) * 1024


def _cpu_name() -> str:
    names = re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    return f'{len(names)} x {names[0]}' if names else platform.processor()


def step_parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """Return the options of the benchmarks of whole training steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--size', type=int, nargs=3, default=(2, 256, 512), metavar=('B', 'H', 'W'))
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=repeats)
    parser.add_argument('--json', help='write the result there')
    return parser


def training_steps(
    models: dict[str, nn.Module], batch: dict, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Name -> one training step of the model on the raw batch, SGD included."""
    steps = {}
    for name, model in models.items():
        model.to(device).train()
        optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9))
        steps[name] = lambda m=model, o=optimizer: m.train_step(copy.deepcopy(batch), o)
    return steps


def report_ratios(
    times: dict[str, dict], sides: Sequence[str], floor: Sequence[str], label: str
) -> dict[str, float]:
    """Print the table of a benchmark of whole steps.

    Args:
        times: Of :func:`alternate`.
        sides: Names of what is compared with the floor.
        floor: Names of the parts whose sum the floor is.
        label: What the floor is called.

    Returns:
        Side -> median ratio to the floor, turn by turn, so that a slow minute of the machine counts
        on both sides.
    """
    floors = [sum(turn) for turn in zip(*(times[name]['all'] for name in floor), strict=True)]
    ratios = {
        name: statistics.median(
            side / least for side, least in zip(times[name]['all'], floors, strict=True)
        )
        for name in sides
    }
    print(f'| side | time (median, least to largest) | / ({label}) |\n|---|---|---|')
    for name, side in times.items():
        ratio = f'{ratios[name]:.3f}' if name in ratios else ''
        spread = f'{side["least"]:.3f} to {side["largest"]:.3f}'
        print(f'| {name} | {side["median"]:.3f} s ({spread}) | {ratio} |')
    return ratios
