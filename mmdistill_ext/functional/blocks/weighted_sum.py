"""The weighted sum of a loss over all blocks, with its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.readers import LogitsReader, Reading


class WeightedSum:
    """``sum_u w_u f(x_u)`` over simple and over hard units, and its gradient.

    The loss of a block is differentiated by autograd with respect to the block's logits, so every
    loss has one formula. The gradient is that of ``simple + hard_weight * hard``, not yet
    normalised.

    Args:
        reader: How the logits ``x`` are read.
        rows: Number of rows of units.
        hard_weight: Weight of hard units, >= 0.
        differentiate: Form the gradient.

    Attributes:
        parts: ``(rows, 2)``, the sums over simple and over hard units.
    """

    def __init__(
        self,
        reader: LogitsReader,
        rows: int,
        hard_weight: float,
        differentiate: bool,
    ) -> None:
        self.reader, self.hard_weight = reader, hard_weight
        self.parts = torch.zeros((rows, 2), dtype=reader.dtype, device=reader.device)
        # With F(x) = 1 the sum is formed as it is without a split, to the last bit (FIT-6).
        self._whole = torch.zeros_like(self.parts) if hard_weight == 1 else None
        self._gradient = reader.new_gradient() if differentiate else None

    def add(
        self,
        row: int,
        reading: Reading,
        loss: Callable[[Tensor], Tensor],
        weight: Tensor,
        simple: Tensor | None,
    ) -> None:
        """Add one block.

        Args:
            row: Row of units that the block is of.
            reading: Logits of the block.
            loss: Logits ``(1, C, n)`` -> ``(1, n)``.
            weight: ``(1, n)``, >= 0. Units of weight 0 are left out of sum and gradient, whatever
                their logits (0 times NaN is NaN).
            simple: ``(1, n)`` bool; None: all units are.
        """
        differentiate = self._gradient is not None
        with torch.set_grad_enabled(differentiate):
            logits = reading.values.detach().requires_grad_(differentiate)
            attached = loss(logits)
        units = (attached.detach() * weight).masked_fill_(weight == 0, 0)
        if differentiate:
            if simple is not None:
                weight = torch.where(simple, weight, weight * self.hard_weight)
            upstream = gradient_of_units(attached, logits, weight)
            self.reader.add_gradient(self._gradient, reading, upstream)
        if simple is None or self._whole is not None:
            whole = units.sum()
            if self._whole is not None:
                self._whole[row, 0] += whole
        if simple is None:
            self.parts[row, 0] += whole
        else:
            parts = (units.where(simple, 0).sum(), units.where(~simple, 0).sum())
            self.parts[row] += torch.stack(parts)

    def harden(self, hard: Tensor) -> None:
        """Move what was summed up of hard images, ``(rows,)`` bool, into the second part."""
        self.parts.copy_(torch.where(hard.unsqueeze(1), self.parts.flip(1), self.parts))
        gradient = self._gradient
        if self.hard_weight == 1 or gradient is None:
            return
        hard = hard.view(-1, *[1] * (gradient.ndim - 1))
        if self.hard_weight:
            one = gradient.new_ones(())
            gradient.mul_(torch.where(hard, one * self.hard_weight, one))
        else:
            gradient.masked_fill_(hard, 0)

    @property
    def total(self) -> Tensor:
        """``simple + hard_weight * hard``; a part of weight 0 is left out, whatever is in it."""
        if self._whole is not None:
            return self._whole.sum(0)[0]
        simple, hard = self.parts.sum(0)
        return simple + self.hard_weight * hard if self.hard_weight else simple

    @property
    def gradient(self) -> list[Tensor] | None:
        """Gradient of the total with respect to each leaf of the logits."""
        return None if self._gradient is None else self.reader.in_shape(self._gradient)


def gradient_of_units(units: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """Gradient of ``sum(weight * units)``; of units of weight 0 it is 0, whatever their logits.

    Args:
        units: ``(..., n)``, losses of units, in a graph.
        logits: ``(..., C, n)``, what they were formed from.
        weight: ``(..., n)``, >= 0.

    Returns:
        ``(..., C, n)``.
    """
    (upstream,) = torch.autograd.grad(units, logits, weight.expand_as(units))
    return clear_ignored_(upstream, units.detach(), weight)


def clear_ignored_(upstream: Tensor, units: Tensor, weight: Tensor) -> Tensor:
    """Set a gradient to 0 on units of weight 0, and to NaN on others whose loss is not finite.

    Args:
        upstream: ``(..., C, n)``, changed in place.
        units: ``(..., n)``, losses of units.
        weight: ``(..., n)``, >= 0.

    Returns:
        ``upstream``.
    """
    # `units * 0 + 1` is 1 where the loss is finite and NaN where it is not. Clearing all NaN and
    # multiplying by it keeps NaN exactly on units that count, without a mask of (C, n).
    factor = (units * 0 + 1).masked_fill_(weight == 0, 0)
    upstream.nan_to_num_(nan=0, posinf=torch.inf, neginf=-torch.inf)
    return upstream.mul_(factor.unsqueeze(-2))
