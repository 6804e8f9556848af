"""YOLOX (https://arxiv.org/abs/2107.08430)."""

from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import YOLOXHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(YOLOXHead)
class YOLOX(DenseFamily):
    """One point per location, centre and log size; only positive points have a class.

    An objectness, which every point has, tells objects from background.
    """

    targets = '_get_targets_single'
    targets_are_boxes = True
    knows_background = False
    all_rows = ('loss_obj',)
    row_order = 'image_first'

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)``, decoded by the head."""
        points = torch.cat((priors[:, :2], strides[:, None].expand(-1, 2)), 1)
        return self.head._bbox_decode(points, predicted[None])[0]

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: one call per image, with classes and boxes of its positive points."""
        positive = torch.stack([call.output[0] for call in calls])
        classes, boxes = (torch.cat([call.output[place] for call in calls]) for place in (1, 3))
        labels = positive.new_full(positive.shape, self.head.num_classes, dtype=torch.long)
        labels[positive] = classes.argmax(1)
        targets = boxes.new_zeros(*positive.shape, 4)
        targets[positive] = boxes
        # Class targets are multiplied by the IoU: one that is 0 everywhere names no class.
        classified = positive.index_put((positive,), classes.sum(1) > 0)
        return Assigned(labels, torch.ones_like(positive), targets, classified)

    def confidence(self, outputs: Sequence[Sequence[Tensor]], scores: Tensor) -> Tensor:
        """Class score times objectness, ``(B, N, C)``: a class alone means nothing elsewhere."""
        return super().confidence(outputs, scores) * self.flatten(outputs[2], 1).sigmoid()
