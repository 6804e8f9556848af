"""Units of several segmenters: pixels (COL-8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmseg.models.segmentors import BaseSegmentor
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmdistill_ext.taps import Taps
from mmdistill_ext.units.joint import JointHeads, JointUnits, shallow_copy, with_networks
from mmdistill_ext.units.pixel.head import find_head, is_sigmoid, seg_logits

HEAD = 'decode_head'


class JointPixels(JointHeads):
    """Joins the heads that several segmenters predict with, pixel by pixel of the labels.

    The logits are taken from the arguments of each head's own ``loss_by_feat``. They stay at their
    heads' strides, which may differ; the labels are those of the batch, at full size.

    Args:
        networks: Name -> an mmseg segmentor.
        reference: Name of the network whose padding the ensemble's predictions have; the first
            when not given.

    Raises:
        ValueError: A head has no per-pixel logits, or the heads differ in classes, output
            channels, the label that they ignore, or softmax and sigmoid.
    """

    background = False
    is_detection = False
    average = 'valid'
    prefix = 'decode.'

    def __init__(self, networks: Mapping[str, nn.Module], reference: str | None = None) -> None:
        self.reference = next(iter(networks)) if reference is None else reference
        self.heads = {
            name: find_head(network, HEAD, f'students.{name}') for name, network in networks.items()
        }
        (first, lead), *others = self.heads.items()
        for name, head in others:
            for attribute in ('num_classes', 'out_channels', 'ignore_index', 'use_sigmoid'):
                own, other = (
                    is_sigmoid(x) if attribute == 'use_sigmoid' else getattr(x, attribute)
                    for x in (lead, head)
                )
                if own != other:
                    raise ValueError(
                        f'`students` should have heads of the same `{attribute}`. Found {own} in '
                        f"'{first}', {other} in '{name}'."
                    )
        self.num_classes = lead.num_classes
        self.ignore_index = lead.ignore_index
        self.sigmoid = is_sigmoid(lead)

    @staticmethod
    def labels_of(sample: SegDataSample) -> Tensor:
        """Label map of an image, ``(1, H, W)``."""
        return sample.gt_sem_seg.data

    def taps(self, name: str) -> tuple[str, ...]:
        """Paths to tap in a network, the same in each."""
        return (f'{HEAD}.loss_by_feat',)

    def __call__(
        self,
        taps: Mapping[str, Taps],
        data_samples: Mapping[str, list[SegDataSample]],
        boxes: bool = False,
    ) -> JointUnits:
        """Build the units of one step from the tapped calls (COL-8).

        Args:
            taps: Name -> records of that network's step.
            data_samples: Name -> the batch's data samples.
            boxes: Not used, segmenters have none.

        Raises:
            ValueError: The networks' labels have different sizes.
        """
        (path,) = self.taps('')
        labels = {
            name: torch.stack([_padded_label(sample, self.ignore_index) for sample in samples])
            for name, samples in data_samples.items()
        }
        (first, target), *others = labels.items()
        for name, other in others:
            if other.shape != target.shape:
                raise ValueError(
                    'The networks should see images of one size: their data preprocessors should '
                    f'pad alike. Found labels {tuple(target.shape)} for {first!r}, '
                    f'{tuple(other.shape)} for {name!r}.'
                )
        return JointUnits(
            logits=tuple(seg_logits(records[path].args[0], path) for records in taps.values()),
            labels=target,
            align_corners=tuple(head.align_corners for head in self.heads.values()),
        )

    def predict(
        self,
        networks: Mapping[str, BaseSegmentor],
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list[SegDataSample]],
        weights: Tensor,
    ) -> list[SegDataSample]:
        """The ensemble's predictions, by the weighted mean of the networks' logits."""
        first = self.reference
        frame = _padding(data_samples[first])
        mixture: float | Tensor = 0
        predicted = {}
        for (name, network), weight in zip(networks.items(), weights, strict=True):
            samples = [shallow_copy(sample) for sample in data_samples[name]]
            logits = network.inference(inputs[name], [sample.metainfo for sample in samples])
            predicted[name] = network.postprocess_result(logits, samples)
            own = _padding(samples)
            if own != frame:  # another size divisor, say
                logits = F.pad(logits, [a - b for a, b in zip(frame, own, strict=True)])
            mixture = mixture + weight * logits
        together = networks[first].postprocess_result(mixture, data_samples[first])
        return with_networks(together, predicted)


def _padded_label(sample: SegDataSample, ignored: int) -> Tensor:
    """Labels ``(H, W)``, padded like the image: in eval mode mmseg pads only the image."""
    label, meta = sample.gt_sem_seg.data.squeeze(0), sample.metainfo
    if 'img_padding_size' not in meta:
        return label
    padded = F.pad(label, tuple(meta['img_padding_size']), value=ignored)
    return padded if padded.shape == tuple(meta['pad_shape']) else label


def _padding(samples: list[SegDataSample]) -> list[int]:
    """Left, right, top, bottom of a batch's images, which are of one size when predicted on."""
    meta = samples[0].metainfo
    return list(meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0))))
