"""CenterNet of CenterNet2 (https://arxiv.org/abs/2103.07461)."""

import torch
from mmdet.models.dense_heads import CenterNetUpdateHead
from torch import Tensor

from mmdistill_ext.taps import Call
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily, by_level
from mmdistill_ext.units.painters import Levels


@DENSE_FAMILIES.register(CenterNetUpdateHead)
class CenterNetUpdate(DenseFamily):
    """One point per location, distances of the sides, in strides while it trains; heat maps.

    The class of a point is positive where the loss has it so, near the center of an object. Ignored
    are other points where the heat of a class is above a half. Boxes are compared where the head
    assigns them, which is more points.
    """

    loss_methods = ('get_targets', '_get_targets_single', 'loss_by_feat', 'add_cls_pos_inds')
    targets = 'get_targets'
    more_targets = ('add_cls_pos_inds',)
    needs_assigner = False
    unsplit = 'its loss of classes takes positive points apart'

    @property
    def sigmoid(self) -> bool:
        """Its classes are heat maps."""
        return True

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from the distances to the point."""
        if self.head.training:
            predicted = predicted * strides[:, None]
        return super().decode(priors, strides, predicted)

    def decode_targets(self, priors: Tensor, strides: Tensor, targets: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from target distances, which are in strides."""
        return DenseFamily.decode(self, priors, strides, targets * strides[:, None])

    def assigned(self, calls: list[Call], levels: Levels, *more: list[Call]) -> Assigned:
        """Read the targets: each level holds one image after the other."""
        heat, boxes = calls[-1].output
        places, classes = more[0][-1].output
        labels = torch.full((len(heat),), self.num_classes, device=heat.device)
        if places is not None:
            labels[places] = classes
        # Images without an object have the number of classes everywhere instead of 0.
        warm = ((heat > 0.5) & (heat <= 1)).any(-1) & (labels == self.num_classes)
        boxed = boxes.amax(-1) >= 0
        parts = (labels, torch.ones_like(boxed), boxes, ~warm, boxed)
        return Assigned(*(by_level(part, levels) for part in parts))
