"""RepPoints (https://arxiv.org/abs/1904.11490)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import RepPointsHead
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily


@DENSE_FAMILIES.register(RepPointsHead)
class RepPoints(DenseFamily):
    """One location, a set of points whose extent is the box; labels are of the refinement."""

    assigner = 'refine_assigner'
    targets_are_boxes = True
    all_rows = ('loss_cls', 'loss_bbox_init', 'loss_bbox_refine')

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Boxes in strides around the location: of the refined points while the head trains."""
        if len(predicted) == 2:
            return predicted
        boxes = [self.head.points2bbox(full_precision(points)) for points in predicted[2]]
        return predicted[0], boxes

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from boxes in strides around the location."""
        center = priors[:, :2]
        return predicted * strides[:, None] + torch.cat((center, center), 1)
