"""What is known of one step of two single-stage heads."""

from __future__ import annotations

from functools import cached_property

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmdistill_ext.units.dense.outputs import DenseOutputs, DenseTargets
from mmdistill_ext.units.detector_pair import Truth, ground_truth


class DenseStep:
    """One step of student and teacher, each part worked out when it is first asked for.

    Args:
        student: The student's predictions.
        teacher: The teacher's predictions.
        targets: The student's target assignment.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        student: DenseOutputs,
        teacher: DenseOutputs,
        targets: DenseTargets,
        samples: list[DetDataSample],
    ) -> None:
        self.student, self.teacher, self.targets = student, teacher, targets
        self.samples = samples

    @cached_property
    def truth(self) -> list[Truth]:
        """Boxes, classes and ignored boxes of each image."""
        return ground_truth(self.samples)

    @cached_property
    def teacher_boxes(self) -> Tensor:
        """The teacher's boxes of the positive units, ``(P, 4)``, without gradient."""
        with torch.no_grad():
            return self.teacher.decode(*self.targets.index)
