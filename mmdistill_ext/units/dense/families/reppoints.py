"""RepPoints (https://arxiv.org/abs/1904.11490)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import RepPointsHead
from torch import Tensor

from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily


@DENSE_FAMILIES.register(RepPointsHead)
class RepPoints(DenseFamily):
    """One location, a set of points whose extent is the box; labels are of the refinement."""

    assigner = 'refine_assigner'
    targets_are_boxes = True
    teacher_trains = True  # in eval mode it gives boxes
    all_rows = ('loss_cls', 'loss_bbox_init', 'loss_bbox_refine')

    @property
    def box_channels(self) -> int:
        """Two coordinates of each point."""
        return 2 * self.head.num_points

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Refined points."""
        return predicted[0], predicted[2]

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` of the points, which are in strides around the location."""
        # mmdet's conversion cannot take no points at all.
        boxes = self.head.points2bbox(predicted) if len(predicted) else predicted[:, :4]
        center = priors[:, :2]
        return boxes * strides[:, None] + torch.cat((center, center), 1)
