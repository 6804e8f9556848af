"""Guided anchoring (https://arxiv.org/abs/1901.03278)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import GARetinaHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(GARetinaHead)
class GARetina(DenseFamily):
    """One anchor per location, whose shape the head predicts; box deltas from that anchor.

    Boxes of student and teacher are decoded from anchors of their own. The distance between them
    has no gradient to the anchors' shapes, as in the head's loss.
    """

    targets_are_boxes = True
    unsplit = "it also learns the anchors' places and shapes, which are no units"

    @property
    def prior_generator(self) -> Any:
        """Generator of the squares that anchors are shaped from."""
        return self.head.square_anchor_generator

    @property
    def box_channels(self) -> int:
        """Deltas, and width and height of the anchor."""
        return 6

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Deltas and shapes in one map."""
        parts = zip(predicted[1], predicted[2], strict=True)
        return predicted[0], [torch.cat(level, 1) for level in parts]

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from deltas to the guided anchor."""
        deltas, shape = predicted.split((4, 2), 1)
        shape = torch.cat((torch.zeros_like(shape), shape.detach()), 1)
        anchors = self.head.anchor_coder.decode(priors, shape, wh_ratio_clip=1e-6)
        return self.head.bbox_coder.decode(anchors, deltas)

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets, and decode the boxes from the anchors that the student guided."""
        found = super().assigned(calls, levels)
        if self.head.reg_decoded_bbox:
            return found
        anchors = torch.stack([torch.cat(image) for image in calls[-1].args[0]])
        boxes = self.head.bbox_coder.decode(anchors, found.targets)
        return found._replace(targets=boxes)
