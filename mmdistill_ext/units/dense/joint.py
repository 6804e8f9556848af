"""Units of several single-stage detectors: anchors and points (COL-8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmcv.ops import batched_nms
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.dense.families import FAMILIES, find_family
from mmdistill_ext.units.dense.pair import DensePair
from mmdistill_ext.units.dense.step import DenseStep
from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.joint import JointBoxes, JointUnits, shallow_copy, with_networks

HEAD = 'bbox_head'


class JointDense:
    """Pairs the heads of several single-stage detectors, location by location.

    One label per location is needed to compare the networks by: that of the first network's own
    target assignment. Each network's own loss keeps its own. Levels that not all have are left to
    the labels.

    Args:
        networks: Name -> an mmdet single-stage detector.

    Raises:
        ValueError: The heads cannot be paired; the message says why and what can.
    """

    background = True
    average = 'positive'
    prefix = ''
    ignore_index = IGNORED

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        (self.first, lead), *others = networks.items()
        for name, network in networks.items():
            _check_head(network, name)
        self.pairs = {name: self._pair(lead, name, network) for name, network in others}
        pairs = list(self.pairs.values())
        common = set.intersection(*(set(pair.student_levels) for pair in pairs))
        if not common:
            raise ValueError(
                '`students` should all have a level of the same stride. Found '
                f'{[pair.student.strides for pair in pairs[:1]]} in {self.first!r}, '
                f'{[pair.teacher.strides for pair in pairs]} in the others.'
            )
        for pair in pairs:
            levels = zip(pair.student_levels, pair.teacher_levels, strict=True)
            kept = [both for both in levels if both[0] in common]
            pair.student_levels, pair.teacher_levels = map(list, zip(*kept, strict=True))
        self.num_classes: int = pairs[0].num_classes
        self.sigmoid: bool = pairs[0].sigmoid
        self.background = self.sigmoid  # a softmax has a channel for it
        self._loss_tap = pairs[0].student_tap
        self._targets_tap = pairs[0].targets_tap

    def _pair(self, lead: nn.Module, name: str, network: nn.Module) -> DensePair:
        try:
            return DensePair(lead, network, HEAD, HEAD, f'students.{name}')
        except ValueError as error:
            raise ValueError(
                f'`students`: {self.first!r}, here the student, and {name!r}, here the teacher, '
                f'cannot be paired. {error}'
            ) from error

    @staticmethod
    def labels_of(sample: DetDataSample) -> Tensor:
        """All labels of an image."""
        return sample.gt_instances.labels

    def taps(self, name: str) -> tuple[str, ...]:
        """Paths to tap in a network."""
        return (self._loss_tap, self._targets_tap) if name == self.first else (self._loss_tap,)

    def __call__(
        self,
        taps: Mapping[str, Taps],
        data_samples: Mapping[str, list[DetDataSample]],
        boxes: bool = True,
    ) -> JointUnits:
        """Build the units of one step from the tapped calls.

        Args:
            taps: Name -> records of that network's step.
            data_samples: Name -> the batch's data samples.
            boxes: Decode the boxes too: to find the positive units waits for the device.

        Raises:
            ValueError: The networks' feature maps have different sizes.
        """
        mine = taps[self.first]
        found = {
            name: DenseStep(pair, mine, Call((), {}, taps[name][self._loss_tap].args))
            for name, pair in self.pairs.items()
        }
        lead = next(iter(found.values()))
        labels, classified = lead.assigned.labels, lead.assigned.classified
        if not all(pair.teacher.knows_background for pair in self.pairs.values()):
            classified = classified & (labels < self.num_classes)
        return JointUnits(
            logits=(lead.student_scores, *(pair.teacher_scores for pair in found.values())),
            labels=labels.where(classified, IGNORED),
            align_corners=(False,) * (1 + len(found)),
            boxes=_decode(list(found.values())) if boxes else None,
        )

    def predict(
        self,
        networks: Mapping[str, nn.Module],
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list[DetDataSample]],
        weights: Tensor,
    ) -> list[DetDataSample]:
        """The ensemble's predictions, by NMS over all networks' boxes; in them the networks'."""
        predicted = {
            name: network.predict(inputs[name], [shallow_copy(x) for x in data_samples[name]])
            for name, network in networks.items()
        }
        weights, test_cfg = weights.tolist(), networks[self.first].bbox_head.test_cfg
        together = data_samples[self.first]
        for sample, *own in zip(together, *predicted.values(), strict=True):
            sample.pred_instances = merge([x.pred_instances for x in own], weights, test_cfg)
        return with_networks(together, predicted)


def _decode(pairings: list[DenseStep]) -> JointBoxes:
    """Boxes of the positive units: the first network's, then the others'."""
    lead = pairings[0]
    boxes = [lead.student.decode(*lead.student_boxes(*lead.index))]
    boxes += [pairing.teacher.decode(*pairing.teacher_boxes(*lead.index)) for pairing in pairings]
    return JointBoxes(tuple(boxes), lead.target_boxes, lead.strides[lead.index[1]])


def _check_head(network: nn.Module, name: str) -> None:
    if find_family(network.bbox_head) is None:
        known = ', '.join(kin.kind.__name__ for kin in FAMILIES)
        raise ValueError(
            f'`students.{name}` should have a head that is one of {known}, or a subclass with '
            f'their target assignment and loss. Found {type(network.bbox_head).__name__}.'
        )


def merge(
    predictions: list[InstanceData], weights: Sequence[float], test_cfg: dict
) -> InstanceData:
    """Boxes of several detectors for one image in one list, as mmdet's test-time augmentation does.

    Args:
        predictions: Each network's, with ``bboxes``, ``scores`` and ``labels``.
        weights: Of the networks: scores are multiplied by them, those of the largest weight stay.
            Boxes of a network of weight 0 or less do not count.
        test_cfg: A detector's, with ``nms`` and perhaps ``max_per_img``.
    """
    largest = max(weights)
    heard = [(own, w / largest) for own, w in zip(predictions, weights, strict=True) if w > 0]
    boxes, labels = (torch.cat([own[key] for own, _ in heard]) for key in ('bboxes', 'labels'))
    scores = torch.cat([own.scores * weight for own, weight in heard])
    if not len(boxes):
        return predictions[0][:0]
    kept, places = batched_nms(boxes, scores, labels, test_cfg['nms'])
    most = test_cfg.get('max_per_img', -1)
    places = places[:most] if most > 0 else places
    return InstanceData(bboxes=boxes[places], scores=kept[: len(places), -1], labels=labels[places])
