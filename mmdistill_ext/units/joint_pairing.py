"""Which heads are joined when several networks train together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from mmdistill_ext.compat import has_framework
from mmdistill_ext.units.joint import JointHeads


def pair_networks(networks: Mapping[str, nn.Module], reference: str) -> JointHeads:
    """Join the heads that the networks predict with (COL-8).

    Args:
        networks: Name -> network.
        reference: Name of the network that the others are compared by.

    Returns:
        A :class:`~mmdistill_ext.units.pixel.joint.JointPixels`, or for detectors a
        :class:`~mmdistill_ext.units.dense.joint.JointDense`,
        :class:`~mmdistill_ext.units.query.joint.JointQueries` or
        :class:`~mmdistill_ext.units.roi.joint.JointRoIs`.

    Raises:
        ValueError: The networks are of different kinds, or of none that can be joined.
    """
    for models, joint in _kinds():
        if all(isinstance(network, models) for network in networks.values()):
            return joint(networks, reference)
    types = {name: type(network).__name__ for name, network in networks.items()}
    raise ValueError(
        '`students` should all be segmentors of mmsegmentation, or all detectors '
        'of mmdetection of one kind: single-stage, two-stage, or with queries (DETRs, Sparse '
        'R-CNN): pixels pair with pixels, anchors and points with anchors and points, RoIs with '
        f'RoIs, queries with queries. Found {types}.'
    )


def _kinds() -> Iterator[tuple[tuple[type[nn.Module], ...], Callable[..., JointHeads]]]:
    """Classes of models -> what joins their heads; the first that fits all networks does."""
    if has_framework('mmseg'):
        from mmseg.models.segmentors import BaseSegmentor

        from mmdistill_ext.units.pixel.joint import JointPixels

        yield (BaseSegmentor,), JointPixels
    if has_framework('mmdet'):
        from mmdet.models.detectors import SingleStageDetector, SparseRCNN, TwoStageDetector
        from mmdet.models.detectors.base_detr import DetectionTransformer
        from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor

        from mmdistill_ext.units.dense.joint import JointDense
        from mmdistill_ext.units.query.joint import JointQueries
        from mmdistill_ext.units.roi.joint import JointRoIs

        yield (SingleStageDetector, SingleStageInstanceSegmentor), JointDense
        yield (DetectionTransformer, SparseRCNN), JointQueries
        yield (TwoStageDetector,), JointRoIs
