"""Sums that were differentiated while they were formed, as part of autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Pass(Protocol):
    """A pass over all blocks, which forms sums and their gradients."""

    sums: list[Tensor]
    gradients: Sequence[Sequence[Tensor | None] | None]
    """Gradients of each sum with respect to each leaf; None where there is no gradient."""

    def run(self) -> None:
        """Go over all blocks; leaves ``sums`` and ``gradients``."""


class PassSums(torch.autograd.Function):
    """Runs a pass; the gradients, formed in it, are scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, block_pass: Pass, *leaves: Tensor) -> tuple[Tensor, ...]:
        """Run the pass; give its sums."""
        block_pass.run()
        ctx.gradients, block_pass.gradients = block_pass.gradients, ()
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        ctx.set_materialize_grads(False)
        return tuple(block_pass.sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *scales: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale the gradients and add them up."""
        if ctx.gradients is None:
            raise RuntimeError(
                'The gradients of this block-wise pass were used up by an earlier backward pass. '
                'Call that one with retain_graph=True.'
            )
        # Without another backward pass to come, the memory of the gradients becomes the result.
        keep = _graph_is_kept()
        totals: list[Tensor | None] = [None] * len(ctx.dtypes)
        for gradients, scale in zip(ctx.gradients, scales, strict=True):
            if gradients is None or scale is None:
                continue
            for place, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                total = totals[place]
                if total is None:
                    totals[place] = gradient * scale if keep else gradient.mul_(scale)
                else:
                    total.addcmul_(gradient, scale)
        if not keep:
            ctx.gradients = None
        pairs = zip(totals, ctx.dtypes, strict=True)
        return None, *(None if total is None else total.to(dtype) for total, dtype in pairs)


def _graph_is_kept() -> bool:
    """Whether the running backward pass has ``retain_graph=True``; if unknown, True."""
    known = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', None)
    return True if known is None else known()
