"""Distillation of a detector's boxes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmdistill_ext.arguments import check_arguments
from mmdistill_ext.functional import unit_distillation, weigh_rows
from mmdistill_ext.functional.checks import check_choice, check_factor, check_temperature, given
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.boxes import FARTHEST, FARTHEST_TARGET, Boxes, overlaps, within

BOX_DISTANCES = ('iou', 'l1', 'distribution')


class BoxTerm(nn.Module):
    """Distance between the boxes of student and teacher on positive units.

    ``iou``: 1 - GIoU; a teacher's box thinner than a pixel teaches nothing. ``l1``: mean of the
    four absolute differences, in ``Boxes.scale`` (strides, sides of the RoI, sizes of the image).
    ``distribution``: ``T^2 KL`` between the distributions over the distances of a side, averaged
    over the sides, for heads that predict them (GFL; cf. LD, https://arxiv.org/abs/2102.12252).

    A unit takes no part, in any of them, when the teacher's box is not finite or absurdly far away
    (:data:`~mmdistill_ext.units.boxes.FARTHEST_TARGET`), or the student's box overflows
    (:data:`~mmdistill_ext.units.boxes.FARTHEST`).

    Args:
        weight: Factor beside the classification's, >= 0.
        distance: ``'iou'``, ``'l1'`` or ``'distribution'``.
        temperature: > 0, of ``'distribution'``.

    Raises:
        ValueError: When an argument is outside what is named above.
    """

    def __init__(
        self, weight: float = 1.0, distance: str = 'iou', temperature: float = 1.0
    ) -> None:
        super().__init__()
        check_factor('box.weight', weight)
        check_choice('box.distance', distance, BOX_DISTANCES)
        check_temperature(temperature, 'box.temperature')
        self.weight = weight
        self.distance = distance
        self.temperature = temperature

    def forward(self, boxes: Boxes, selected: Tensor) -> Tensor:
        """Distance of each positive unit.

        Args:
            boxes: Of ``P`` units.
            selected: ``(P,)`` bool.

        Returns:
            ``(P,)``; exactly 0, with gradient 0, where not selected.
        """
        selected = selected & self._usable(boxes)
        chosen = selected.unsqueeze(-1)
        if self.distance == 'distribution':
            student, teacher = (
                x.where(chosen.unsqueeze(-1), 0).movedim(-1, 1) for x in _distributions(boxes)
            )
            units = unit_distillation(student, teacher, 'kl', self.temperature).mean(-1)
        else:
            # Where nothing is selected the two are made equal: distance and gradient are 0.
            teacher = boxes.teacher.detach()
            student = boxes.student.where(chosen, teacher)
            if self.distance == 'l1':
                units = F.l1_loss(student, teacher, reduction='none').mean(-1) / boxes.scale
            else:
                units = 1 - overlaps(student, teacher, 'giou')
        return units.where(selected, 0)

    def _usable(self, boxes: Boxes) -> Tensor:
        """Units whose boxes can be compared, ``(P,)`` bool."""
        usable = within(boxes.teacher, FARTHEST_TARGET) & within(boxes.student, FARTHEST)
        if self.distance == 'iou':  # the gradient of GIoU explodes where there is no area
            sides = boxes.teacher[..., 2:] - boxes.teacher[..., :2]
            usable = usable & (sides >= 1).all(-1)
        if self.distance == 'distribution':
            for logits in _distributions(boxes):
                usable = usable & logits.detach().isfinite().flatten(1).all(1)
        return usable


def _distributions(boxes: Boxes) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher over the distances of the sides, ``(P, 4, n)`` each."""
    return (
        given(boxes.student_distribution, 'student_distribution'),
        given(boxes.teacher_distribution, 'teacher_distribution'),
    )


def build_box_term(box: dict | None) -> BoxTerm | None:
    """The term of a loss's ``box``, if it has one.

    Raises:
        ValueError: It is no dict, or one of its values is impossible.
    """
    if box is None:
        return None
    if not isinstance(box, dict):
        raise ValueError(f"`box` should be a dict such as dict(distance='iou'). Found {box!r}.")
    check_arguments(BoxTerm, box, 'box')
    return BoxTerm(**box)


def box_loss(
    term: BoxTerm, units: Units, selected: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Sum over the boxes of positive units.

    Args:
        term: The distance.
        units: With boxes.
        selected: ``(P,)`` bool.
        scale: Factor of everything.

    Returns:
        The loss, and its simple and hard part ``(2,)`` before ``F(x)`` if ``units.split`` is set.
    """
    boxes = given(units.boxes, 'boxes')
    distances = term(boxes, selected)
    if units.split is None:
        return scale * distances.sum(), None
    simple = given(units.simple, 'simple')[boxes.index]
    return weigh_rows(distances, simple, units.split.hard_weight, scale)
