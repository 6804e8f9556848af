"""FCOS (https://arxiv.org/abs/1904.01355)."""

import torch
from mmdet.models.dense_heads import FCOSHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily, by_level
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(FCOSHead)
class FCOS(DenseFamily):
    """One point per location, distances of the sides, no weights; targets need no assigner.

    With ``norm_on_bbox`` the head predicts distances in strides while it trains, in pixels in eval
    mode.
    """

    needs_assigner = False
    row_order = 'level_first'

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

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: each level holds one image after the other; all points count."""
        labels, boxes = (by_level(torch.cat(part), levels) for part in calls[-1].output[:2])
        every = torch.ones_like(labels, dtype=torch.bool)
        return Assigned(labels, every, boxes, every)
