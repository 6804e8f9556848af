"""How heads of SOLO give the masks of cells of their grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmdet.models.dense_heads import DecoupledSOLOHead, SOLOHead, SOLOV2Head
from torch import Tensor, nn

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.families.yolov3 import logit_of_product


class GridMasks:
    """SOLO: every cell has a map of logits.

    Args:
        head: The head.
    """

    def __init__(self, head: Any) -> None:
        self.head = head

    def cells(self, call: Call, level: int) -> Tensor:
        """Cells of a level whose masks are trained, ``(K,)``, in the order of their targets.

        Args:
            call: The head's call that found the targets of an image.
            level: The level.
        """
        return call.output[2][level].flatten().nonzero().squeeze(1)

    def masks(self, predicted: Sequence, image: int, level: int, cells: Tensor) -> Tensor:
        """Logits of the masks of some cells, ``(K, h, w)``, in training mode.

        Args:
            predicted: What the head's ``forward`` returned in training mode.
            image: The image.
            level: The level.
            cells: The cells.
        """
        return predicted[0][level][image, cells]


class DecoupledMasks(GridMasks):
    """Decoupled SOLO: a mask is the product of one of its column and one of its row."""

    def cells(self, call: Call, level: int) -> Tensor:
        """Cells of a level that have a class, ``(K,)``."""
        labels = call.output[1][level].flatten()
        return (labels != self.head.num_classes).nonzero().squeeze(1)

    def masks(self, predicted: Sequence, image: int, level: int, cells: Tensor) -> Tensor:
        """Logits of the products, ``(K, h, w)``."""
        grid = self.head.num_grids[level]
        columns, rows = (
            full_precision(maps[level][image, places])
            for maps, places in zip(predicted, (cells % grid, cells // grid), strict=False)
        )
        return logit_of_product(columns, rows)


class FilterMasks(GridMasks):
    """SOLOv2: a cell has the filters for the features of the image."""

    def cells(self, call: Call, level: int) -> Tensor:
        """Cells of a level whose masks are trained, ``(K,)``, one for each target."""
        labels = call.output[1][level]
        return labels.new_tensor(call.output[3][level])

    def masks(self, predicted: Sequence, image: int, level: int, cells: Tensor) -> Tensor:
        """Logits of the filtered features, ``(K, h, w)``."""
        size = self.head.dynamic_conv_size
        features = predicted[2][image]
        filters = predicted[0][level][image].flatten(1)[:, cells].t()
        filters = filters.reshape(len(cells), len(features), size, size)
        return F.conv2d(features[None], filters)[0]


KINDS: dict[type[nn.Module], type[GridMasks]] = {
    SOLOHead: GridMasks,
    DecoupledSOLOHead: DecoupledMasks,
    SOLOV2Head: FilterMasks,
}
"""Class of the head -> how it gives masks; that of the nearest base class counts."""


def grid_masks(head: nn.Module) -> GridMasks:
    """How a head of SOLO gives masks."""
    return next(KINDS[base](head) for base in type(head).__mro__ if base in KINDS)
