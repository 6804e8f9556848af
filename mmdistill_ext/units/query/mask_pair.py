"""Units of QueryInst's mask heads: the pixels of the boxes of matched queries (SEL-1, SEL-7)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from mmdet.models.roi_heads.mask_heads import DynamicMaskHead
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps, resolve
from mmdistill_ext.units.base import FusedCrossEntropy, Units
from mmdistill_ext.units.detector_pair import FEATURES_INSTEAD, IGNORED, DetectorPair, size_of
from mmdistill_ext.units.painters import BoxRegions
from mmdistill_ext.units.query.find import find_queries
from mmdistill_ext.units.query.step import Objects
from mmdistill_ext.units.roi.mask_step import MaskStep, masks_of


class QueryMask:
    """A mask head of QueryInst, and the queries of its stage.

    Args:
        model: A QueryInst.
        path: ``'roi_head.mask_head'`` for the last stage, or that of a stage.
        key: The config key to name in errors.

    Raises:
        ValueError: The path leads to no such head.
    """

    def __init__(self, model: nn.Module, path: str, key: str) -> None:
        head, method = resolve(model, path, key)
        if isinstance(head, nn.ModuleList):
            path, head = f'{path}.{len(head) - 1}', head[-1]
        if type(head) is not DynamicMaskHead or method != 'forward':
            raise ValueError(
                f"`{key}` should lead to the mask head of a QueryInst. Found '{path}', a "
                f'{type(head).__name__}. {FEATURES_INSTEAD}'
            )
        self.path, self.head = path, head
        self.loss_tap, self.targets_tap = f'{path}.loss_and_target', f'{path}.get_targets'
        self.queries: Any = find_queries(model, path.replace('mask_head', 'bbox_head'), key)


class QueryMaskStep(MaskStep):
    """One step of two such heads on the ``P`` boxes of the student's matched queries.

    Args:
        student: The student's head.
        teacher: The teacher's head.
        taps: Calls of the student's head.
        teacher_call: Call of the teacher's ``extract_feat``.
        samples: The batch's data samples.
    """

    def __init__(
        self,
        student: QueryMask,
        teacher: QueryMask,
        taps: Taps,
        teacher_call: Call,
        samples: list[DetDataSample],
    ) -> None:
        self.student, self.teacher, self.taps = student, teacher, taps
        self.teacher_call, self.samples = teacher_call, samples

    @cached_property
    def rois(self) -> Tensor:
        """Image and corners of the boxes of the matched queries, ``(P, 5)``.

        Where targets of masks are formed on the CPU, mmdet clips the sampled boxes in place.
        """
        boxes = self.student.queries.trained(self.taps, self.samples).boxes.detach()
        results = self.student_call['sampling_results']
        return bbox2roi([own[x.pos_inds] for own, x in zip(boxes, results, strict=True)])

    @cached_property
    def partners(self) -> Tensor:
        """The teacher's query for the object of each box, ``(P,)``, -1 where there is none."""
        found = self.teacher.queries.predicted(self.teacher_call, self.samples)
        queries = Objects(self.samples).queries(found.objects)
        results = self.student_call['sampling_results']
        return torch.cat(
            [own[x.pos_assigned_gt_inds] for own, x in zip(queries, results, strict=True)]
        )

    @cached_property
    def labels(self) -> Tensor:
        """1 inside of the object, 0 outside, ignored without a partner, ``(P, h, w)``."""
        inside = self.taps[self.student.targets_tap].output.round().long()
        return inside.where((self.partners >= 0)[:, None, None], IGNORED)

    @cached_property
    @torch.no_grad()
    def teacher_logits(self) -> Tensor:
        """Mask logits that the teacher's query for the object sees in the student's box."""
        queries = self.teacher.queries
        found = queries.run(self.teacher_call, self.samples)
        attention = found['attn_feats'][self.images, self.partners.clamp(min=0)]
        masks = queries.roi_head._mask_forward(
            queries.stage, self.teacher_call.output, self.rois, attention
        )['mask_preds']
        return masks_of(self.teacher.head, masks, self.student_call['sampling_results'])


class QueryMaskPair(DetectorPair):
    """Pairs QueryInst's mask heads, pixel by pixel of the boxes of the student's matched queries.

    The teacher's query for the same object looks at the same box in the teacher's features. Objects
    that the teacher has no query for are ignored. The head's own loss is a Dice loss of whole
    masks: FIT cannot split it by pixels.

    Args:
        student: The student, an mmdet QueryInst.
        teacher: The teacher, the same.
        head: Path of the student's head, ``'roi_head.mask_head'``.
        teacher_head: Path of the teacher's head.
        key: The config key to name in errors.

    Raises:
        ValueError: A path leads nowhere, or the heads cannot be paired; the message says why.
    """

    background = False
    box_distances = ()
    sigmoid = True
    predicts = False
    num_classes = 2
    splits_own = False
    teacher_tap = 'extract_feat'

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: str, teacher_head: str, key: str
    ) -> None:
        self.student = QueryMask(student, head, f'{key}.head')
        self.teacher = QueryMask(teacher, teacher_head, f'{key}.teacher_head')
        self.head = self.student.head
        own, other = self.head.num_classes, self.teacher.head.num_classes
        if own != other:
            raise ValueError(
                f'Student and teacher should have the same `num_classes` (`{key}`). Found {own} in '
                f"the student's '{head}', {other} in the teacher's '{teacher_head}'."
            )
        self.heads = self.student.path, self.teacher.path
        self.student_tap = self.student.loss_tap
        self.student_taps = (
            self.student_tap,
            self.student.targets_tap,
            *self.student.queries.taps,
        )
        name = self.student.path.removeprefix('roi_head.').replace('_head', '')
        self.prefix = name.replace('.', '_')

    @property
    def label_kinds(self) -> str:
        """Boxes and masks."""
        return 'boxes and masks'

    @property
    def data_classes(self) -> int:
        """Number of classes of the data set; the labels are only outside and inside."""
        return self.head.num_classes

    def label_names(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the labels, whatever the data's classes are."""
        return ('outside', 'inside')

    def fused_loss(self, key: str) -> FusedCrossEntropy | None:
        """Never returns: the head's own loss is neither formed by the pass nor split.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f'`{key}` cannot split the loss of a {type(self.head).__name__}: it is a Dice loss of '
            'whole masks. Distil the masks without it.'
        )

    def step(
        self, taps: Taps, teacher_call: Call, data_samples: list[DetDataSample]
    ) -> QueryMaskStep:
        """What is known of one step."""
        return QueryMaskStep(self.student, self.teacher, taps, teacher_call, data_samples)

    def build(self, step: QueryMaskStep) -> Units:
        """The units, one pixel of a box each (SEL-1)."""
        return Units(
            student=step.student_logits,
            teacher=step.teacher_logits,
            labels=step.labels,
            ignore_index=IGNORED,
            sigmoid=True,
            paint=BoxRegions(
                size_of(step.samples), len(step.samples), (step.images,), step.rois[:, 1:]
            ),
        )
