"""The second prediction of several detectors' boxes, its loss and the pull towards it (COL-8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdistill_ext.functional.checks import check_choice
from mmdistill_ext.losses.boxes.box_term import BoxTerm
from mmdistill_ext.units.boxes import FARTHEST_TARGET, Boxes, overlaps, within
from mmdistill_ext.units.joint import JointBoxes

DISTANCES = ('iou', 'l1')


class JointBoxTerm(nn.Module):
    """Second prediction of positive units' boxes, its loss, and the pull to it (COL-4, COL-8).

    The second box is the network's that overlaps the assigned box most, or the mean by the
    networks' weights. Its loss is ``1 - GIoU`` to the assigned box, with gradient to every network
    that takes part; each network is pulled to the second box, which is constant then. A unit whose
    second box is not finite or absurdly far away takes no part.

    Args:
        weight: Factor beside the classification's, >= 0.
        distance: From the second box, ``'iou'`` or ``'l1'`` (in strides); see
            :class:`~mmdistill_ext.losses.boxes.box_term.BoxTerm`.

    Raises:
        ValueError: The weight is below 0, or there is no such distance.
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
            weights: ``(N,)`` of the networks; None: the best box of each unit.

        Returns:
            The second loss, and the distance of each network; scalars, 0 without positive units.
        """
        stack = torch.stack([box.float() for box in boxes.networks])
        second = _best(stack, boxes.target) if weights is None else _mean(stack, weights)
        every = within(second, FARTHEST_TARGET)
        loss = (1 - overlaps(second, boxes.target, 'giou')).where(every, 0).sum()
        pulls = tuple(
            self.pull(Boxes((), network, second.detach(), boxes.target, boxes.scale), every).sum()
            for network in stack
        )
        return loss, pulls


@torch.no_grad()
def _choose(stack: Tensor, target: Tensor) -> Tensor:
    """Network ``(P,)`` whose box overlaps the assigned one most."""
    return torch.stack([overlaps(boxes, target) for boxes in stack]).argmax(0)


def _best(stack: Tensor, target: Tensor) -> Tensor:
    """The box of ``(N, P, 4)`` that overlaps the assigned one most, ``(P, 4)``."""
    units = torch.arange(len(target), device=target.device)
    return stack[_choose(stack, target), units]


def _mean(stack: Tensor, weights: Tensor) -> Tensor:
    """``sum_n w_n boxes_n`` of ``(N, P, 4)``, ``(P, 4)``."""
    return torch.einsum('n,npd->pd', weights.to(stack), stack)
