"""What the pairs of all detectors have in common."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from mmdistill_ext.isolation import training_flags
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import FusedCrossEntropy, SplitRule, Units
from mmdistill_ext.units.padding import pad_semantic_labels
from mmdistill_ext.units.pair import HeadPair
from mmdistill_ext.units.split.head_split import HeadSplit
from mmdistill_ext.units.split.own_loss import check_loss_modules, total_loss

IGNORED = -1
"""Label of units that take no part in the student's loss."""
FEATURES_INSTEAD = (
    "A loss of features, such as `dict(type='FeatureLoss', tap='neck')`, takes any head."
)
"""What works for heads that cannot be paired: the end of an error."""


class DetectorPair(HeadPair):
    """Pairs a head of a detecting student with one of the teacher (SEL-7).

    A subclass says what is known of a step (:meth:`step`), how units are built from it
    (:meth:`build`), and how the head's own loss is split (:attr:`split_class`).
    """

    ignore_index = IGNORED
    background = True
    splits_own = True
    is_detection = True

    split_class: ClassVar[type[HeadSplit]]
    """Splits the head's own loss, with ``(step, rule, head, heads)``."""
    training_parts: ClassVar[tuple[str, ...]] = (
        'bbox_head',
        'rpn_head',
        'roi_head',
        'mask_head',
        'decoder',
    )
    """Names of the modules that compute differently while they train, besides the detector."""

    @property
    def box_distances(self) -> tuple[str, ...]:
        """``'iou'`` and ``'l1'``, of heads that predict no distribution."""
        return ('iou', 'l1')

    @property
    def label_kinds(self) -> str:
        """The boxes alone."""
        return 'boxes'

    @property
    def num_classes(self) -> int:
        """Number of label classes, background not counted."""
        return self.head.num_classes

    @property
    def data_classes(self) -> int:
        """Number of classes of the data set."""
        return self.num_classes

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels, given those of the data's classes: background is the last."""
        return (*classes, 'background')

    def fused_loss(self, key: str) -> FusedCrossEntropy | None:
        """None, because a detector's head forms its own loss, which ``fit`` can split (FIT-4).

        Raises:
            ValueError: On ``fuse_task_loss``; on loss modules that cannot be split.
        """
        if key != 'fit':
            raise ValueError(
                f'`{key}` needs a head whose loss is one softmax CrossEntropyLoss, as segmenters '
                f'have. Found {type(self.head).__name__}: leave it out.'
            )
        check_loss_modules(self.head, key)
        return None

    @abstractmethod
    def step(self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]) -> Any:
        """What is known of one step, each part worked out when it is first asked for.

        Args:
            taps: Calls of :attr:`student_taps`; with a split they are recorded later.
            teacher_call: Call of :attr:`teacher_tap`.
            data_samples: The batch's data samples; kept as ``step.samples``.
        """

    @abstractmethod
    def build(self, step: Any) -> Units:
        """The units of one step, without the fields that a split sets.

        Args:
            step: What :meth:`step` gave, once the student's calls have been recorded.
        """

    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list[DetDataSample],
        split: SplitRule | None = None,
        own: HeadSplit | None = None,
    ) -> Units:
        """Build the units of one step (SEL-1)."""
        if own is not None and own.heads == self.heads:  # not another head of the teacher
            step = own.step
        else:
            step = self.step(taps, teacher_call, data_samples)
        units = self.build(step)
        if own is None:
            return dataclasses.replace(units, split=split)
        result = own.result(self.own_losses(taps[self.student_tap]))
        return dataclasses.replace(units, split=split, simple=own.simple, own=result)

    @contextmanager
    def split_own(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample], split: SplitRule
    ) -> Iterator[HeadSplit]:
        """Split the head's own loss while the head forms it (FIT-4)."""
        step = self.step(taps, teacher_call, data_samples)
        head = taps.owner(self.student_tap)  # of the model that is trained, perhaps a copy
        with self.split_class(step, split, head, self.heads)() as own:
            yield own

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has the boxes that :meth:`gt_loss` needs."""
        return 'bboxes' in sample['data_samples'].get('gt_instances', {})

    @torch.no_grad()
    def gt_loss(
        self, student: BaseDetector, batch: dict, fused: FusedCrossEntropy | None = None
    ) -> Tensor:
        """The head's own loss on a batch of a loader (FIT-1).

        Layers stay in the student's present mode, such as eval; only the student and its heads
        themselves (:attr:`training_parts`) compute as in training, as their losses expect (FCOS's
        strides, DINO's denoising).

        Args:
            student: The student.
            batch: What the loader gives, its labels in the coordinates of its images.
            fused: Not used.

        Returns:
            ``(2,)``: the loss times the number of images, and that number.
        """
        batch = student.data_preprocessor(batch, False)
        pad_semantic_labels(student.data_preprocessor, batch['data_samples'])
        images = len(batch['data_samples'])
        parts = (m for n, m in student.named_modules() if n.split('.')[-1] in self.training_parts)
        with training_flags([student, *parts]), Taps(student, dict(own=self.student_tap)) as taps:
            student.loss(batch['inputs'], batch['data_samples'])
            total = total_loss(self.own_losses(taps['own'])).float()
        return torch.stack((total * images, torch.full_like(total, images)))

    def own_losses(self, call: Call) -> Mapping[str, Tensor | list[Tensor]]:
        """The head's own losses by name, from the call of :attr:`student_tap`."""
        return {name: value for name, value in call.output.items() if 'loss' in name}


class Truth(NamedTuple):
    """What is labelled in one image."""

    boxes: Tensor  # (G, 4)
    classes: Tensor  # (G,)
    ignored: Tensor  # (I, 4), boxes such as crowds


def ground_truth(data_samples: list[DetDataSample]) -> list[Truth]:
    """What is labelled in each image."""
    truth = []
    for sample in data_samples:
        boxes = get_box_tensor(sample.gt_instances.bboxes)
        ignored = boxes[:0]
        if 'bboxes' in sample.get('ignored_instances', {}):
            ignored = get_box_tensor(sample.ignored_instances.bboxes).to(boxes)
        truth.append(Truth(boxes, sample.gt_instances.labels, ignored))
    return truth


def size_of(data_samples: list[DetDataSample]) -> tuple[int, int]:
    """Height and width of the batch, padding included."""
    return tuple(data_samples[0].metainfo['batch_input_shape'])
