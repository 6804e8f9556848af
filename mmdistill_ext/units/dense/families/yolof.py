"""YOLOF (https://arxiv.org/abs/2103.09460)."""

import torch
from mmdet.models.dense_heads import YOLOFHead

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(YOLOFHead)
class YOLOF(DenseFamily):
    """One level, several anchors per location; the scores contain an objectness.

    The head trains boxes of more anchors than those that it labels: those nearest to an object,
    whether another object claims them or not. Units with a box are the labelled ones, once each.
    """

    targets = '_get_targets_single'
    targets_are_boxes = True
    unsplit = 'this one trains the boxes of other anchors than those that it labels'

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: one call per image."""
        labels = torch.stack([call.output[0] for call in calls])
        valid = torch.stack([call.output[1] for call in calls]) > 0
        boxes = torch.cat([call.output[4].pos_gt_bboxes for call in calls])
        targets = boxes.new_zeros(*labels.shape, 4)
        targets[labels < self.num_classes] = boxes
        return Assigned(labels, valid, targets, valid)
