"""Units of several single-stage detectors: anchors and points (COL-8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from mmcv.ops import batched_nms
from mmdet.models.detectors import SingleStageDetector
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdistill_ext.taps import Taps
from mmdistill_ext.units.dense.alike import common_levels, find_family
from mmdistill_ext.units.dense.outputs import DenseOutputs, DenseTargets
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.joint import (
    JointBoxes,
    JointHeads,
    JointUnits,
    shallow_copy,
    with_networks,
)

HEAD = 'bbox_head'


class JointDense(JointHeads):
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

    average = 'positive'
    is_detection = True
    prefix = ''
    ignore_index = IGNORED

    def __init__(self, networks: Mapping[str, nn.Module], reference: str | None = None) -> None:
        self.families = {
            name: find_family(network, HEAD, f'students.{name}')
            for name, network in networks.items()
        }
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
        self.background = self.sigmoid  # a softmax has a channel for background
        self._loss_tap = f'{HEAD}.loss_by_feat'
        self._targets_tap = f'{HEAD}.{lead.targets}'

    @staticmethod
    def labels_of(sample: DetDataSample) -> Tensor:
        """Classes of all objects of an image, ``(G,)``."""
        return sample.gt_instances.labels

    def taps(self, name: str) -> tuple[str, ...]:
        """Paths to tap in a network: its predictions and, in the reference, its targets."""
        leads = name == self.reference
        return (self._loss_tap, self._targets_tap) if leads else (self._loss_tap,)

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
        targets = DenseTargets(outputs, lambda: calls.all(self._targets_tap), self.reference)
        return JointUnits(
            labels=targets.labels,
            logits=tuple(head.scores for head in outputs.values()),
            align_corners=(False,) * len(outputs),
            boxes=_decode(targets) if boxes else None,
        )

    def predict(
        self,
        networks: Mapping[str, SingleStageDetector],
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list[DetDataSample]],
        weights: Tensor,
    ) -> list[DetDataSample]:
        """The ensemble's predictions, by NMS over all networks' boxes."""
        predicted = {
            name: network.predict(inputs[name], [shallow_copy(x) for x in data_samples[name]])
            for name, network in networks.items()
        }
        factors, test_cfg = weights.tolist(), networks[self.reference].bbox_head.test_cfg
        together = data_samples[self.reference]
        for sample, *own in zip(together, *predicted.values(), strict=True):
            sample.pred_instances = merge([x.pred_instances for x in own], factors, test_cfg)
        return with_networks(together, predicted)


def _arguments(taps: Taps, path: str) -> tuple:
    return taps[path].args


def _decode(targets: DenseTargets) -> JointBoxes:
    """Boxes of the positive units."""
    boxes = tuple(head.decode(*targets.index) for head in targets.outputs.values())
    return JointBoxes(boxes, targets.boxes, targets.lead.strides[targets.index[1]])


def merge(
    predictions: list[InstanceData], weights: Sequence[float], test_cfg: dict
) -> InstanceData:
    """Merge several detectors' boxes of one image, as mmdet's test-time augmentation does.

    Args:
        predictions: Predictions of each network, with ``bboxes``, ``scores`` and ``labels``.
        weights: Weights of the networks. Scores are multiplied by weight / largest weight; boxes of
            a network of weight 0 or less do not count.
        test_cfg: ``test_cfg`` of a detector, with ``nms`` and perhaps ``max_per_img``.

    Returns:
        The merged predictions, with the same three fields.
    """
    largest = max(weights)
    counted = [(own, w / largest) for own, w in zip(predictions, weights, strict=True) if w > 0]
    boxes, labels = (torch.cat([own[key] for own, _ in counted]) for key in ('bboxes', 'labels'))
    scores = torch.cat([own.scores * weight for own, weight in counted])
    if not len(boxes):
        return predictions[0][:0]
    kept, places = batched_nms(boxes, scores, labels, test_cfg['nms'])
    most = test_cfg.get('max_per_img', -1)
    places = places[:most] if most > 0 else places
    return InstanceData(bboxes=boxes[places], scores=kept[: len(places), -1], labels=labels[places])
