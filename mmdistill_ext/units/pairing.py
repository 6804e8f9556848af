"""Which units a detector has."""

from __future__ import annotations

from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.detectors.base_detr import DetectionTransformer
from torch import nn

from mmdistill_ext.units.dense.pair import DensePair
from mmdistill_ext.units.detector_pair import DetectorPair
from mmdistill_ext.units.query.pair import QueryPair
from mmdistill_ext.units.roi.mask import MaskPair
from mmdistill_ext.units.roi.pair import RoIPair

KINDS = {
    SingleStageDetector: ('a single-stage detector', 'bbox_head'),
    TwoStageDetector: ('a two-stage detector', 'roi_head.bbox_head'),
    DetectionTransformer: ('a DETR', 'bbox_head'),
}
"""Frameworks of detectors, and the head that is paired when none is named."""


def pair_detectors(
    student: nn.Module, teacher: nn.Module, head: str | None, teacher_head: str | None, key: str
) -> DetectorPair:
    """Pair a head of the student with one of the teacher.

    Args:
        student: An mmdet detector.
        teacher: One of the same kind.
        head: Path of the student's head; its box head when not given.
        teacher_head: Path of the teacher's; the same as the student's when not given.
        key: The config key to name in errors.

    Raises:
        ValueError: They cannot be paired; the message says why and what can.
    """
    kind, (name, default) = _kind(student)
    if not isinstance(teacher, kind):
        raise ValueError(
            f'`teacher.model` should be {name} as the student is: anchors and points pair with '
            'anchors and points, RoIs with RoIs, queries with queries. Found '
            f'{type(teacher).__name__} for a {type(student).__name__}.'
        )
    head = head or default
    teacher_head = teacher_head or head
    if kind is SingleStageDetector:
        units = DensePair
    elif kind is DetectionTransformer:
        units = QueryPair
    else:
        units = MaskPair if 'mask_head' in head.split('.') else RoIPair
    return units(student, teacher, head, teacher_head, key)


def is_detector(model: nn.Module) -> bool:
    """Whether it has units."""
    return isinstance(model, tuple(KINDS))


def _kind(model: nn.Module) -> tuple[type, tuple[str, str]]:
    return next((kind, found) for kind, found in KINDS.items() if isinstance(model, kind))
