"""Units of DETR-like detectors: the queries that predict the same object (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Mapping

from mmdet.models.dense_heads import DeformableDETRHead, DETRHead, DINOHead
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps, resolve
from mmdistill_ext.units.base import Units
from mmdistill_ext.units.boxes import Boxes
from mmdistill_ext.units.detector_pair import IGNORED, DetectorPair, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.query.split import QuerySplit
from mmdistill_ext.units.query.step import QueryStep, QueryTaps

HEADS = (DETRHead, DeformableDETRHead, DINOHead)
"""Heads whose matching and losses are read; subclasses must not override them."""


class QueryPair(DetectorPair):
    """Pairs the queries of student and teacher that were matched to the same object.

    The student's queries are matched by its own loss, the teacher's by its own assigner; both on
    the last decoder layer. Queries without an object have no partner; they learn from labels alone.

    Args:
        student: The student, an mmdet DETR, Conditional, DAB or Deformable DETR, or DINO.
        teacher: The teacher, any of these; the number of queries may differ.
        head: Path of the student's head, ``'bbox_head'``.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    split_class = QuerySplit
    predicts = True

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.head = _find(student, head, f'{key}.head')
        self.teacher_head = _find(teacher, teacher_head, f'{key}.teacher_head')
        self.sigmoid = self.head.loss_cls.use_sigmoid
        self._check(key)
        self.heads = head, teacher_head
        self.student_taps = self.paths = QueryTaps.of(head)
        self.student_tap = self.paths.loss
        self.teacher_tap = teacher_head
        self.prefix = head.replace('_head', '')

    def _check(self, key: str) -> None:
        student, teacher = self.head, self.teacher_head
        sigmoid = 'both sigmoid or both softmax scores: DETR pairs with DETR, the others with each '
        for rule, own, other in (
            ('the same `num_classes`', student.num_classes, teacher.num_classes),
            (f'{sigmoid}other', self.sigmoid, teacher.loss_cls.use_sigmoid),
        ):
            if own != other:
                raise ValueError(
                    f'Student and teacher should have {rule} (`{key}`). Found {own} in the '
                    f"student's {type(student).__name__}, {other} in the teacher's "
                    f'{type(teacher).__name__}.'
                )

    def own_losses(self, call: Call) -> Mapping[str, Tensor | list[Tensor]]:
        """The head's own losses on matched queries by name, without those on denoising ones."""
        losses = super().own_losses(call).items()
        return {name: value for name, value in losses if 'dn_loss' not in name}

    def step(self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]) -> QueryStep:
        """What is known of one step; the student's calls may be recorded later."""
        return QueryStep(taps, self.paths, self.teacher_head, teacher_call, data_samples)

    def build(self, step: QueryStep) -> Units:
        """The units, one object each (SEL-1)."""
        return Units(
            student=step.pick(step.student_layer[0], step.student_queries).transpose(1, 2),
            teacher=step.pick(step.teacher_layer[0], step.teacher_queries).transpose(1, 2),
            labels=step.labels,
            ignore_index=IGNORED,
            sigmoid=self.sigmoid,
            background=self.sigmoid,
            boxes=Boxes(
                index=step.index,
                student=step.student_boxes,
                teacher=step.teacher_boxes,
                target=step.target_boxes,
                scale=step.sizes[step.index[0]].prod(1).sqrt(),
            ),
            paint=BoxRegions(
                size_of(step.samples), len(step.samples), step.index, step.target_boxes
            ),
        )


def _find(model: nn.Module, path: str, key: str) -> DETRHead:
    head, method = resolve(model, path, key)
    same = isinstance(head, DETRHead) and method == 'forward'
    same = same and all(
        any(getattr(type(head), name) is getattr(base, name) for base in HEADS)
        for name in ('loss_by_feat', 'loss_by_feat_single', 'get_targets', '_get_targets_single')
    )
    if not same:
        raise ValueError(
            f'`{key}` should lead to the head of a DETR, Deformable DETR or DINO, or to a subclass '
            f"with their matching and loss. Found '{path}', a {type(head).__name__}."
        )
    if not hasattr(head, 'assigner'):
        raise ValueError(
            f"`{key}` should lead to a head that can match queries: the model's config should have "
            f'`train_cfg.assigner`. Found none.'
        )
    return head
