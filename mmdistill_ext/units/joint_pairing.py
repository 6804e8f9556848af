"""Which heads are joined when several networks train together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mmdistill_ext.compat import has_framework
from mmdistill_ext.units.joint import JointHeads


def pair_networks(networks: Mapping[str, nn.Module]) -> JointHeads:
    """Join the heads that the networks predict with (COL-8).

    Args:
        networks: Name -> network.

    Returns:
        A :class:`~mmdistill_ext.units.pixel.joint.JointPixels` or
        :class:`~mmdistill_ext.units.dense.joint.JointDense`.

    Raises:
        ValueError: The networks are neither all segmenters nor all single-stage detectors.
    """
    if has_framework('mmseg'):
        from mmseg.models.segmentors import BaseSegmentor

        if all(isinstance(network, BaseSegmentor) for network in networks.values()):
            from mmdistill_ext.units.pixel.joint import JointPixels

            return JointPixels(networks)
    if has_framework('mmdet'):
        from mmdet.models.detectors import SingleStageDetector
        from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor

        single_stage = SingleStageDetector, SingleStageInstanceSegmentor
        if all(isinstance(network, single_stage) for network in networks.values()):
            from mmdistill_ext.units.dense.joint import JointDense

            return JointDense(networks)
    types = {name: type(network).__name__ for name, network in networks.items()}
    raise ValueError(
        '`students` should all be segmentors of mmsegmentation, or all '
        'single-stage detectors of mmdetection: pixels pair with pixels, anchors and points with '
        f'anchors and points; RoIs and queries, which every network picks itself, do not. Found '
        f'{types}.'
    )
