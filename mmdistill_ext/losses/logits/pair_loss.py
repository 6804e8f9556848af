"""What the losses on pairs of teacher and student have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mmengine.dist import all_reduce
from torch import Tensor

from mmdistill_ext.functional import BlockwiseResult, Difference, Distance, Selection
from mmdistill_ext.functional.add_up import add_up
from mmdistill_ext.functional.checks import check_choice, given
from mmdistill_ext.losses.averages import AVERAGES, class_weight_tensor, denominators, scale_of
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.losses.boxes.box_term import BoxTerm, box_loss, build_box_term
from mmdistill_ext.losses.logits.by_head import ByHead
from mmdistill_ext.losses.logits.checks import (
    check_average,
    check_box,
    check_for_sigmoid,
    check_weights,
)
from mmdistill_ext.losses.logits.fused_cross_entropy import own_losses, own_scale, own_weight
from mmdistill_ext.losses.logits.units_pass import Ious, distil_units
from mmdistill_ext.losses.records import Records
from mmdistill_ext.units.base import Contrast, Units
from mmdistill_ext.units.boxes import box_ious

if TYPE_CHECKING:
    from mmdistill_ext.units.pair import HeadPair


class PairLoss(DistillLoss):
    """Distillation on a selection of units, averaged over them on all ranks.

    Each rank divides its own weighted sum by the weights of *all* ranks, times ``world_size``
    because DDP averages gradients: two ranks train as one with both batches.
    ``world_size * sum_u w_u d_u / sum_v w_v``: ``u`` runs over this rank's selected units, ``v``
    over all ranks' (or over all valid ones). Exactly 0 when the denominator is 0.

    With ``units.split`` the weights of hard units are multiplied by ``F(x)``, in the own loss too,
    while the denominators stay as they are: Loss(x) = L_soft + F(x) L_hard (FIT-4, FIT-5).

    Args:
        selection: Which units and boxes are distilled.
        difference: What decides who wins.
        distance: What is distilled.
        class_weight: Weight of each label class, >= 0.
        average: Over the ``'selected'`` or all ``'valid'`` units, or over the number of
            ``'positive'`` ones as detectors do (at least 1).
        box: Arguments of :class:`~mmdistill_ext.losses.boxes.box_term.BoxTerm`, to distil a
            detector's boxes too; averaged over the positive units.
        together: Class and box of a unit are selected together, by the sum of both differences,
            instead of each on its own.

    Attributes:
        records: What is kept for hooks.

    Raises:
        ValueError: When an argument is outside what is named above.
    """

    forms_own_loss = True
    class_weight: Tensor | None

    def __init__(
        self,
        *,
        selection: Selection,
        difference: ByHead[Difference],
        distance: ByHead[Distance],
        class_weight: Sequence[float] | None = None,
        average: str = 'selected',
        box: dict | None = None,
        together: bool = False,
    ) -> None:
        super().__init__()
        check_choice('average', average, AVERAGES)
        if together and box is None:
            raise ValueError(
                '`together=True` needs a `box` to select together with. Found box=None.'
            )
        self.selection = selection
        self.difference = difference
        self.distance = distance
        self.average = average
        self.together = together
        self.box: BoxTerm | None = build_box_term(box)
        self.records = Records()
        self.register_buffer('class_weight', class_weight_tensor(class_weight), persistent=False)

    def check(self, pair: HeadPair) -> None:
        """Refuse heads that the loss does not fit; asked once, before the first step.

        Args:
            pair: The two heads.

        Raises:
            ValueError: On a softmax's difference or distance for a sigmoid head, another number of
                class weights, or a distance of boxes that the heads do not have.
        """
        check_box(self.box, pair)
        check_average(self.average, pair)
        if pair.sigmoid:
            check_for_sigmoid(self.difference.sigmoid, self.distance.sigmoid)
        check_weights(self.class_weight, pair)

    def forward(self, units: Units, weight: float = 1.0) -> dict[str, Tensor]:
        """Form the loss.

        Args:
            units: Predictions of both models, with labels.
            weight: Factor of the distillation, >= 0.

        Returns:
            ``loss``, times ``weight``; with ``box``, ``loss_box`` too; if ``units.fused`` is set,
            the head's own entries, as the head itself gives them; if ``units.split`` is set,
            ``l_soft`` and ``l_hard``, what is in these losses from simple and from hard samples,
            before ``F(x)``.
        """
        ious = self._box_ious(units)
        result = self._run(units, ious)
        total, boxes, fit_sums = self._sums(result, units)
        self._keep(result, units, fit_sums)
        scale = weight * scale_of(total, self.average)
        losses = {'loss': scale * result.distill_sum, **self._shares(result)}
        if units.fused is not None:
            losses.update(own_losses(result, units.labels, units.fused))
        box_parts = None
        if self.box is not None:
            selected = self._select_boxes(units, result, ious)
            box_scale = weight * self.box.weight * scale_of(boxes, 'positive')
            losses['loss_box'], box_parts = box_loss(self.box, units, selected, box_scale)
        if units.split is not None:
            parts = self._parts(result, units, scale, box_parts)
            losses['l_soft'], losses['l_hard'] = add_up(parts).unbind()
        return losses

    def _shares(self, result: BlockwiseResult) -> dict[str, Tensor]:
        """More scalars for the log."""
        return {}

    def _run(self, units: Units, ious: Ious | None) -> BlockwiseResult:
        """The pass over all units."""
        return distil_units(
            units,
            ious if self.together else None,
            difference=self.difference.of(units.sigmoid),
            selection=self.selection,
            distance=self.distance.of(units.sigmoid),
            class_weight=self.class_weight,
            keep_wins=self.records.keep_contrast or self.together,
        )

    def _sums(self, result: BlockwiseResult, units: Units) -> tuple[Tensor, Tensor, Tensor | None]:
        """Denominator of the distillation, number of boxes, and FIT's sums, of all ranks.

        One collective brings all of them (FIT-2).
        """
        sums = denominators(result, self.average, self.class_weight)
        if units.boxes is not None:  # a head may train boxes of units that are background
            sums[1] = len(units.boxes.scale)
        if units.split is not None and units.fused is not None:
            own_parts = given(result.own_parts, 'own_parts')
            gt = torch.stack((own_parts.sum(), own_weight(result, units.fused)))
            samples = given(result.simple_counts, 'simple_counts')
            sums = torch.cat((sums, gt, samples.to(sums)))
        elif units.own is not None:
            sums = torch.cat((sums, units.own.sums.to(sums), units.own.samples.to(sums)))
        all_reduce(sums)
        return sums[0], sums[1], sums[2:] if len(sums) > 2 else None

    def _keep(self, result: BlockwiseResult, units: Units, fit_sums: Tensor | None) -> None:
        self.records.add_counts(result.counts)
        if self.records.keep_contrast:
            valid = units.labels != units.ignore_index
            wins = given(result.wins, 'wins')
            self.records.put_contrast(Contrast(wins, valid, units.paint))
        if fit_sums is not None:
            self.records.put_fit_sums(fit_sums)

    def _parts(
        self, result: BlockwiseResult, units: Units, scale: Tensor, box_parts: Tensor | None
    ) -> list[Tensor]:
        """Simple and hard part of each loss, ``(2,)``, before ``F(x)`` (FIT-4)."""
        parts = [scale * given(result.distill_parts, 'distill_parts')]
        if units.fused is not None:
            own_parts = given(result.own_parts, 'own_parts')
            parts.append(own_scale(result, units.labels, units.fused) * own_parts)
        if units.own is not None:
            parts.append(units.own.parts)
        return parts if box_parts is None else [*parts, box_parts]

    def _box_ious(self, units: Units) -> Ious | None:
        compares = self.box is not None and self.selection.compares_boxes
        return box_ious(given(units.boxes, 'boxes')) if compares else None

    def _select_boxes(self, units: Units, result: BlockwiseResult, ious: Ious | None) -> Tensor:
        """Which boxes of positive units are distilled, ``(P,)`` bool."""
        boxes = given(units.boxes, 'boxes')
        wins = given(result.wins, 'wins')[boxes.index] if self.together else None
        if ious is None:
            ious = (torch.zeros_like(boxes.scale),) * 2
        return self.selection.boxes(*ious, wins)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f'distance={self.distance.softmax}, difference={self.difference.softmax}, '
            f'average={self.average}'
        )
