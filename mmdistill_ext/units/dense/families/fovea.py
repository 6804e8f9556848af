"""FoveaBox (https://arxiv.org/abs/1904.03797)."""

import torch
from mmdet.models.dense_heads import FoveaHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily, by_level
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(FoveaHead)
class Fovea(DenseFamily):
    """One point per location, logarithms of the distances of the sides in the level's base edge.

    The head's target distances are in [1/16, 16] base edges, and so are the assigned boxes.
    """

    needs_assigner = False
    row_order = 'level_first'

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` around the points."""
        edges = torch.zeros_like(strides)
        for stride, edge in zip(self.strides, self.head.base_edge_list, strict=True):
            edges = edges.masked_fill(strides == stride, edge)
        low, high = (predicted.exp() * edges[:, None]).split(2, 1)
        return torch.cat((priors - low, priors + high), 1)

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` around the points."""
        return self.decode(priors, strides, targets)

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: each level holds one image after the other; all points count."""
        labels, boxes = (by_level(part, levels) for part in calls[-1].output)
        every = torch.ones_like(labels, dtype=torch.bool)
        return Assigned(labels, every, boxes, every)
