"""Which pair joins the heads of which models: one table for segmenters, detectors, and others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from mmdistill_ext.taps import find_child, resolve
from mmdistill_ext.units.pair import HeadPair


class PairRow(NamedTuple):
    """How heads of one kind of model are paired; see :func:`register_pair`."""

    model: type[nn.Module]
    pair: type[HeadPair]
    name: str
    head: str | None
    teacher_head: str | None
    head_type: type[nn.Module] | None


TABLE: list[PairRow] = []
KNOWN = (
    'a segmentor of mmsegmentation, or a single-stage detector, instance segmenter, two-stage '
    'detector, DETR or MaskFormer of mmdetection'
)


def register_pair(
    model: type[nn.Module],
    name: str,
    head: str | None = None,
    teacher_head: str | None = None,
    head_type: type[nn.Module] | None = None,
) -> Callable[[type[HeadPair]], type[HeadPair]]:
    """Decorator: the :class:`HeadPair` joins heads of such models.

    Called as ``pair(student, teacher, head, teacher_head, key)``, it raises a ``ValueError`` that
    names the key if the heads do not fit. A pair outside of this package is registered in a module
    that the config names under ``custom_imports``.

    The row whose ``model`` is the nearest base class of the student decides, among rows for the
    same model one whose ``head_type`` fits the student's head.

    Args:
        model: Class of the models, of student and teacher.
        name: What the models are called in errors, such as ``'a segmentor'``.
        head: Path of the student's head when the config names none; None if it must be named.
        teacher_head: Path of the teacher's head when the config names none; by default that of the
            student's.
        head_type: The row is for heads of this class only.

    Example:
        >>> class MySegmentor(nn.Module):
        ...     pass
        >>> @register_pair(MySegmentor, 'a mask classifier', head='decode_head')
        ... class MyPair(HeadPair):
        ...     pass  # what HeadPair asks for
        >>> has_units(MySegmentor())
        True
    """

    def add(pair: type[HeadPair]) -> type[HeadPair]:
        TABLE.append(PairRow(model, pair, name, head, teacher_head, head_type))
        return pair

    return add


def has_units(model: nn.Module) -> bool:
    """Whether heads of such a model can be paired."""
    return bool(_rows(model))


def check_units(student: nn.Module) -> None:
    """Refuse a student without units.

    Raises:
        ValueError: No row is for such a model.
    """
    if not has_units(student):
        raise ValueError(
            f'`student` should be {KNOWN}, or a model that `register_pair` names. Found '
            f'{type(student).__name__}.'
        )


def pair_heads(
    student: nn.Module, teacher: nn.Module, head: str | None, teacher_head: str | None, key: str
) -> HeadPair:
    """Pair a head of the student with one of the teacher (SEL-7).

    Args:
        student: The student.
        teacher: The teacher, a model of the same kind.
        head: Path of the student's head; the one that it predicts with when not given.
        teacher_head: Path of the teacher's head; by default as the student's (of another number of
            stages, the nearest), and for segmenters the one that the teacher predicts with.
        key: The config key to name in errors, such as ``'losses.kd'``.

    Raises:
        ValueError: The heads cannot be paired; the message says why and what can.
    """
    check_units(student)
    row, head = _choose(student, head, key)
    partner = next((other for other in _rows(teacher) if other.pair is row.pair), None)
    if partner is None:
        raise ValueError(
            f'`teacher.model` should be {row.name} as the student is: pixels pair with pixels, '
            'anchors and points with anchors and points, RoIs with RoIs, queries with queries. '
            f'Found {type(teacher).__name__} for a {type(student).__name__}.'
        )
    if teacher_head is None:
        same = partner.model is row.model
        teacher_head = row.teacher_head if same else partner.head
    teacher_head = teacher_head or row.pair.partner_head(teacher, head)
    return row.pair(student, teacher, head, teacher_head, key)


def _rows(model: nn.Module) -> list[PairRow]:
    """Rows for the model, those of its nearest base class first; with a ``head_type`` first."""
    bases = type(model).__mro__
    for framework in {base.__module__.partition('.')[0] for base in bases}:
        _load(framework)
    rows = [row for row in reversed(TABLE) if row.model in bases]
    return sorted(rows, key=lambda row: (bases.index(row.model), row.head_type is None))


def _choose(student: nn.Module, head: str | None, key: str) -> tuple[PairRow, str]:
    """The first row that fits the student's head, and the path of that head."""
    rows = _rows(student)
    for row in rows:
        path = head or row.head
        lacks = head is None and not _leads(student, path) and row is not rows[-1]
        if path is None or lacks:
            continue
        if row.head_type is None or _is_of(resolve(student, path, f'{key}.head')[0], row.head_type):
            return row, path
    wanted = rows[-1].head_type
    raise ValueError(
        f'`{key}.head` should lead to a {wanted.__name__ if wanted else "head"}. Found '
        f'{head or "none"!r} for a {type(student).__name__}.'
    )


