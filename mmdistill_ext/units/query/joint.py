"""Units of several detectors with queries: labelled objects (COL-8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from torch import nn

from mmdistill_ext.taps import Taps
from mmdistill_ext.units.detector_pair import DetectorPair
from mmdistill_ext.units.joint import JointBoxes, JointUnits
from mmdistill_ext.units.joint_detectors import JointDetectors
from mmdistill_ext.units.query.find import check_alike, find_queries
from mmdistill_ext.units.query.step import Compared, Objects


class JointQueries(JointDetectors):
    """Joins the queries that several detectors matched to the same object.

    Each network's queries are matched by its own loss, on the layer that it predicts with. Objects
    that some network has no query for are ignored; queries without an object learn from the labels
    alone. The ensemble's prediction is an NMS over the boxes of all networks, at an IoU of 0.5
    where the reference network's ``test_cfg`` has no ``nms``.

    Args:
        networks: Name -> an mmdet DETR, or Sparse R-CNN.
        reference: Name of the network whose ``test_cfg`` it is; the first when not given.

    Raises:
        ValueError: The heads cannot be joined; the message says why and what can.
    """

    def __init__(self, networks: Mapping[str, nn.Module], reference: str | None = None) -> None:
        self.families = {
            name: find_queries(network, _path(network), f'students.{name}')
            for name, network in networks.items()
        }
        names = {
            f"'{name}' ({type(family.head).__name__})": family
            for name, family in self.families.items()
        }
        check_alike(names, 'The networks', 'students')
        self.reference = next(iter(networks)) if reference is None else reference
        lead = self.families[self.reference]
        self.num_classes = lead.num_classes
        self.sigmoid = lead.sigmoid
        self.background = self.sigmoid  # a softmax has a channel for background

    def taps(self, name: str) -> tuple[str, ...]:
        """Paths of the methods of a network that match its queries and form its loss."""
        return self.families[name].taps

    def parts_in_training(self, network: BaseDetector) -> list[nn.Module]:
        """The detector, decoder and head: denoising, for one, asks whether they train."""
        parts = DetectorPair.training_parts
        named = network.named_modules()
        return [network, *(module for name, module in named if name.split('.')[-1] in parts)]

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
            boxes: The boxes are needed too; finding the objects is a host sync.
        """
        objects = Objects(data_samples[self.reference])
        own = {
            name: family.trained(taps[name], data_samples[name])
            for name, family in self.families.items()
        }
        queries = {name: objects.queries(found.objects) for name, found in own.items()}
        compared = Compared(objects, list(queries.values()))
        return JointUnits(
            logits=tuple(compared.logits(own[name], queries[name]) for name in own),
            labels=compared.labels,
            align_corners=(False,) * len(own),
            boxes=JointBoxes(
                tuple(compared.boxes(own[name], queries[name]) for name in own),
                compared.target_boxes,
                compared.scale,
            )
            if boxes
            else None,
        )

    def test_cfg(self, network: BaseDetector) -> Mapping[str, Any]:
        """The ``test_cfg`` of the head that the network predicts with."""
        owner = network.roi_head if hasattr(network, 'roi_head') else network.bbox_head
        return owner.test_cfg or {}


def _path(network: nn.Module) -> str:
    return 'roi_head.bbox_head' if hasattr(network, 'roi_head') else 'bbox_head'
