"""The split of a mask head's own loss into simple and hard pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from mmdistill_ext.functional.fit import is_simple
from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.units.roi.mask_step import MaskStep
from mmdistill_ext.units.split.head_split import HeadSplit


class MaskSplit(HeadSplit):
    """Splits the loss by pixels of the RoIs, or by images (FIT-3, FIT-4).

    An image is simple by the share of its pixels, over all RoIs, that the teacher gets right.
    """

    step: MaskStep

    @contextmanager
    def tell_rows(self) -> Iterator[None]:
        """Every row is a RoI with its pixels."""
        self.loss.row_mask = lambda name: self.simple
        yield

    @property
    def valid(self) -> Tensor:
        """Pixels that the head's loss counts, ``(P, h, w)`` bool: all."""
        return torch.ones_like(self.step.labels, dtype=torch.bool)

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """What the teacher has right: pixels ``(P, h, w)`` or images ``(B,)``, bool."""
        labels, images = self.step.labels, self.step.images
        logits = full_precision(self.step.teacher_logits)
        if len(labels) and logits.shape[2:] != labels.shape[1:]:
            logits = nn.functional.interpolate(logits, labels.shape[1:], mode='bilinear')
        right = (logits.squeeze(1) > 0) == (labels == 1)
        if self.rule.by == 'unit':
            return right
        pixels = torch.stack((right.sum((1, 2)), self.valid.sum((1, 2))))
        right, pixels = pixels.new_zeros(2, self.images).index_add(1, images, pixels)
        return is_simple(right, pixels, self.rule.threshold)

    @cached_property
    def simple(self) -> Tensor:
        """Simple pixels, ``(P, h, w)`` bool: the right ones, or all of the right images."""
        if self.rule.by == 'unit':
            return self.right
        return self.right[self.step.images][:, None, None].expand(self.valid.shape)