def _is_of(head: object, head_type: type[nn.Module]) -> bool:
    """Whether it is such a head, or stages that end with one."""
    if isinstance(head, nn.ModuleList) and len(head):
        head = head[-1]
    return isinstance(head, head_type)


def _leads(model: nn.Module, path: str | None) -> bool:
    """Whether there is something at a path."""
    found: Any = model
    for part in path.split('.') if path else ():
        found = find_child(found, part)
    return found is not None


@cache
def _load(framework: str) -> None:
    """Add the rows of a framework; a model has a base class of it, so it can be imported."""
    if framework == 'mmseg':
        _add_segmenters()
    elif framework == 'mmdet':
        _add_detectors()


def _add_segmenters() -> None:
    from mmseg.models.segmentors import BaseSegmentor

    from mmdistill_ext.units.pixel.pair import PixelPair

    decode = 'decode_head'
    register_pair(BaseSegmentor, 'a segmentor', head=decode, teacher_head=decode)(PixelPair)


def _add_detectors() -> None:
    from mmdet.models.dense_heads import CondInstMaskHead, YOLACTProtonet
    from mmdet.models.dense_heads.rtmdet_ins_head import MaskFeatModule
    from mmdet.models.detectors import (
        MaskFormer,
        RTMDet,
        SingleStageDetector,
        SparseRCNN,
        TwoStageDetector,
    )
    from mmdet.models.detectors.base_detr import DetectionTransformer
    from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
    from mmdet.models.losses import DiceLoss
    from mmdet.models.roi_heads.mask_heads import DynamicMaskHead, FCNMaskHead

    from mmdistill_ext.units.dense.pair import DensePair
    from mmdistill_ext.units.instance.grid_pair import GridMaskPair
    from mmdistill_ext.units.instance.pair import InstanceMaskPair
    from mmdistill_ext.units.query.mask_pair import QueryMaskPair
    from mmdistill_ext.units.query.pair import QueryPair
    from mmdistill_ext.units.roi.mask_pair import MaskPair
    from mmdistill_ext.units.roi.pair import RoIPair
    from mmdistill_ext.units.segment.mask_pair import SegmentMaskPair
    from mmdistill_ext.units.segment.pair import SegmentPair

    box, two_stage = 'bbox_head', 'a two-stage detector'
    register_pair(SingleStageDetector, 'a single-stage detector', head=box)(DensePair)
    instance = 'an instance segmenter'
    for head in ('mask_head', box):  # SOLO has no box head
        register_pair(SingleStageInstanceSegmentor, instance, head=head)(DensePair)
    for mask_head in (CondInstMaskHead, YOLACTProtonet):
        register_pair(SingleStageInstanceSegmentor, instance, head_type=mask_head)(InstanceMaskPair)
    register_pair(SingleStageInstanceSegmentor, instance, head_type=DiceLoss)(GridMaskPair)
    register_pair(RTMDet, 'an RTMDet', head_type=MaskFeatModule)(InstanceMaskPair)
    register_pair(DetectionTransformer, 'a DETR', head=box)(QueryPair)
    register_pair(SparseRCNN, 'a Sparse R-CNN', head=f'roi_head.{box}')(QueryPair)
    register_pair(SparseRCNN, 'a QueryInst', head_type=DynamicMaskHead)(QueryMaskPair)
    former, layers = 'a MaskFormer', nn.Sequential  # those that predict the masks
    register_pair(MaskFormer, former, head='panoptic_head')(SegmentPair)
    register_pair(MaskFormer, former, head_type=layers)(SegmentMaskPair)
    register_pair(TwoStageDetector, two_stage, head=f'roi_head.{box}')(RoIPair)
    register_pair(TwoStageDetector, two_stage, head_type=FCNMaskHead)(MaskPair)
