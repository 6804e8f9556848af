"""Generalized Focal Loss (https://arxiv.org/abs/2006.04388)."""

import torch
from mmdet.models.dense_heads import GFLHead
from mmdet.structures.bbox import distance2bbox
from torch import Tensor

from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily


@DENSE_FAMILIES.register(GFLHead)
class GFL(DenseFamily):
    """One anchor per location, distributions over the distances of the sides, quality targets."""

    labels_at = 1
    targets_are_boxes = True

    @property
    def bins(self) -> int:
        """Distances 0 to ``reg_max``, in strides."""
        return self.head.reg_max + 1

    @property
    def box_channels(self) -> int:
        """One logit for each distance of each of the four sides."""
        return 4 * self.bins

    def distribution(self, predicted: Tensor) -> Tensor:
        """Logits over the distances of the sides, ``(P, 4, reg_max + 1)``."""
        return predicted.view(len(predicted), 4, self.bins)

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from the expected distances to the anchor's centre."""
        with torch.autocast(predicted.device.type, enabled=False):  # it ends in a linear layer
            distances = self.head.integral(predicted) * strides[:, None]
        return distance2bbox(self.head.anchor_center(priors), distances)
