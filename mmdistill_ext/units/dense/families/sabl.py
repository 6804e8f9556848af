"""SABL-RetinaNet (https://arxiv.org/abs/1912.04260)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import SABLRetinaHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(SABLRetinaHead)
class SABLRetina(DenseFamily):
    """One square per location; each side of a box is a bucket and an offset in it.

    The distance between boxes has a gradient to the offsets of the chosen buckets only: which
    bucket is right is learned from the labels.
    """

    targets = '_get_targets_single'
    targets_are_boxes = True
    all_rows = ('loss_cls', 'loss_bbox_cls', 'loss_bbox_reg')

    @property
    def prior_generator(self) -> Any:
        """Generator of the squares."""
        return self.head.square_anchor_generator

    @property
    def box_channels(self) -> int:
        """A score and an offset for each bucket of each side."""
        return 8 * self.head.side_num

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Scores and offsets of the buckets in one map."""
        return predicted[0], [torch.cat(level, 1) for level in predicted[1]]

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from the buckets."""
        buckets = [part.contiguous() for part in predicted.chunk(2, 1)]
        return self.head.bbox_coder.decode(priors, buckets)[0]

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: one call per image, boxes from what was sampled."""
        labels, weights = (torch.stack([call.output[i] for call in calls]) for i in (0, 1))
        sampled = [call.output[-1] for call in calls]
        boxes = torch.cat([x.pos_gt_bboxes[x.pos_inds.argsort()] for x in sampled])
        targets = boxes.new_zeros(*labels.shape, 4)
        targets[labels < self.num_classes] = boxes
        return Assigned(labels, weights > 0, targets, weights > 0)
