"""Units of MaskFormers: the queries that predict the same segment (SEL-1, SEL-7)."""

from __future__ import annotations

from mmdet.models.dense_heads import Mask2FormerHead, MaskFormerHead
from mmdet.structures import DetDataSample
from torch import nn

from mmdistill_ext.taps import Call, Taps, resolve
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.detector_pair import IGNORED, DetectorPair, size_of
from mmdistill_ext.units.painters import MaskRegions
from mmdistill_ext.units.segment.step import SegmentStep, SegmentTaps

HEADS = (MaskFormerHead, Mask2FormerHead)
"""Heads whose matching and losses are read; subclasses must not override them."""


class SegmentPair(DetectorPair):
    """Pairs the classes of queries of student and teacher that were matched to the same segment.

    The student's queries are matched by its own loss, the teacher's by its own assigner; both on
    the last decoder layer. Queries without a segment have no partner; they learn from labels alone.

    Args:
        student: The student, an mmdet MaskFormer or Mask2Former.
        teacher: The teacher, either; the number of queries may differ.
        head: Path of the student's head, ``'panoptic_head'``.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    predicts = True
    sigmoid = False
    box_distances = ()
    label_kinds = 'masks'

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        own, other = self.head_of(head), self.head_of(teacher_head)
        self.head = _find(student, own, f'{key}.head')
        self.teacher_head = _find(teacher, other, f'{key}.teacher_head')
        self._check(key)
        self.heads = head, teacher_head
        self.student_taps = self.paths = SegmentTaps.of(own)
        self.student_tap = self.paths.loss
        self.teacher_tap = other
        self.prefix = head.replace('_head', '').replace('.', '_')

    @staticmethod
    def head_of(path: str) -> str:
        """Path of the whole head."""
        return path

    def _check(self, key: str) -> None:
        for name in ('num_things_classes', 'num_stuff_classes'):
            own, other = getattr(self.head, name), getattr(self.teacher_head, name)
            if own != other:
                raise ValueError(
                    f'Student and teacher should have the same `{name}` (`{key}`). Found {own} in '
                    f"the student's {type(self.head).__name__}, {other} in the teacher's "
                    f'{type(self.teacher_head).__name__}.'
                )

    def fused_loss(self, key: str) -> None:
        """None: the head forms its own loss.

        Raises:
            ValueError: On ``fuse_task_loss``, and on ``fit``.
        """
        if key == 'fit':
            raise ValueError(
                f'`{key}` cannot split the own loss of {type(self.head).__name__}: its masks are '
                'compared at points that it draws, or in one piece. Leave it out: `SelectiveLoss` '
                'and `KDLoss` work without it.'
            )
        super().fused_loss(key)

    def has_labels(self, sample: dict) -> bool:
        """Whether a sample of a data set has the masks that the head's loss needs."""
        return 'masks' in sample['data_samples'].get('gt_instances', {})

    def step(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]
    ) -> SegmentStep:
        """What is known of one step; the student's calls may be recorded later."""
        return SegmentStep(taps, self.paths, self.teacher_head, teacher_call, data_samples)

    def build(self, step: SegmentStep) -> Units:
        """The units, one segment each (SEL-1)."""
        return Units(
            student=step.pick_scores(step.student_layer[0], step.student_queries),
            teacher=step.pick_scores(step.teacher_layer[0], step.teacher_queries),
            labels=step.labels,
            ignore_index=IGNORED,
            paint=MaskRegions(size_of(step.samples), len(step.samples), step.index, step.masks),
        )


def _find(model: nn.Module, path: str, key: str) -> MaskFormerHead:
    head, method = resolve(model, path, key)
    same = isinstance(head, MaskFormerHead) and method == 'forward'
    same = same and all(
        any(getattr(type(head), name) is getattr(base, name) for base in HEADS)
        for name in ('loss_by_feat', '_loss_by_feat_single', 'get_targets', '_get_targets_single')
    )
    if not same:
        raise ValueError(
            f'`{key}` should lead to the head of a MaskFormer or Mask2Former, or to a subclass '
            f"with their matching and loss. Found '{path}', a {type(head).__name__}. A loss of "
            "features, such as `dict(type='CWDLoss', tap='backbone')`, takes any head."
        )
    if not hasattr(head, 'assigner'):
        raise ValueError(
            f"`{key}` should lead to a head that can match queries: the model's config should have "
            f'`train_cfg.assigner`. Found none.'
        )
    return head
