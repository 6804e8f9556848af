"""The split of a head's own loss into that of simple and that of hard units (FIT-3, FIT-4)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from mmdistill_ext.units.base import SplitResult, SplitRule
from mmdistill_ext.units.split.own_loss import OwnLoss


class HeadSplit:
    """Decided once the head knows its targets, while it forms its loss.

    Args:
        head: The head.
        split: How to split.
        images: Number of images.

    Attributes:
        loss: Takes part in the head's loss.
        pairing: What is known of the step. Of subclasses.
        right: ``(B, ...)``, or by image ``(B,)``: what the teacher has right. Of subclasses.
        valid: ``(B, ...)``, units that count. Of subclasses.
    """

    pairing: object
    right: Tensor
    valid: Tensor

    def __init__(self, head: nn.Module, split: SplitRule, images: int) -> None:
        self.split, self.images = split, images
        self.loss = OwnLoss(head, split.hard_weight)

    @cached_property
    def simple(self) -> Tensor:
        """``(B, ...)`` bool."""
        if self.split.by == 'unit':
            return self.right
        return self.right.view(-1, *[1] * (self.valid.ndim - 1)).expand(self.valid.shape)

    def result(self, losses: Mapping[str, Tensor | list[Tensor]]) -> SplitResult:
        """What came out, given the head's losses."""
        of = self.valid if self.split.by == 'unit' else torch.ones_like(self.right)
        samples = torch.stack((self.right.sum(), of.sum()))
        return SplitResult(samples, self.loss.parts(losses), self.images)
