"""Units of two-stage detectors: proposals that the student sampled (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmdistill_ext.functional.logits.selective import full_precision
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import SplitRule, Units
from mmdistill_ext.units.boxes import Boxes, overlaps
from mmdistill_ext.units.detector_pair import IGNORED, ground_truth, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.roi.head import RoIHead, RoIHeadPair
from mmdistill_ext.units.split.correctness import correct_images, correct_units
from mmdistill_ext.units.split.head_split import HeadSplit

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample


class RoIPair(RoIHeadPair):
    """Pairs box heads on the proposals that the student sampled for its own loss.

    The teacher's RoI head looks at the same boxes in the teacher's features. Images with fewer
    samples than others are filled up with ignored units.
    """

    kind = BBoxHead
    output = 'loss_bbox'
    sigmoid = False

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        super().__init__(student, teacher, head, teacher_head, key)
        self.predicts = self.student.is_last
        for side, found in (('student', self.student.head), ('teacher', self.teacher.head)):
            loss = found.loss_cls
            if getattr(loss, 'use_sigmoid', False) or found.custom_cls_channels:
                raise ValueError(
                    f"The {side}'s box head should have one softmax over classes and background "
                    f'(`{key}`). Found {type(loss).__name__}.'
                )
            if not (found.with_cls and found.with_reg):
                raise ValueError(
                    f"The {side}'s box head should predict classes and boxes (`{key}`). Found "
                    f'with_cls={found.with_cls}, with_reg={found.with_reg}.'
                )

    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list[DetDataSample],
        split: SplitRule | None = None,
        own: RoISplit | None = None,
    ) -> Units:
        """Build the units of one step from the tapped calls."""
        found = self.known(own) or RoIStep(self, taps, teacher_call)
        call = found.call
        boxes = found.boxes(self.student, call['bbox_pred'], found.positive, found.classes)
        return Units(
            student=found.pad(call['cls_score']).transpose(1, 2),
            teacher=found.pad(found.teacher['cls_score']).transpose(1, 2),
            labels=found.labels,
            ignore_index=IGNORED,
            sigmoid=False,
            boxes=Boxes(
                index=found.index,
                student=boxes,
                teacher=found.teacher_boxes,
                target=found.target_boxes,
                scale=found.scale,
            ),
            paint=BoxRegions(
                size_of(data_samples), len(data_samples), found.index, found.target_boxes
            ),
            split=split,
            simple=own.simple if own else None,
            own=own.result(self.own_losses(taps[self.student_tap])) if own else None,
        )

    @contextmanager
    def split_own(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample], split: SplitRule
    ) -> Iterator[RoISplit]:
        """Take part in the head's own loss; gives what the units are to be built with."""
        pairing = RoIStep(self, taps, teacher_call)
        own = RoISplit(pairing, ground_truth(data_samples), split)
        with own.loss():
            yield own


