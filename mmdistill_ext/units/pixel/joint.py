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
from mmdistill_ext.units.pixel.head import MAIN, check_logits, find_head, find_map_head
from mmdistill_ext.units.pixel.head_logits import HeadLogits


class JointPixels(JointHeads):
    """Joins the heads that several segmenters predict with, pixel by pixel of the labels.

    The logits are those that each head's own loss is formed of
    (:class:`~mmdistill_ext.units.pixel.head_logits.HeadLogits`). They stay at their heads' strides,
    which may differ; the labels are those of the batch, at full size. PointRend, whose last stage
    sees only points in training, is joined by the stage before.

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
        found = {name: find_map_head(x, f'students.{name}') for name, x in networks.items()}
        self._heads = found
        self.heads = {name: head.logits for name, head in found.items()}
        self._final = {
            name: find_head(x, MAIN, f'students.{name}').logits for name, x in networks.items()
        }
        (first, lead), *others = self.heads.items()
        for name, head in others:
            _check_same(_traits(lead), _traits(head), first, name)
        self.num_classes = lead.num_labels
        self.ignore_index = lead.ignore_index
        self.sigmoid = lead.sigmoid

    @staticmethod
    def labels_of(sample: SegDataSample) -> Tensor:
        """Label map of an image, ``(1, H, W)``."""
        return sample.gt_sem_seg.data

    def taps(self, name: str) -> tuple[str, ...]:
        """Path of the method that forms the own loss of a network's head."""
        return (self._heads[name].loss,)

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
        logits = {name: self._logits(name, records) for name, records in taps.items()}
        return self._units(logits, data_samples)

    def evaluated(
        self,
        networks: Mapping[str, BaseSegmentor],
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list[SegDataSample]],
    ) -> JointUnits:
        """The units of a batch that nothing is learned from, in eval mode (COL-3).

        The logits are those that the heads predict with: some cannot form their loss in this mode.

        Args:
            networks: Name -> an mmseg segmentor.
            inputs: Name -> preprocessed batch ``(B, 3, H, W)``.
            data_samples: Name -> the batch's data samples, with labels.
        """
        logits = {}
        for name, network in networks.items():
            head = self._heads[name]
            with Taps(network, dict(head=head.output), stop_after=dict(head=1)) as taps:
                network.encode_decode(inputs[name], [x.metainfo for x in data_samples[name]])
            logits[name] = check_logits(head.logits.of_output(taps['head']), head.path)
        return self._units(logits, data_samples)

    def _units(
        self, logits: Mapping[str, Tensor], data_samples: Mapping[str, list[SegDataSample]]
    ) -> JointUnits:
        """Units of the networks' logits and the labels, which should be of one size."""
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
            logits=tuple(logits.values()),
            labels=target,
            align_corners=tuple(head.head.align_corners for head in self.heads.values()),
        )

    def _logits(self, name: str, records: Taps) -> Tensor:
        path = self._heads[name].loss
        return check_logits(self.heads[name].of_loss(records[path]), path)

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
            mixture = mixture + weight * self._final[name].of_map(logits)
        together = networks[first].postprocess_result(mixture, data_samples[first])
        return with_networks(together, predicted)


def _traits(head: HeadLogits) -> dict[str, int | bool]:
    """What the heads of all networks should have in common, by its key."""
    return dict(
        num_classes=head.num_labels,
        out_channels=head.head.out_channels,
        ignore_index=head.ignore_index,
        use_sigmoid=head.sigmoid,
    )


def _check_same(one: dict, other: dict, first: str, name: str) -> None:
    for key, value in one.items():
        if value != other[key]:
            raise ValueError(
                f"`students` should have heads of the same `{key}`. Found {value} in '{first}', "
                f"{other[key]} in '{name}'."
            )


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
