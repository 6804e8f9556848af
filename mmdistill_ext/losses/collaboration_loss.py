"""What several networks learn from their second prediction (COL-3, COL-4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from mmdistill_ext.functional import (
    BlockReader,
    CollaborationResult,
    Labels,
    Side,
    collaborate,
    networks_correlation,
)
from mmdistill_ext.functional.checks import check_factor, check_temperature, given
from mmdistill_ext.losses.averages import scale_of
from mmdistill_ext.losses.boxes.joint_box_term import JointBoxTerm
from mmdistill_ext.policies.second_predictions import SecondPrediction
from mmdistill_ext.units.joint import JointUnits

ENSEMBLE = 'ensemble'
"""Name of the networks together in logs and scores, beside the networks' own names."""


class CollaborationLoss(nn.Module):
    """Loss of the second prediction, and each network's pull to it (COL-4; KDCL, CVPR 2020).

    ``L = second_weight * mean_u loss(z_u, y_u) + weight * sum_n mean_u T^2 KL(z_u || z_n,u)``,
    where ``z`` is the second prediction of the networks' ``z_n``. The first part trains all
    networks through the mixture; in the second part ``z`` is constant. The mean is over the valid
    pixels of all ranks, or over the positive units of all ranks for detectors. Boxes of positive
    units add the same two parts, see
    :class:`~mmdistill_ext.losses.boxes.joint_box_term.JointBoxTerm`.

    Args:
        names: The networks' names, in the order of the units' logits.
        second: Policy of the second prediction, bound to the networks' labels.
        is_detection: The units are those of objects.
        num_classes: Of the labels, background not counted.
        second_weight: Factor of the second loss, >= 0.
        temperature: ``T`` of the pull, > 0.
        box: The second prediction of boxes; None for none.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        names: Sequence[str],
        second: SecondPrediction,
        *,
        is_detection: bool,
        num_classes: int,
        second_weight: float = 1.0,
        temperature: float = 1.0,
        box: JointBoxTerm | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature, 'kl.temperature')
        check_factor('second_weight', second_weight)
        self.names = tuple(names)
        self.second = second
        self.average = 'positive' if is_detection else 'valid'
        self.num_classes = num_classes
        self.second_weight = second_weight
        self.temperature = temperature
        self.box = box

    def forward(
        self, units: JointUnits, weight: float, network_weights: Tensor
    ) -> dict[str, Tensor]:
        """Form the losses of one step (COL-3, COL-4).

        Args:
            units: What the networks predict; with boxes if there is a term for them.
            weight: Factor of the pull at this iteration, >= 0.
            network_weights: ``(N,)``, for policies that take them from the validation.

        Returns:
            ``ensemble/loss`` and ``<network>/loss_kl``, ``ensemble/loss_box`` and
            ``<network>/loss_kl_box``: those whose factor is above 0.
        """
        mixing = network_weights if self.second.weights_from else None
        result = self._collaborate(units, weight > 0, mixing)
        scale, box_scale = self._scales(result, units)
        losses = self._named('', scale, weight, result.second_sum, result.pull_sums)
        if self.box is not None:
            second, pulls = self.box(given(units.boxes, 'boxes'), mixing)
            losses |= self._named('_box', box_scale * self.box.weight, weight, second, pulls)
        return losses

    def error_correlation(self, units: JointUnits) -> Tensor:
        """Sums of the products of the networks' errors, ``(N, N)`` float64 (COL-3, KDCL)."""
        return networks_correlation(self._read(units), self.second.label_spec.difference)[0]

    def _collaborate(
        self, units: JointUnits, pull: bool, network_weights: Tensor | None
    ) -> CollaborationResult:
        second, label_spec = self.second, self.second.label_spec

        def combine(logits: Tensor, labels: Tensor, image_weights: Tensor | None) -> Tensor:
            weights = image_weights if network_weights is None else network_weights
            return second.combine(logits, labels, weights)

        return collaborate(
            self._read(units),
            combine,
            weigh_image=second.weigh_image if second.per == 'image' else None,
            difference=label_spec.difference,
            distance='bce' if label_spec.sigmoid else 'kl',
            temperature=self.temperature,
            second=self.second_weight > 0,
            pull=pull,
        )

    def _read(self, units: JointUnits) -> BlockReader:
        label_spec = self.second.label_spec
        return BlockReader(
            [Side(*side) for side in zip(units.logits, units.align_corners, strict=True)],
            Labels(units.labels, label_spec.ignore_index, label_spec.background),
        )

    def _scales(self, result: CollaborationResult, units: JointUnits) -> tuple[Tensor, Tensor]:
        """What this rank's sums over units and over boxes are multiplied by.

        Two ranks train as one: the sums are divided by the numbers of all ranks.
        """
        counts = result.counts
        if self.average == 'positive':
            counts = counts[: self.num_classes]
        total = counts.sum().to(result.second_sum)
        boxes = total.new_tensor(0 if units.boxes is None else len(units.boxes.scale))
        totals = torch.stack((total, boxes))
        all_reduce(totals)
        return scale_of(totals[0], self.average), scale_of(totals[1], 'positive')

    def _named(
        self, suffix: str, scale: Tensor, weight: float, second: Tensor, pulls: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        losses = {}
        if self.second_weight:
            losses[f'{ENSEMBLE}/loss{suffix}'] = self.second_weight * scale * second
        if weight:
            for name, pull in zip(self.names, pulls, strict=True):
                losses[f'{name}/loss_kl{suffix}'] = weight * scale * pull
        return losses
