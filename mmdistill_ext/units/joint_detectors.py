"""What joining the heads of several detectors has in common, whatever their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.ops import batched_nms
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mmdistill_ext.units.detector_pair import IGNORED
from mmdistill_ext.units.joint import JointHeads, shallow_copy, with_networks

NMS = dict(type='nms', iou_threshold=0.5)
"""How boxes of several detectors without NMS are merged, as mmdet's test-time augmentation does."""
FIELDS = ('bboxes', 'scores', 'labels', 'masks')
"""What is merged, where all networks have it."""


class JointDetectors(JointHeads):
    """Joins the heads of several detectors (COL-8).

    Attributes:
        reference: Name of the network whose target assignment decides the labels.
    """

    average = 'positive'
    is_detection = True
    prefix = ''
    ignore_index = IGNORED
    reference: str

    @staticmethod
    def labels_of(sample: DetDataSample) -> Tensor:
        """Classes of all objects of an image, ``(G,)``."""
        return sample.gt_instances.labels

    def test_cfg(self, network: BaseDetector) -> Mapping[str, Any]:
        """The ``test_cfg`` of a network's head, with ``nms`` and ``max_per_img`` if it has them."""
        return network.bbox_head.test_cfg

    def predict(
        self,
        networks: Mapping[str, BaseDetector],
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list[DetDataSample]],
        weights: Tensor,
    ) -> list[DetDataSample]:
        """The ensemble's predictions, by NMS over all networks' boxes."""
        predicted = {
            name: network.predict(inputs[name], [shallow_copy(x) for x in data_samples[name]])
            for name, network in networks.items()
        }
        factors, test_cfg = weights.tolist(), self.test_cfg(networks[self.reference])
        together = data_samples[self.reference]
        for sample, *own in zip(together, *predicted.values(), strict=True):
            sample.pred_instances = merge([x.pred_instances for x in own], factors, test_cfg)
        return with_networks(together, predicted)


def merge(
    predictions: list[InstanceData], weights: Sequence[float], test_cfg: Mapping[str, Any]
) -> InstanceData:
    """Merge several detectors' boxes of one image, as mmdet's test-time augmentation does.

    Args:
        predictions: Predictions of each network, with ``bboxes``, ``scores`` and ``labels``, and
            perhaps ``masks``.
        weights: Weights of the networks. Scores are multiplied by weight / largest weight; boxes of
            a network of weight 0 or less do not count.
        test_cfg: ``test_cfg`` of a detector, perhaps with ``nms`` (:data:`NMS` without) and
            ``max_per_img``.

    Returns:
        The merged predictions, with the same fields.
    """
    largest = max(weights)
    counted = [(own, w / largest) for own, w in zip(predictions, weights, strict=True) if w > 0]
    fields = {
        name: torch.cat([own[name] for own, _ in counted])
        for name in FIELDS
        if all(name in own for own, _ in counted)
    }
    if not len(fields['bboxes']):
        return predictions[0][:0]
    scores = torch.cat([own.scores * weight for own, weight in counted])
    nms = test_cfg.get('nms') or NMS
    kept, places = batched_nms(fields['bboxes'], scores, fields['labels'], nms)
    most = test_cfg.get('max_per_img', -1)
    places = places[:most] if most > 0 else places
    merged = {name: values[places] for name, values in fields.items()}
    return InstanceData(**{**merged, 'scores': kept[: len(places), -1]})
