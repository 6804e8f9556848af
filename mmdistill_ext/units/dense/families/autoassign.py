"""AutoAssign (https://arxiv.org/abs/2007.03496)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import AutoAssignHead

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.families.bags import assign_bags
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(AutoAssignHead)
class AutoAssign(DenseFamily):
    """One point per location, distances of the sides in pixels; assignment by learned weights.

    The score of a class is that of the class times the objectness, as in the head's loss. All
    points in an object have a weight in its positive loss. Positive are those with at least half
    of the object's largest weight; the others are background, as the negative loss has them.
    """

    loss_methods = (
        'get_targets',
        '_get_targets_single',
        'loss_by_feat',
        'get_pos_loss_single',
        'get_neg_loss_single',
    )
    targets = 'get_pos_loss_single'
    targets_are_boxes = True
    needs_assigner = False
    unsplit = 'it weighs the points of an object by the losses of all of them'

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Class and objectness in one logit."""
        scores = []
        for classes, objects in zip(predicted[0], predicted[2], strict=True):
            log = F.logsigmoid(full_precision(classes)) + F.logsigmoid(full_precision(objects))
            log = log.clamp(max=-1e-6)
            scores.append(log - torch.log(-torch.expm1(log)))
        return scores, predicted[1]

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Choose positive points: one call per image, with its scores, losses and center prior."""
        labels, boxes = [], []
        for call in calls:
            scores, objects, losses, truth, center = call.args
            joint = (scores * objects)[:, truth.labels] * torch.exp(-losses)
            weights = torch.exp(3 * joint) * center
            found = assign_bags(weights, truth.labels, truth.bboxes, self.num_classes)
            labels.append(found[0])
            boxes.append(found[1])
        every = torch.ones_like(torch.stack(labels), dtype=torch.bool)
        return Assigned(torch.stack(labels), every, torch.stack(boxes), every)
