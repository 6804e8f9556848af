"""Keep side work from disturbing the training: its random numbers, its modules' modes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Restore Python's, NumPy's and PyTorch's (the CPU's and this GPU's) random state on exit.

    Args:
        seed: Seed for the time inside; None goes on from the present state.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Left to itself, fork_rng would touch every GPU of the machine, and warn of it.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; on exit every module has its former mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def training_flags(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules compute as in training, but none of their layers; on exit they are as before.

    Args:
        modules: The modules whose ``training`` flag is set.
    """
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = True
        yield
    finally:
        for module, mode in before:
            module.training = mode
