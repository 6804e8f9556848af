"""The second prediction of several detectors' boxes, its loss and the pull towards it (COL-8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.losses.boxes.box_term import BoxTerm
from mmdistill_ext.units.boxes import Boxes, overlaps
from mmdistill_ext.units.joint import JointBoxes

DISTANCES = ('iou', 'l1')


class JointBoxTerm(nn.Module):
    """Boxes of positive units: the second one is the best, or the mean by the networks' weights.

    The best is the one that overlaps the assigned box most. The second loss is 1 - GIoU to the
    assigned box, with gradient to every network that takes part; each network is pulled to the
    second box, which is constant then.

    Args:
        weight: Factor beside the classification's, >= 0.
        distance: From the second box, ``'iou'`` or ``'l1'`` (in strides); see
            :class:`~mmdistill_ext.losses.boxes.box_term.BoxTerm`.

    Raises:
        ValueError: When an argument is outside what is named above.
    """

    def __init__(self, weight: float = 1.0, distance: str = 'iou') -> None:
        super().__init__()
        check_choice('box.distance', distance, DISTANCES)
        self.pull = BoxTerm(weight, distance)

    @property
    def weight(self) -> float:
        """Factor beside the classification's."""
        return self.pull.weight

    def forward(
        self, boxes: JointBoxes, weights: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Form the sums over ``P`` positive units.

        Args:
            boxes: Of N networks.
            weights: ``(N,)`` of the networks; None: the best of each unit.

        Returns:
            The second loss and of each network its distance, scalars; 0 without positive units.
        """
        stack = torch.stack([box.float() for box in boxes.networks])
        if weights is None:
            with torch.no_grad():
                best = torch.stack([overlaps(box, boxes.target) for box in stack]).argmax(0)
            second = stack[best, torch.arange(len(best), device=best.device)]
        else:
            second = torch.einsum('n,npd->pd', weights.to(stack), stack)
        loss = (1 - overlaps(second, boxes.target, 'giou')).sum()
        every = torch.ones(len(second), dtype=torch.bool, device=second.device)
        pulls = tuple(
            self.pull(Boxes((), own, second.detach(), boxes.target, boxes.scale), every).sum()
            for own in stack
        )
        return loss, pulls
