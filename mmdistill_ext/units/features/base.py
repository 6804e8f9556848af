"""Features that were tapped in student and teacher, on one grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What student and teacher have at one pair of taps.

    Args:
        student: ``(B, C, h, w)``, with gradient; after the connector.
        teacher: ``(B, C, h, w)``, without gradient. The number of channels is the student's, unless
            the loss takes any (``DistillLoss.any_channels``).
        weight: ``(B, 1, h, w)`` float >= 0, how much each location counts; 0 on padding. None: all
            locations count alike.
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor | None = None

    def counted(self) -> tuple[Tensor, Tensor]:
        """Student and teacher with zeros where the weight is 0.

        What is ignored may hold anything, and a gradient of 0 times NaN is not 0.
        """
        if self.weight is None:
            return self.student, self.teacher
        ignored = self.weight <= 0
        return self.student.masked_fill(ignored, 0), self.teacher.masked_fill(ignored, 0)
