"""Per-pixel heads of segmenters: how to find one, and what it predicts."""

from __future__ import annotations

from typing import Any

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from mmdistill_ext.taps import resolve


def find_head(model: nn.Module, path: str, key: str) -> BaseDecodeHead:
    """The per-pixel head at a path; ``ValueError`` names the key."""
    head, _ = resolve(model, path, key)
    if not isinstance(head, BaseDecodeHead):
        raise ValueError(
            f"`{key}` should lead to a per-pixel head (a subclass of mmseg's BaseDecodeHead). "
            f"Found '{path}', a {type(head).__name__}."
        )
    return head


def is_sigmoid(head: BaseDecodeHead) -> bool:
    """Whether a head predicts independent sigmoids instead of one softmax."""
    return head.out_channels == 1 or any(
        getattr(loss, 'use_sigmoid', False) for loss in head_losses(head)
    )


def head_losses(head: BaseDecodeHead) -> list[Any]:
    """Loss modules of a head."""
    loss = head.loss_decode
    return list(loss) if isinstance(loss, nn.ModuleList) else [loss]


def seg_logits(output: object, path: str) -> Tensor:
    """The logits ``(B, C, H, W)`` that a head gave; ``TypeError`` if it gave something else."""
    if not isinstance(output, Tensor) or output.ndim != 4:
        raise TypeError(
            f"The head at '{path}' should give one tensor of logits (B, C, H, W). "
            f'Found {type(output).__name__}; name another head.'
        )
    return output
