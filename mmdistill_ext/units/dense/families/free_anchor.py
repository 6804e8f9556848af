"""FreeAnchor (https://arxiv.org/abs/1909.02466)."""

import torch
from mmdet.models.dense_heads import FreeAnchorRetinaHead
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.families.bags import assign_bags
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(FreeAnchorRetinaHead)
class FreeAnchor(DenseFamily):
    """Several anchors per location, box deltas; each object has a bag of anchors.

    Positive are the anchors of a bag with at least half of the largest weight in its Mean-max: all
    of them at first, the best ones later. The head keeps neither the anchors of its bags nor their
    weights, so they are found again by its formulas. Ignored are other anchors whose box is rather
    an object's than background to the negative loss.
    """

    loss_methods = (
        'loss_by_feat',
        'positive_loss_single',
        'positive_bag_loss',
        'negative_bag_loss',
    )
    targets = 'positive_loss_single'
    targets_are_boxes = True
    needs_assigner = False
    unsplit = 'it weighs the anchors of an object by the losses of all of them'

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Choose positive anchors: one call per image."""
        labels, boxes, objects = [], [], []
        for call in calls:
            truth = call.args[3]
            found = assign_bags(
                self._weights(*call.args), truth.labels, truth.bboxes, self.num_classes
            )
            labels.append(found[0])
            boxes.append(found[1])
            objects.append(call.output[0].amax(1) >= 0.5)
        every = torch.ones_like(torch.stack(labels), dtype=torch.bool)
        positive = torch.stack(labels) < self.num_classes
        classified = positive | ~torch.stack(objects)
        return Assigned(torch.stack(labels), every, torch.stack(boxes), classified)

    def _weights(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, truth: InstanceData
    ) -> Tensor:
        """Weights ``(N, G)`` of anchors in the Mean-max of the objects' bags."""
        scores, deltas = full_precision(scores), full_precision(deltas)
        weights = scores.new_zeros(len(truth), len(anchors))
        if not len(truth):
            return weights.T
        head = self.head
        matched = bbox_overlaps(truth.bboxes, anchors).topk(head.pre_anchor_topk, 1)[1]
        objects = truth.bboxes[:, None].expand(*matched.shape, 4)
        targets = head.bbox_coder.encode(anchors[matched], objects)
        losses = head.loss_bbox(deltas[matched], targets, reduction_override='none').sum(-1)
        classes = truth.labels[:, None].expand_as(matched)
        matching = scores[matched, classes] * torch.exp(-losses)
        return weights.scatter(1, matched, 1 / (1 - matching).clamp(min=1e-12)).T
