"""Units of DETR-like detectors: the queries that predict the same object (SEL-1, SEL-7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mmdet.models.dense_heads import DeformableDETRHead, DETRHead, DINOHead
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps, resolve, wrapped
from mmdistill_ext.units.base import SplitRule, Units
from mmdistill_ext.units.boxes import Boxes
from mmdistill_ext.units.detector_pair import IGNORED, DetectorPair, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.query.step import QuerySplit, QueryStep

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample

KINDS = (DETRHead, DeformableDETRHead, DINOHead)


class QueryPair(DetectorPair):
    """Pairs the queries of student and teacher that were matched to the same object.

    The student's queries are matched by its own loss, the teacher's by its own assigner; both on
    the last decoder layer. Queries without an object have no partner and are left to the labels.

    Args:
        student: The student, an mmdet DETR, Conditional, DAB or Deformable DETR, or DINO.
        teacher: The teacher, any of these; the number of queries may differ.
        head: Path of the student's head, ``'bbox_head'``.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    predicts = True

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.head = _find(student, head, f'{key}.head')
        self.teacher_head = _find(teacher, teacher_head, f'{key}.teacher_head')
        self.sigmoid = self.head.loss_cls.use_sigmoid
        for rule, own, other in (
            ('the same `num_classes`', self.num_classes, self.teacher_head.num_classes),
            (
                'both sigmoid or both softmax scores: DETR pairs with DETR, the others with '
                'each other',
                self.sigmoid,
                self.teacher_head.loss_cls.use_sigmoid,
            ),
        ):
            if own != other:
                raise ValueError(
                    f'Student and teacher should have {rule} (`{key}`). Found {own} in the '
                    f"student's {type(self.head).__name__}, {other} in the teacher's "
                    f'{type(self.teacher_head).__name__}.'
                )
        self.heads = head, teacher_head
        self.student_tap = f'{head}.loss_by_feat'
        self.layer_tap = f'{head}.loss_by_feat_single'
        self.match_tap = f'{head}.assigner.assign'
        self.student_taps = (self.student_tap, self.layer_tap, self.match_tap)
        self.teacher_tap = teacher_head
        self.prefix = head.replace('_head', '')

    def own_losses(self, call: Call) -> dict[str, Tensor]:
        """The head's losses on matched queries, without those on denoising ones."""
        losses = super().own_losses(call).items()
        return {name: value for name, value in losses if 'dn_loss' not in name}

    def __call__(
        self,
        taps: Taps,
        teacher_call: Call,
        data_samples: list[DetDataSample],
        split: SplitRule | None = None,
        own: QuerySplit | None = None,
    ) -> Units:
        """Build the units of one step from the tapped calls."""
        found = self.known(own) or QueryStep(self, taps, teacher_call, data_samples)
        scores, boxes = found.student_layer
        queries = found.student_queries
        return Units(
            student=found.pick(scores, queries).transpose(1, 2),
            teacher=found.pick(found.teacher_layer[0], found.teacher_queries).transpose(1, 2),
            labels=found.labels,
            ignore_index=IGNORED,
            sigmoid=self.sigmoid,
            background=self.sigmoid,
            boxes=Boxes(
                index=found.index,
                student=found.boxes(found.pick(boxes, queries))[found.index],
                teacher=found.teacher_boxes,
                target=found.target_boxes,
                scale=found.sizes[found.index[0]].prod(1).sqrt(),
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
    ) -> Iterator[QuerySplit]:
        """Take part in the head's own loss; gives what the units are to be built with."""
        own = QuerySplit(QueryStep(self, taps, teacher_call, data_samples), split)
        head = taps.owner(self.student_tap)
        with own.loss(), wrapped(head, 'loss_by_feat_single', own.layer):
            yield own


def _find(model: nn.Module, path: str, key: str) -> nn.Module:
    head, method = resolve(model, path, key)
    same = isinstance(head, DETRHead) and method == 'forward'
    same = same and all(
        any(getattr(type(head), name) is getattr(kind, name) for kind in KINDS)
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
