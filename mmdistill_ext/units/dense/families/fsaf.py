"""FSAF (https://arxiv.org/abs/1903.00621)."""

import torch
from mmdet.models.dense_heads import FSAFHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(FSAFHead)
class FSAF(DenseFamily):
    """One anchor per location, distances of the sides; each object is learned on its best level.

    Ignored are units with a class that is not trained: units of an object on another level, and
    background in the outer region of an object.
    """

    loss_methods = (*DenseFamily.loss_methods, 'reweight_loss_single')
    targets = 'reweight_loss_single'
    more_targets = ('get_targets',)
    unsplit = 'it chooses the level of an object by the losses of all its units'

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from distances; as in the head's loss they are never quite empty."""
        return super().decode(priors, strides, predicted.clamp(min=1e-4))

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: one call per level tells which units remain positive."""
        labels, weights, boxes = more[0][-1].output[:3]
        weights, boxes = torch.cat(weights, 1), torch.cat(boxes, 1)
        images = len(weights)
        labels = torch.cat([level.reshape(images, -1) for level in labels], 1)
        kept = torch.cat([call.output[2].view(images, -1) for call in calls], 1)
        elsewhere = (labels < self.num_classes) & ~kept
        labels = labels.where(kept, self.num_classes)
        classified = kept | (weights > 0).all(-1) & ~elsewhere
        return Assigned(labels, (weights > 0).any(-1), boxes, classified)
