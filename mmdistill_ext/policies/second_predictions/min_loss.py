"""Second prediction of the network that fits the label best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdistill_ext.functional import min_loss, unit_difference
from mmdistill_ext.policies.second_predictions.base import PerUnitOrImage
from mmdistill_ext.registry import SECOND_PREDICTIONS


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class MinLoss(PerUnitOrImage):
    """The prediction with the smallest first loss (COL-3; KDCL-Naive, CVPR 2020; CN111598182A).

    ``z = z_k`` with ``k = argmin_n loss(z_n, y)``; of equal losses the first.

    Args:
        per: Choose for each ``'unit'``, or for each ``'image'`` by the mean over its valid units
            (of a large image 16,384 of them).

    Raises:
        ValueError: ``per`` is neither.
    """

    def _combine_units(self, logits: Tensor, labels: Tensor) -> Tensor:
        return min_loss(logits, labels, **self.label_spec._asdict())

    def weigh_image(self, logits: Tensor, labels: Tensor) -> Tensor:
        """1 for the network whose mean loss over the image is the smallest, 0 for the others."""
        losses = torch.stack([unit_difference(x, labels, *self.label_spec).sum() for x in logits])
        return torch.zeros_like(losses).index_fill_(0, losses.argmin(), 1)
