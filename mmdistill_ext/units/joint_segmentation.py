"""Units of several segmenters: pixels (COL-8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmdistill_ext.functional.checks import check_labels
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.joint import JointUnits, shallow_copy, with_networks
from mmdistill_ext.units.segmentation import find_head, is_sigmoid, seg_logits

HEAD = 'decode_head'


class JointSegmentation:
    """Pairs the heads that several segmenters predict with, pixel by pixel of the labels.

    The logits are taken from the arguments of each head's own ``loss_by_feat``. They stay at their
    heads' strides, which may differ; the labels are those of the batch, at full size.

    Args:
        networks: Name -> an mmseg segmentor.

    Raises:
        ValueError: A head has no per-pixel logits, or the heads differ in classes, output
            channels, the label that they ignore, or softmax and sigmoid.
    """

    background = False
    average = 'valid'
    prefix = 'decode.'  # of the head's own losses

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.heads = {
            name: find_head(network, HEAD, f'students.{name}') for name, network in networks.items()
        }
        (first, lead), *others = self.heads.items()
        for name, head in others:
            for what in ('num_classes', 'out_channels', 'ignore_index', 'use_sigmoid'):
                mine, its = (
                    is_sigmoid(x) if what == 'use_sigmoid' else getattr(x, what)
                    for x in (lead, head)
                )
                if mine != its:
                    raise ValueError(
                        f'`students` should have heads of the same `{what}`. Found {mine} in '
                        f"'{first}', {its} in '{name}'."
                    )
        self.num_classes: int = lead.num_classes
        self.ignore_index: int = lead.ignore_index
        self.sigmoid = is_sigmoid(lead)
        self._checked = False

    def taps(self, name: str) -> tuple[str, ...]:
        """Paths to tap in a network."""
        return (f'{HEAD}.loss_by_feat',)

    def __call__(
        self, taps: Mapping[str, Taps], data_samples: Mapping[str, list[SegDataSample]]
    ) -> JointUnits:
        """Build the units of one step from the tapped calls.

        Raises:
            ValueError: The networks' labels have different sizes, or a label is outside of the
                classes (the first batch is looked at).
        """
        (path,) = self.taps('')
        labels = {name: _labels(samples) for name, samples in data_samples.items()}
        (first, target), *others = labels.items()
        for name, other in others:
            if other.shape != target.shape:
                raise ValueError(
                    'The networks should see images of one size: their data preprocessors should '
                    f'pad alike. Found labels {tuple(target.shape)} for {first!r}, '
                    f'{tuple(other.shape)} for {name!r}.'
                )
        if not self._checked:
            check_labels(target, self.num_classes, self.ignore_index)
            self._checked = True
        return JointUnits(
            logits=tuple(seg_logits(found[path].args[0], path) for found in taps.values()),
            labels=target,
            align_corners=tuple(head.align_corners for head in self.heads.values()),
        )

    def predict(
        self,
        networks: Mapping[str, nn.Module],
        inputs: Mapping[str, Tensor],
        data_samples: Mapping[str, list[SegDataSample]],
        weights: Tensor,
    ) -> list[SegDataSample]:
        """The ensemble's predictions, by the weighted mean of the logits; in them the networks'."""
        mixture, predicted = 0, {}
        for (name, network), weight in zip(networks.items(), weights, strict=True):
            samples = [shallow_copy(sample) for sample in data_samples[name]]
            logits = network.inference(inputs[name], [sample.metainfo for sample in samples])
            mixture = mixture + weight * logits
            predicted[name] = network.postprocess_result(logits, samples)
        first = next(iter(networks))
        together = networks[first].postprocess_result(mixture, data_samples[first])
        return with_networks(together, predicted)


def _labels(samples: list[SegDataSample]) -> Tensor:
    return torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in samples])
