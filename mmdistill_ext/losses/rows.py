"""Losses of rows, split into simple and hard ones (FIT-4, FIT-5)."""

from __future__ import annotations

import torch
from torch import Tensor


def weigh_rows(
    rows: Tensor, simple: Tensor, hard_weight: float, scale: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """``scale * (sum of simple rows + F(x) * sum of hard rows)``.

    Args:
        rows: ``(n, ...)``, what each row has lost.
        simple: ``(n, ...)`` bool, the rows that count in full; its later dimensions may be missing.
        hard_weight: ``F(x)``, >= 0; with 0 hard rows are left out, whatever is in them.
        scale: Factor of everything.

    Returns:
        The loss, and ``(2,)`` its parts before ``F(x)``, without gradient.
    """
    simple = simple.reshape(*simple.shape, *[1] * (rows.ndim - simple.ndim))
    if hard_weight == 1:
        total = rows.sum()
    elif hard_weight == 0:
        total = rows.where(simple, 0).sum()
    else:
        factor = torch.where(simple, torch.ones_like(simple, dtype=rows.dtype), hard_weight)
        total = (rows * factor).sum()
    with torch.no_grad():
        parts = torch.stack((rows.where(simple, 0).sum(), rows.where(~simple, 0).sum())) * scale
    return scale * total, parts
