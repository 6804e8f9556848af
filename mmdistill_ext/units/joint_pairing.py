"""Which heads are joined when several networks train together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mmdistill_ext.compat import has_framework
from mmdistill_ext.units.joint import JointHeads


def pair_networks(networks: Mapping[str, nn.Module], reference: str) -> JointHeads:
    """Join the heads that the networks predict with (COL-8).

    Args:
        networks: Name -> network.
        reference: Name of the network that the others are compared by.

    Returns:
        A :class:`~mmdistill_ext.units.pixel.joint.JointPixels` or
        :class:`~mmdistill_ext.units.dense.joint.JointDense`.

    Raises:
        ValueError: The networks are neither all segmenters nor all single-stage detectors.
    """
    if has_framework('mmseg'):
        from mmseg.models.segmentors import EncoderDecoder

        if all(isinstance(network, EncoderDecoder) for network in networks.values()):
            from mmdistill_ext.units.pixel.joint import JointPixels

            return JointPixels(networks, reference)
    if has_framework('mmdet'):
        from mmdet.models.detectors import SingleStageDetector

        if all(isinstance(network, SingleStageDetector) for network in networks.values()):
            from mmdistill_ext.units.dense.joint import JointDense

            return JointDense(networks, reference)
    types = {name: type(network).__name__ for name, network in networks.items()}
    raise ValueError(
        '`students` should all be segmentors of mmsegmentation (EncoderDecoder), or all '
        'single-stage detectors of mmdetection: pixels pair with pixels, anchors and points with '
        f'anchors and points; RoIs and queries, which every network picks itself, do not. Found '
        f'{types}.'
    )
