"""What one prediction of several networks is: the common currency of collaborative training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmengine.structures import BaseDataElement
from torch import Tensor


@dataclass(frozen=True)
class JointBoxes:
    """Boxes of N detectors for ``P`` positive units, ``(x1, y1, x2, y2)`` in pixels of the input.

    Args:
        networks: Of each network ``(P, 4)``, with gradient.
        target: ``(P, 4)``, the assigned boxes.
        scale: ``(P,)``, stride of the location, in pixels.
    """

    networks: tuple[Tensor, ...]
    target: Tensor
    scale: Tensor


@dataclass(frozen=True)
class JointUnits:
    """Predictions of N networks for the same units, with their labels.

    Args:
        logits: Of each network ``(B, C, ...)``, at any stride of its own, or the levels of a
            detector, ``(B, A, C, n)`` each.
        labels: ``(B, ...)``, of levels ``(B, N)``; in ``[0, C)``, C for background where there is
            one, or ``ignore_index``.
        align_corners: Of each network's head.
        boxes: Of a detector's positive units.
    """

    logits: tuple[Tensor | tuple[Tensor, ...], ...]
    labels: Tensor
    align_corners: tuple[bool, ...]
    boxes: JointBoxes | None = None


def shallow_copy(sample: BaseDataElement) -> BaseDataElement:
    """A data sample to put a network's own prediction in; what it holds is shared."""
    copied = type(sample)(metainfo=sample.metainfo)
    for name, value in sample.items():
        copied.set_data({name: value})
    return copied


def with_networks(
    ensemble: list[BaseDataElement], networks: Mapping[str, list[BaseDataElement]]
) -> list[BaseDataElement]:
    """Put every network's data sample into the ensemble's, as ``sample.networks[name]``."""
    for place, sample in enumerate(ensemble):
        own = {name: samples[place] for name, samples in networks.items()}
        sample.set_field(own, 'networks', dtype=dict)
    return ensemble
