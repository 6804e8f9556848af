"""FCOS (https://arxiv.org/abs/1904.01355)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmdet.models.dense_heads import FCOSHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily, SplitLevels
from mmdistill_ext.units.painters import Levels
from mmdistill_ext.units.split.own_loss import OwnLoss


@DENSE_FAMILIES.register(FCOSHead)
class FCOS(DenseFamily):
    """One point per location, distances of the sides, no weights; targets need no assigner.

    With ``norm_on_bbox`` the head predicts distances in strides while it trains, in pixels in eval
    mode.
    """

    needs_assigner = False

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from the distances to the point."""
        if self.head.norm_on_bbox and self.head.training:
            predicted = predicted * strides[:, None]
        return super().decode(priors, strides, predicted)

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from target distances, which are in strides in eval mode too."""
        if self.head.norm_on_bbox:
            targets = targets * strides[:, None]
        return DenseFamily.decode(self, priors, strides, targets)

    def assigned(self, calls: list[Call], levels: Levels) -> Assigned:
        """Read the targets: each level holds one image after the other; all points count."""
        labels, boxes = calls[-1].output[:2]
        labels = torch.cat([x.view(-1, n) for x, n in zip(labels, levels.sizes, strict=True)], 1)
        boxes = torch.cat([x.view(-1, n, 4) for x, n in zip(boxes, levels.sizes, strict=True)], 1)
        every = torch.ones_like(labels, dtype=torch.bool)
        return Assigned(labels, every, boxes, every)

    @contextmanager
    def tell_rows(self, own: OwnLoss, split: SplitLevels) -> Iterator[None]:
        """Tell the rows of all levels: level after level, each with one image after the other."""

        def join() -> tuple[Tensor, Tensor]:
            parts = zip(*split(), strict=True)
            simple, positive = (torch.cat([x.flatten() for x in levels]) for levels in parts)
            return simple, positive

        self.tell_joined_rows(own, join)
        yield
