"""What the units of all detectors have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import FusedCrossEntropy, SplitRule, Units
from mmdistill_ext.units.split.head_split import HeadSplit
from mmdistill_ext.units.split.own_loss import check_loss_modules, total_loss

if TYPE_CHECKING:
    from mmdet.models.detectors import BaseDetector
    from mmdet.structures import DetDataSample

IGNORED = -1
"""Label of units that take no part in the student's loss."""


class DetectorPair(ABC):
    """Pairs a head of the student with one of the teacher.

    With FIT the head's own loss is split while the head forms it (:meth:`split_own`).

    Attributes:
        head: The student's head.
        heads: Paths of the student's and the teacher's head.
        student_tap: The method of the head that forms its loss.
        student_taps: All methods of the student whose calls are needed.
        teacher_tap: Module or method of the teacher whose call is needed.
        prefix: Of the names in the log.
        sigmoid: The classes are independent.
        predicts: The student predicts with this head.
    """

    ignore_index = IGNORED
    background = True
    box_distances: tuple[str, ...] = ('iou', 'l1')
    splits_own = True
    is_detection = True
    label_kinds = 'boxes'
    head: nn.Module
    heads: tuple[str, str]
    student_tap: str

    @property
    def num_classes(self) -> int:
        """Number of label classes, background not counted."""
        return self.head.num_classes

    @property
    def data_classes(self) -> int:
        """Number of classes of the data."""
        return self.num_classes

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels, given those of the data's classes."""
        return (*classes, 'background')

    def fused_loss(self, key: str) -> FusedCrossEntropy | None:
        """None, a detector's head forms its own loss; that can be split for ``fit``.

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
    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list[DetDataSample],
        split: SplitRule | None = None,
        own: HeadSplit | None = None,
    ) -> Units:
        """Build the units of one step from the tapped calls.

        Args:
            taps: Calls of the student.
            teacher_call: That of the teacher.
            data_samples: The batch's.
            split: How the losses are split.
            own: What :meth:`split_own` gave in this step.

        Returns:
            The units, ``units.own`` and ``units.simple`` set if split.
        """

    @abstractmethod
    def split_own(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample], split: SplitRule
    ) -> AbstractContextManager[HeadSplit]:
        """Take part in the head's own loss; gives what the units are to be built with."""

    def known(self, own: HeadSplit | None) -> object | None:
        """What a split knows of the step, unless it was made with another head of the teacher."""
        return own.pairing if own is not None and own.pairing.pair is self else None

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has what :meth:`gt_loss` needs."""
        return 'bboxes' in sample['data_samples'].get('gt_instances', {})

    @torch.no_grad()
    def gt_loss(
        self, student: BaseDetector, batch: dict, fused: FusedCrossEntropy | None = None
    ) -> Tensor:
        """The head's own loss on a batch of a loader (FIT-1).

        Layers stay in the student's present mode, such as eval; only the student and its heads
        themselves compute as in training, as their losses expect (FCOS's strides, DINO's
        denoising).

        Args:
            student: The student.
            batch: What the loader gives, its labels in the coordinates of its images.
            fused: Not used.

        Returns:
            ``(2,)``: the loss times the number of images, and that number.
        """
        batch = student.data_preprocessor(batch, False)
        images = len(batch['data_samples'])
        with _computing_as_in_training(student), Taps(student, dict(own=self.student_tap)) as taps:
            student.loss(batch['inputs'], batch['data_samples'])
            total = total_loss(self.own_losses(taps['own'])).float()
        return torch.stack((total * images, torch.full_like(total, images)))

    def own_losses(self, call: Call) -> dict[str, Tensor | list[Tensor]]:
        """The head's losses, from the call of :attr:`student_tap`."""
        return {name: value for name, value in call.output.items() if 'loss' in name}


def ground_truth(data_samples: list[DetDataSample]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes ``(G, 4)``, classes ``(G,)`` and ignored boxes ``(I, 4)`` of each image."""
    found = []
    for sample in data_samples:
        boxes = get_box_tensor(sample.gt_instances.bboxes)
        ignored = boxes[:0]
        if 'bboxes' in sample.get('ignored_instances', {}):
            ignored = get_box_tensor(sample.ignored_instances.bboxes).to(boxes)
        found.append((boxes, sample.gt_instances.labels, ignored))
    return found


def size_of(data_samples: list[DetDataSample]) -> tuple[int, int]:
    """Height and width of the batch, padding included."""
    return tuple(data_samples[0].metainfo['batch_input_shape'])


@contextmanager
def _computing_as_in_training(student: nn.Module) -> Iterator[None]:
    """Detector and heads, but none of their layers, believe that they are being trained."""
    names = ('bbox_head', 'rpn_head', 'roi_head', 'mask_head')
    modules = [student, *(m for n, m in student.named_modules() if n.split('.')[-1] in names)]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = True
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode
