"""Units of several single-stage detectors: anchors and points (COL-8)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from mmdet.structures import DetDataSample
from torch import nn

from mmdistill_ext.taps import Taps
from mmdistill_ext.units.dense.alike import common_levels, find_family
from mmdistill_ext.units.dense.family import DenseFamily
from mmdistill_ext.units.dense.outputs import DenseOutputs, DenseTargets
from mmdistill_ext.units.joint import JointBoxes, JointUnits
from mmdistill_ext.units.joint_detectors import JointDetectors

HEAD = 'bbox_head'


class JointDense(JointDetectors):
    """Joins the heads of several single-stage detectors, location by location.

    One label per location is needed to compare the networks by: it comes from the reference
    network's target assignment. The own loss of each network keeps that network's assignment.
    Levels that some network lacks learn from the labels alone.

    Args:
        networks: Name -> an mmdet single-stage detector.
        reference: Name of the network that assigns the targets; the first when not given.

    Raises:
        ValueError: The heads cannot be joined; the message says why and what can.
    """

    def __init__(self, networks: Mapping[str, nn.Module], reference: str | None = None) -> None:
        self.families = {name: _family(network, name) for name, network in networks.items()}
        self.reference = next(iter(networks)) if reference is None else reference
        lead = self.families[self.reference]
        leading = sorted(self.families, key=lambda name: name != self.reference)
        heads = {name: self.families[name] for name in leading}
        named = {f"'{name}' ({type(x.head).__name__})": x for name, x in heads.items()}
        places = common_levels(named, 'The networks', 'students')
        levels = dict(zip(leading, places, strict=True))
        self.levels = [levels[name] for name in self.families]
        self.num_classes = lead.num_classes
        self.sigmoid = lead.sigmoid
        self.has_boxes = all(family.has_boxes for family in self.families.values())
        self.background = self.sigmoid  # a softmax has a channel for background
        self._loss_tap = f'{HEAD}.loss_by_feat'
        self._target_taps = tuple(f'{HEAD}.{name}' for name in lead.taps)

    def taps(self, name: str) -> tuple[str, ...]:
        """Paths to tap in a network: its predictions and, in the reference, its targets."""
        return (self._loss_tap, *(self._target_taps if name == self.reference else ()))

    def __call__(
        self,
        taps: Mapping[str, Taps],
        data_samples: Mapping[str, list[DetDataSample]],
        boxes: bool = True,
    ) -> JointUnits:
        """Build the units of one step from the tapped calls (COL-8).

        Args:
            taps: Name -> records of that network's step.
            data_samples: Name -> the batch's data samples.
            boxes: Decode the boxes too; finding the positive units is a host sync.

        Raises:
            ValueError: The networks' feature maps have different sizes.
        """
        parts = zip(self.families.items(), self.levels, strict=True)
        outputs = {
            name: DenseOutputs(family, places, partial(_arguments, taps[name], self._loss_tap))
            for (name, family), places in parts
        }
        calls = taps[self.reference]
        targets = DenseTargets(outputs, lambda name: calls.all(f'{HEAD}.{name}'), self.reference)
        return JointUnits(
            labels=targets.labels,
            logits=tuple(head.scores for head in outputs.values()),
            align_corners=(False,) * len(outputs),
            boxes=_decode(targets) if boxes else None,
        )


def _family(network: nn.Module, name: str) -> DenseFamily:
    if getattr(network, HEAD, None) is None:
        raise ValueError(
            f'`students.{name}` should be a detector with a `{HEAD}`: masks without boxes are not '
            f'merged into those of an ensemble. Found {type(network).__name__}.'
        )
    return find_family(network, HEAD, f'students.{name}')


def _arguments(taps: Taps, path: str) -> tuple:
    return taps[path].args


def _decode(targets: DenseTargets) -> JointBoxes:
    """Boxes of the positive units."""
    boxes = tuple(head.decode(*targets.index) for head in targets.outputs.values())
    return JointBoxes(boxes, targets.boxes, targets.lead.strides[targets.index[1]])
