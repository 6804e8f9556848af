"""Units of several two-stage detectors: proposals of one of them (COL-8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from torch import nn

from mmdistill_ext.taps import Taps
from mmdistill_ext.units.joint import JointBoxes, JointUnits
from mmdistill_ext.units.joint_detectors import JointDetectors
from mmdistill_ext.units.roi.heads import BoxHead
from mmdistill_ext.units.roi.sampled import SampledRoIs

HEAD, FEATURES = 'roi_head.bbox_head', 'extract_feat'


class JointRoIs(JointDetectors):
    """Joins the box heads of several two-stage detectors, RoI by RoI of the reference network.

    Every network looks at the proposals that the reference network sampled for its own loss
    (in a cascade, for its last stage), in features of its own; their labels are those of that
    network's assignment. For the other networks that is a second run of the box head, so BatchNorm
    in a box head counts these RoIs too. The ensemble's prediction is an NMS over the boxes of all
    networks, with the ``test_cfg`` of the reference; masks come with their boxes.

    Args:
        networks: Name -> an mmdet two-stage detector.
        reference: Name of the network that samples; the first when not given.

    Raises:
        ValueError: The heads cannot be joined; the message says why and what can.
    """

    sigmoid = False
    background = False  # a softmax has a channel for background

    def __init__(self, networks: Mapping[str, nn.Module], reference: str | None = None) -> None:
        self.heads = {
            name: BoxHead(network, HEAD, f'students.{name}', trains=True)
            for name, network in networks.items()
        }
        self.reference = next(iter(networks)) if reference is None else reference
        lead = self.heads[self.reference]
        self.num_classes = lead.head.num_classes
        self.has_boxes = all(head.reader.has_boxes for head in self.heads.values())
        for name, head in self.heads.items():
            if getattr(networks[name], 'with_panoptic_fusion_head', False):
                raise ValueError(
                    f'`students.{name}` should predict boxes: the panoptic maps of several '
                    f'networks cannot be merged. Found {type(networks[name]).__name__}.'
                )
            if head.family.looks > 1:
                raise ValueError(
                    f'`students.{name}` should see each image once, as the others do. Found '
                    f'{type(networks[name]).__name__}, with {head.family.looks} looks.'
                )
            if not head.roi_head.bbox_assigner:
                raise ValueError(
                    f'`students.{name}` should have a `train_cfg` with an assigner. Found none.'
                )
            if head.head.num_classes != self.num_classes:
                raise ValueError(
                    'The networks should have the same `num_classes` (`students`). Found '
                    f"{self.num_classes} in '{self.reference}', {head.head.num_classes} in "
                    f"'{name}'."
                )

    def taps(self, name: str) -> tuple[str, ...]:
        """Paths to tap: sampling and loss of the reference network, the features of the others."""
        head = self.heads[name]
        return (head.sampled_tap, head.targets_tap) if name == self.reference else (FEATURES,)

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
            boxes: The boxes are needed too; finding the positive RoIs is a host sync.

        Raises:
            ValueError: The networks' images have different sizes.
        """
        self._check(data_samples)
        sampled = SampledRoIs(self.heads[self.reference], taps[self.reference])
        outputs = {}
        for name, head in self.heads.items():
            if name == self.reference:
                outputs[name] = sampled.call.scores, sampled.call.boxes
            else:
                found = head.run(taps[name][FEATURES], sampled.call.rois)
                outputs[name] = found['cls_score'], found['bbox_pred']
        return JointUnits(
            logits=tuple(sampled.logits(self.heads[name], x[0]) for name, x in outputs.items()),
            labels=sampled.labels,
            align_corners=(False,) * len(outputs),
            boxes=JointBoxes(
                tuple(sampled.decode(self.heads[name], x[1]) for name, x in outputs.items()),
                sampled.target_boxes,
                sampled.scale,
            )
            if boxes
            else None,
        )

    def test_cfg(self, network: BaseDetector) -> Mapping[str, Any]:
        """The ``test_cfg`` of the RoI head."""
        return network.roi_head.test_cfg

    def _check(self, data_samples: Mapping[str, list[DetDataSample]]) -> None:
        sizes = {
            name: [tuple(sample.metainfo['img_shape'][:2]) for sample in samples]
            for name, samples in data_samples.items()
        }
        different = [name for name, found in sizes.items() if found != sizes[self.reference]]
        if different:
            raise ValueError(
                'The networks should see images of the same sizes: they look at the same '
                f"proposals. Found {sizes[self.reference]} for '{self.reference}', "
                f"{sizes[different[0]]} for '{different[0]}'."
            )
