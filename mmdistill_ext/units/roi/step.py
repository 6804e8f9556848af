"""What is known of one step of two box heads."""

from __future__ import annotations

from functools import cached_property

import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdistill_ext.functional.precision import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.detector_pair import IGNORED, Truth, ground_truth
from mmdistill_ext.units.roi.head import RoIHead


class RoIStep:
    """One step of two box heads, each part worked out when it is first asked for.

    ``n`` RoIs lie one image after the other; units are ``(B, N)``, ``N`` the most RoIs of any
    image; ``P`` of the RoIs are positive, that is they have an object.

    Args:
        student: The student's head.
        teacher: The teacher's head.
        taps: Calls of the student's head.
        teacher_call: Call of the teacher's ``extract_feat``.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        student: RoIHead,
        teacher: RoIHead,
        taps: Taps,
        teacher_call: Call,
        samples: list[DetDataSample],
    ) -> None:
        self.student, self.teacher, self.taps = student, teacher, taps
        self.features, self.samples = teacher_call.output, samples

    @cached_property
    def truth(self) -> list[Truth]:
        """Boxes, classes and ignored boxes of each image."""
        return ground_truth(self.samples)

    @cached_property
    def student_call(self) -> dict:
        """Arguments of the student's ``loss_and_target``."""
        return self.taps[self.student.loss_tap].kwargs

    @cached_property
    def counts(self) -> list[int]:
        """Number of RoIs of each image."""
        return [len(result.priors) for result in self.student_call['sampling_results']]

    @cached_property
    def teacher_outputs(self) -> dict[str, Tensor]:
        """The teacher's scores ``(n, C + 1)`` and box predictions for the student's RoIs."""
        return self.teacher.run('_bbox_forward', self.features, self.student_call['rois'])

    @property
    def has_targets(self) -> bool:
        """Whether the student has sampled its RoIs; to choose them OHEM forms losses before."""
        return bool(self.taps.all(self.student.targets_tap))

    @cached_property
    def flat_labels(self) -> Tensor:
        """Class of each RoI, ``(n,)``, the number of classes for background."""
        return self.taps[self.student.targets_tap].output[0]

    @cached_property
    def labels(self) -> Tensor:
        """Class of each unit, ``(B, N)``, ignored where the student's loss has no weight."""
        valid = self.taps[self.student.targets_tap].output[1] > 0
        return self.pad(self.flat_labels.where(valid, IGNORED), IGNORED)

    @cached_property
    def positive(self) -> Tensor:
        """Indices of the positive RoIs, ``(P,)``."""
        labels = self.flat_labels
        return ((labels >= 0) & (labels < self.student.head.num_classes)).nonzero().squeeze(1)

    @cached_property
    def classes(self) -> Tensor:
        """Classes of the positive RoIs, ``(P,)``."""
        return self.flat_labels[self.positive]

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and unit of the positive RoIs, two of ``(P,)``."""
        return self.place(self.positive)

    @cached_property
    def target_boxes(self) -> Tensor:
        """Assigned boxes of the positive RoIs, ``(P, 4)``."""
        results = self.student_call['sampling_results']
        return torch.cat([get_box_tensor(result.pos_gt_bboxes) for result in results])

    @cached_property
    def scale(self) -> Tensor:
        """Side of the positive RoIs in pixels, ``(P,)``."""
        rois = self.student_call['rois'][self.positive, 1:]
        return (rois[:, 2:] - rois[:, :2]).clamp(min=1).prod(1).sqrt()

    @property
    def student_boxes(self) -> Tensor:
        """The student's boxes of the positive RoIs, for their classes, ``(P, 4)``."""
        predicted = self.student_call['bbox_pred']
        return self.decode(self.student, predicted, self.positive, self.classes)

    @cached_property
    def teacher_boxes(self) -> Tensor:
        """The teacher's boxes of the positive RoIs, for their classes, ``(P, 4)``."""
        predicted = self.teacher_outputs['bbox_pred']
        return self.decode(self.teacher, predicted, self.positive, self.classes)

    def place(self, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Image and unit of RoIs ``(K,)``."""
        images = self.student_call['rois'][rois, 0].long()
        starts = images.new_tensor([0, *self.counts]).cumsum(0)
        return images, rois - starts[images]

    def pad(self, flat: Tensor, value: float = 0) -> Tensor:
        """RoIs ``(n, ...)`` -> units ``(B, N, ...)``."""
        return pad_sequence(flat.split(self.counts), batch_first=True, padding_value=value)

    def decode(self, side: RoIHead, predicted: Tensor, rois: Tensor, classes: Tensor) -> Tensor:
        """Boxes ``(K, 4)`` that a head predicts for RoIs ``(K,)`` of classes ``(K,)``."""
        head = side.head
        if head.reg_class_agnostic:
            deltas = predicted[rois]
        else:
            deltas = predicted.unflatten(1, (head.num_classes, -1))[rois, classes]
        # In full precision under AMP too: in half precision boxes are off by pixels.
        priors = full_precision(self.student_call['rois'][rois, 1:])
        return get_box_tensor(head.bbox_coder.decode(priors, full_precision(deltas)))
