"""TOOD (https://arxiv.org/abs/2108.07755)."""

from collections.abc import Sequence
from typing import Any

from mmdet.models.dense_heads import TOODHead
from torch import Tensor

from mmdistill_ext.units.dense.family import DENSE_FAMILIES, DenseFamily, logits_of


@DENSE_FAMILIES.register(TOODHead)
class TOOD(DenseFamily):
    """One anchor per location; the head gives scores in [0, 1] and decoded boxes in strides.

    The scores are the geometric mean of two sigmoids; units have their logits. Targets come from
    the assigner of the present epoch, first ATSS's, then the task-aligned one.
    """

    labels_at = 1
    targets_are_boxes = True
    all_rows = ('loss_cls', 'initial_loss_cls')

    def outputs(self, predicted: Sequence[Any]) -> Sequence[Any]:
        """Scores as logits."""
        return ([logits_of(level) for level in predicted[0]], *predicted[1:])

    def decode(self, priors: Tensor, strides: Tensor, predicted: Tensor) -> Tensor:
        """Boxes ``(P, 4)`` from boxes in strides."""
        return predicted * strides[:, None]
