"""The RoIs that a student sampled for the loss of a box head, with their labels."""

from __future__ import annotations

from functools import cached_property

import torch
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdistill_ext.taps import Taps
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.roi.family import BoxCall
from mmdistill_ext.units.roi.heads import BoxHead


class SampledRoIs:
    """RoIs of one step of a box head, each part worked out when it is first asked for.

    ``n`` RoIs lie one image after the other; units are ``(B, N)``, ``N`` the most RoIs of any
    image; ``P`` of the RoIs are positive, that is they have an object.

    Args:
        student: The head whose loss the RoIs were sampled for.
        taps: Its calls.
    """

    def __init__(self, student: BoxHead, taps: Taps) -> None:
        self.student, self.taps = student, taps

    @cached_property
    def call(self) -> BoxCall:
        """What the head predicted, and for which RoIs."""
        return self.student.family.box_call(self.taps[self.student.sampled_tap])

    @cached_property
    def counts(self) -> list[int]:
        """Number of RoIs of each image."""
        return [len(result.priors) for result in self.call.sampling_results]

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
        results = self.call.sampling_results
        return torch.cat([get_box_tensor(result.pos_gt_bboxes) for result in results])

    @cached_property
    def scale(self) -> Tensor:
        """Side of the positive RoIs in pixels, ``(P,)``."""
        rois = self.call.rois[self.positive, 1:]
        return (rois[:, 2:] - rois[:, :2]).clamp(min=1).prod(1).sqrt()

    def place(self, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Image and unit of RoIs ``(K,)``."""
        images = self.call.rois[rois, 0].long()
        starts = images.new_tensor([0, *self.counts]).cumsum(0)
        return images, rois - starts[images]

    def pad(self, flat: Tensor, value: float = 0) -> Tensor:
        """RoIs ``(n, ...)`` -> units ``(B, N, ...)``."""
        return pad_sequence(flat.split(self.counts), batch_first=True, padding_value=value)

    def logits(self, head: BoxHead, scores: Tensor) -> Tensor:
        """Scores that a head predicts for all RoIs -> logits of units ``(B, C + 1, N)``."""
        return self.pad(head.reader.logits(scores)).transpose(1, 2)

    def decode(self, head: BoxHead, predicted: object) -> Tensor:
        """Boxes that a head predicts for the positive RoIs, for their classes, ``(P, 4)``."""
        rois = self.call.rois[:, 1:]
        return head.reader.decode(rois, predicted, self.positive, self.classes)
