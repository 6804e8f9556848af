"""VarifocalNet (https://arxiv.org/abs/2008.13367)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import VFNetHead
from mmengine.model import BaseModule
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily, by_level
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(VFNetHead)
class VFNet(DenseFamily):
    """One point per location, distances of the sides in pixels, quality targets.

    Boxes are the refined ones. The varifocal loss counts all points, also those outside the image.
    """

    row_order = 'level_first'

    def __init__(self, head: BaseModule) -> None:
        super().__init__(head)
        self.needs_assigner = head.use_atss  # the other assignment is FCOS's

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Refined boxes, which come third while the head trains, second in eval mode."""
        return (predicted[0], predicted[2] if len(predicted) > 2 else predicted[1])

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: each level holds one image after the other."""
        labels, weights, boxes, _ = calls[-1].output
        labels, boxes = (by_level(torch.cat(part), levels) for part in (labels, boxes))
        counted = torch.ones_like(labels, dtype=torch.bool)
        if not self.head.use_vfl and weights is not None:
            counted = by_level(weights, levels) > 0
        return Assigned(labels, counted, boxes, counted)

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from target distances."""
        return self.decode(priors, strides, targets)
