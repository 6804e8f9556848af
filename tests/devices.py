"""Lets tests that know nothing of devices run on any: ``pytest --device cuda``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm}


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Make new tensors there, also random ones; do nothing for ``'cpu'``.

    ``torch.from_numpy`` stays on the CPU: tests take ``torch.as_tensor``.
    """
    if device == torch.device('cpu'):
        yield
        return
    with device, DrawnOnCPU(device):
        yield


class DrawnOnCPU(TorchFunctionMode):
    """Draws random numbers on the CPU and moves them to a device.

    So they are the same on every machine, and generators of the CPU may draw them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in RANDOM or kwargs.get('device') is not None:
            return func(*args, **kwargs)
        requires_grad = kwargs.pop('requires_grad', False)
        drawn = func(*args, **{**kwargs, 'device': 'cpu'})
        return drawn.to(self.device).requires_grad_(requires_grad)
