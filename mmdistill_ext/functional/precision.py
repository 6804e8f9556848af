"""The type that losses are formed in."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(logits: Tensor) -> Tensor:
    """The logits in the type that losses are formed in: float32, or float64 as it is."""
    return logits if logits.dtype == torch.float64 else logits.float()
