"""The contract of a pair: what joins a head of the student with a head of the teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import FusedCrossEntropy, SplitRule, Units
from mmdistill_ext.units.split.head_split import HeadSplit


class HeadPair(ABC):
    """Joins a head of the student with a head of the teacher, unit by unit.

    Building one checks that the heads fit each other; calling it turns what was tapped in one step
    into :class:`~mmdistill_ext.units.base.Units`. It holds no tensors and keeps nothing of a step.
    It is built with ``(student, teacher, head, teacher_head, key)``, see
    :func:`~mmdistill_ext.units.pairing.pair_heads`; a new kind of pair is made known by
    :func:`~mmdistill_ext.units.pairing.register_pair`.

    Attributes:
        head: The student's head.
        heads: Paths of the student's and of the teacher's head.
        student_tap: Path of the student's method that forms the head's own loss.
        student_taps: Paths of all methods of the student whose calls are needed, ``student_tap``
            among them.
        teacher_tap: Path of the module or method of the teacher whose call is needed.
        prefix: What stands before the names of its losses in the log, such as ``'decode'``.
        sigmoid: The head predicts independent sigmoids instead of one softmax.
        predicts: The student predicts with this head.
    """

    head: BaseModule
    heads: tuple[str, str]
    student_tap: str
    student_taps: tuple[str, ...]
    teacher_tap: str
    prefix: str
    sigmoid: bool
    predicts: bool

    background: bool = False
    """Labels go from 0 to C, and the last of them is background."""
    splits_own: ClassVar[bool] = False
    """The head's own loss is split while the head forms it, by :meth:`split_own`; otherwise a loss
    with ``forms_own_loss`` has to form it."""
    teacher_training: tuple[str, ...] = ()
    """Paths of modules of the teacher that compute as in training while it runs, but none of their
    layers: in eval mode they give no logits."""
    is_detection: ClassVar[bool] = False
    """Units belong to objects: losses are averaged over the positive ones, and labels are in pixels
    of the resized image, whereas label maps keep the size of the original."""

    @abstractmethod
    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        """Join the heads at two paths; ``ValueError`` names the key if they do not fit."""

    @classmethod
    def partner_head(cls, teacher: nn.Module, head: str) -> str:
        """Path of the teacher's head for a student's, where the config names none.

        Args:
            teacher: The teacher.
            head: Path of the student's head.
        """
        return head

    @property
    def box_distances(self) -> tuple[str, ...]:
        """Distances between boxes that both heads allow: ``'iou'``, ``'l1'``, ``'distribution'``.

        None for heads without boxes.
        """
        return ()

    @property
    @abstractmethod
    def label_kinds(self) -> str:
        """What labels the student's own loss needs, for errors."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of label classes, background not counted; 2 for a binary head."""

    @property
    @abstractmethod
    def data_classes(self) -> int:
        """Number of classes of the data set."""

    @property
    @abstractmethod
    def ignore_index(self) -> int:
        """Label of units that are ignored."""

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels, given those of the data's classes."""
        return classes

    @abstractmethod
    def fused_loss(self, key: str) -> FusedCrossEntropy | None:
        """The head's own loss, if the block-wise pass can form it in place of the head.

        Args:
            key: The config key that asks for it, ``'fit'`` or ``'fuse_task_loss=True'``.

        Returns:
            None where the head forms its loss itself and :meth:`split_own` splits it.

        Raises:
            ValueError: The own loss can neither be formed by the pass nor be split.
        """

    @abstractmethod
    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list,
        split: SplitRule | None = None,
        own: HeadSplit | None = None,
    ) -> Units:
        """Build the units of one step.

        Args:
            taps: Calls of :attr:`student_taps`.
            teacher_call: Call of :attr:`teacher_tap`.
            data_samples: The batch's data samples.
            split: How losses are split into simple and hard samples; None for not at all.
            own: What :meth:`split_own` gave in this step.

        Returns:
            The units, with ``units.own`` and ``units.simple`` set if ``own`` was given.
        """

    def split_own(
        self, taps: Taps, teacher_call: Call, data_samples: list, split: SplitRule
    ) -> AbstractContextManager[HeadSplit]:
        """Split the head's own loss while the student computes it; see :attr:`splits_own`.

        Returns:
            A context manager around the student's loss, which gives what the units are built with.
        """
        raise TypeError(f'{type(self).__name__} does not split the own loss of its head.')

    @abstractmethod
    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has the labels that :meth:`gt_loss` needs."""

    @abstractmethod
    def gt_loss(
        self, student: nn.Module, batch: dict, fused: FusedCrossEntropy | None = None
    ) -> Tensor:
        """The head's own loss on a batch of a loader, in the student's present mode (FIT-1).

        Args:
            student: The student.
            batch: What the loader gives, with labels.
            fused: What :meth:`fused_loss` gave.

        Returns:
            ``(2,)``: the sum over units (or over images), and the sum of their weights.
        """