class RoIStep:
    """What is known of one step, worked out when it is first asked for.

    ``n`` RoIs lie one image after the other; units are ``(B, N)``, ``N`` the most of any image.
    """

    def __init__(self, pair: RoIPair, taps: Taps, teacher_call: Call) -> None:
        self.pair, self.taps, self.features = pair, taps, teacher_call.output

    @cached_property
    def call(self) -> dict:
        """What the student's head was called with."""
        return self.taps[self.pair.student_tap].kwargs

    @cached_property
    def counts(self) -> list[int]:
        """RoIs of each image."""
        return [len(result.priors) for result in self.call['sampling_results']]

    @cached_property
    def teacher(self) -> dict[str, Tensor]:
        """The teacher's scores ``(n, C + 1)`` and box predictions."""
        return self.pair.teacher.run('_bbox_forward', self.features, self.call['rois'])

    @cached_property
    def flat_labels(self) -> Tensor:
        """``(n,)``, the number of classes for background."""
        return self.taps[self.pair.targets_tap].output[0]

    @cached_property
    def labels(self) -> Tensor:
        """``(B, N)``."""
        valid = self.taps[self.pair.targets_tap].output[1] > 0
        return self.pad(self.flat_labels.where(valid, IGNORED), IGNORED)

    @cached_property
    def positive(self) -> Tensor:
        """The RoIs of an object, ``(P,)``."""
        labels = self.flat_labels
        return ((labels >= 0) & (labels < self.pair.num_classes)).nonzero().squeeze(1)

    @cached_property
    def classes(self) -> Tensor:
        """Of these, ``(P,)``."""
        return self.flat_labels[self.positive]

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Image and unit of these."""
        return self.place(self.positive)

    @cached_property
    def target_boxes(self) -> Tensor:
        """Of these, ``(P, 4)``."""
        results = self.call['sampling_results']
        return torch.cat([get_box_tensor(result.pos_gt_bboxes) for result in results])

    @cached_property
    def scale(self) -> Tensor:
        """Side of the RoI in pixels, ``(P,)``."""
        rois = self.call['rois'][self.positive, 1:]
        return (rois[:, 2:] - rois[:, :2]).clamp(min=1).prod(1).sqrt()

    @cached_property
    def teacher_boxes(self) -> Tensor:
        """The teacher's boxes of the positive RoIs, of the assigned classes, ``(P, 4)``."""
        predicted = self.teacher['bbox_pred']
        return self.boxes(self.pair.teacher, predicted, self.positive, self.classes)

    def place(self, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Image and unit of RoIs ``(K,)``."""
        images = self.call['rois'][rois, 0].long()
        starts = images.new_tensor([0, *self.counts]).cumsum(0)
        return images, rois - starts[images]

    def pad(self, flat: Tensor, value: float = 0) -> Tensor:
        """``(n, ...)`` -> ``(B, N, ...)``."""
        return pad_sequence(flat.split(self.counts), batch_first=True, padding_value=value)

    def boxes(self, side: RoIHead, predicted: Tensor, rois: Tensor, classes: Tensor) -> Tensor:
        """Boxes ``(K, 4)`` of RoIs ``(K,)``, for classes ``(K,)``."""
        head = side.head
        if head.reg_class_agnostic:
            deltas = predicted[rois]
        else:
            deltas = predicted.unflatten(1, (head.num_classes, -1))[rois, classes]
        # In full precision under AMP too: half of it is pixels off.
        priors = full_precision(self.call['rois'][rois, 1:])
        return get_box_tensor(head.bbox_coder.decode(priors, full_precision(deltas)))


class RoISplit(HeadSplit):
    """The split of a box head's own loss."""

    def __init__(self, pairing: RoIStep, truth: list, split: SplitRule) -> None:
        super().__init__(pairing.taps.owner(pairing.pair.student_tap), split, len(truth))
        self.pairing, self.truth = pairing, truth
        self.loss.rows = self._rows

    def _rows(self, name: str) -> Tensor | None:
        found = self.pairing
        if not found.taps.all(found.pair.targets_tap):  # OHEM asks for losses to choose the RoIs by
            return None
        every = torch.arange(len(found.flat_labels), device=found.flat_labels.device)
        flat = self.simple[found.place(every)]
        return flat if name == 'loss_cls' else flat[found.positive]

    @property
    def valid(self) -> Tensor:
        """``(B, N)`` bool."""
        return self.pairing.labels != IGNORED

    @cached_property
    @torch.no_grad()
    def right(self) -> Tensor:
        """``(B, N)`` or ``(B,)``, what the teacher has right."""
        found, split = self.pairing, self.split
        scores = found.pad(full_precision(found.teacher['cls_score']).softmax(-1))
        labels, limits = found.labels, (split.iou, split.score)
        if split.by == 'unit':
            ious = overlaps(found.teacher_boxes, found.target_boxes)
            right = correct_units(
                scores, labels, found.pair.num_classes, found.index, ious, *limits
            )
            return right & self.valid
        starts = [0, *torch.tensor(found.counts).cumsum(0).tolist()]

        def boxes_of(image: int, units: Tensor, classes: Tensor) -> Tensor:
            rois = units + starts[image]
            return found.boxes(found.pair.teacher, found.teacher['bbox_pred'], rois, classes)

        scores = scores[..., : found.pair.num_classes]
        return correct_images(scores, labels, self.valid, boxes_of, self.truth, *limits)
