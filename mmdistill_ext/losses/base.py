"""What the losses on pairs of teacher and student have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from mmdistill_ext.functional import BlockwiseResult, blockwise_distillation
from mmdistill_ext.functional.checks import (
    AVERAGES,
    DIFFERENCES,
    DISTANCES,
    check_choice,
    check_temperature,
    num_label_classes,
)
from mmdistill_ext.losses.task import task_losses, task_scale, task_weight
from mmdistill_ext.units.base import Units


class PairLoss(nn.Module):
    """Distillation on a selection of units, averaged over them on all ranks.

    ``world_size * sum_u w_u d_u / sum_v w_v``: ``u`` runs over this rank's selected units, ``v``
    over all ranks' (or over all valid ones), so that the mean of the ranks' gradients is the
    gradient of the global average. Exactly 0 when the denominator is 0.

    With ``units.split`` the weights of hard units are multiplied by ``F(x)``, in the task loss too,
    while the denominators stay as they are: Loss(x) = L_soft + F(x) L_hard (FIT-4, FIT-5).

    Args:
        selection: A name in :data:`~mmdistill_ext.functional.blockwise.SELECTIONS`.
        distance: ``'kl'``, ``'reverse_kl'``, ``'mse'`` or ``'bce'``; by default ``'kl'``, and
            ``'bce'`` for sigmoid heads.
        difference: ``'ce'`` or ``'bce'``; by default ``'ce'``, and ``'bce'`` for sigmoid heads.
        temperature: > 0.
        class_weight: Weight of each label class, >= 0.
        average: Over the ``'selected'`` or all ``'valid'`` units.

    Attributes:
        keep_contrast: Set to True to have the next forward keep what :meth:`pop_contrast` gives.

    Raises:
        ValueError: When an argument is outside what is named above.
    """

    counts: Tensor | None
    class_weight: Tensor | None

    def __init__(
        self,
        selection: str,
        distance: str | None = None,
        difference: str | None = None,
        temperature: float = 1.0,
        class_weight: Sequence[float] | None = None,
        average: str = 'selected',
    ) -> None:
        super().__init__()
        if distance is not None:
            check_choice('distance', distance, DISTANCES)
        if difference is not None:
            check_choice('difference', difference, DIFFERENCES)
        check_temperature(temperature)
        check_choice('average', average, AVERAGES)
        self.selection = selection
        self.distance = distance
        self.difference = difference
        self.temperature = temperature
        self.average = average
        self.keep_contrast = False
        self._contrast: tuple[Tensor, Tensor] | None = None
        self._fit_sums: Tensor | None = None
        self.register_buffer('class_weight', _class_weight(class_weight), persistent=False)
        self.register_buffer('counts', None, persistent=False)

    def kinds(self, sigmoid: bool) -> tuple[str, str]:
        """Difference and distance for a head with or without sigmoid."""
        automatic = ('bce', 'bce') if sigmoid else ('ce', 'kl')
        return self.difference or automatic[0], self.distance or automatic[1]

    def check(self, num_classes: int, sigmoid: bool) -> None:
        """Whether the loss fits a head, to be asked before the first step.

        Args:
            num_classes: Number of label classes, 2 for a binary head.
            sigmoid: The head predicts independent sigmoids instead of one softmax.

        Raises:
            ValueError: On softmax kinds for a sigmoid head, or another number of class weights.
        """
        softmax = [kind for kind in self.kinds(sigmoid) if kind in ('ce', 'kl', 'reverse_kl')]
        if sigmoid and softmax:
            raise ValueError(
                "`difference` and `distance` should be 'bce' (or 'mse') for a sigmoid head. "
                f'Found {", ".join(map(repr, softmax))}.'
            )
        expected = num_label_classes(num_classes)
        if self.class_weight is not None and len(self.class_weight) != expected:
            raise ValueError(
                f'`class_weight` should hold {expected} weights, one per class. '
                f'Found {len(self.class_weight)}.'
            )

    def forward(self, units: Units, weight: float = 1.0) -> dict[str, Tensor]:
        """Form the loss.

        Args:
            units: Predictions of both models, with labels.
            weight: Factor of the distillation, >= 0.

        Returns:
            ``loss``, times ``weight``; if ``units.task`` is set, the head's own entries too, as
            the head itself gives them; if ``units.split`` is set, ``l_soft`` and ``l_hard`` too,
            what is in these losses from simple and from hard samples, before ``F(x)``.
        """
        return self._losses(self._run(units), units, weight)

    def _run(self, units: Units) -> BlockwiseResult:
        difference, distance = self.kinds(units.sigmoid)
        task_class_weight = units.task.class_weight if units.task is not None else None
        if task_class_weight is not None:
            task_class_weight = units.student.new_tensor(task_class_weight, dtype=torch.float32)
        split = {}
        if units.split is not None:
            split = dict(
                split=units.split.by,
                threshold=units.split.threshold,
                hard_weight=units.split.hard_weight,
            )
        result = blockwise_distillation(
            units.student,
            units.teacher,
            units.labels,
            selection=self.selection,
            difference=difference,
            distance=distance,
            temperature=self.temperature,
            ignore_index=units.ignore_index,
            class_weight=self.class_weight,
            student_align_corners=units.student_align_corners,
            teacher_align_corners=units.teacher_align_corners,
            task=units.task is not None,
            task_class_weight=task_class_weight,
            keep_contrast=self.keep_contrast,
            **split,
        )
        self.counts = result.counts if self.counts is None else self.counts + result.counts
        if self.keep_contrast:
            self._contrast = result.wins, units.labels != units.ignore_index
        return result

    def _losses(self, result: BlockwiseResult, units: Units, weight: float) -> dict[str, Tensor]:
        scale = weight * self._scale(result, units)
        losses = {'loss': scale * result.distill_sum}
        if units.task is not None:
            losses.update(task_losses(result, units.labels, units.task))
        if units.split is not None:
            parts = scale * result.distill_parts
            if units.task is not None:
                parts = parts + task_scale(result, units.labels, units.task) * result.task_parts
            losses['l_soft'], losses['l_hard'] = parts.unbind()
        return losses

    def _scale(self, result: BlockwiseResult, units: Units) -> Tensor:
        """What the sum is multiplied by; one collective brings FIT's sums along (FIT-2)."""
        if self.average == 'selected':
            total = result.distill_weight
        else:
            valid = result.counts[0].to(result.distill_weight)
            total = (valid if self.class_weight is None else valid * self.class_weight).sum()
        sums = total[None].clone()
        if units.split is not None and units.task is not None:
            gt_sum, gt_weight = result.task_parts.sum(), task_weight(result, units.task)
            sums = torch.cat((sums, torch.stack((gt_sum, gt_weight)), result.simple.to(sums)))
        all_reduce(sums)
        if len(sums) > 1:
            self._fit_sums = sums[1:]
        return torch.where(sums[0] > 0, get_world_size() / sums[0], 0)

    def pop_fit_sums(self) -> Tensor | None:
        """Sums of the last forward with a split and the task, over all ranks, once; else None.

        Returns:
            ``(4,)``: the task loss before ``F(x)`` and its weights (the first GT loss is their
            quotient), simple samples and valid samples.
        """
        sums, self._fit_sums = self._fit_sums, None
        return sums

    def pop_counts(self) -> Tensor | None:
        """Counts since the last call, of this rank, and start again.

        Returns:
            ``(2, classes)`` int64: valid units, and units where the teacher wins, per label; None
            before the first forward.
        """
        counts = self.counts
        if counts is not None:
            self.counts = torch.zeros_like(counts)
        return counts

    def pop_contrast(self) -> tuple[Tensor, Tensor] | None:
        """Where the teacher won and which units are valid, both ``(B, ...)`` bool (SEL-4).

        Returns:
            That of the last forward with ``keep_contrast``, once; None without.
        """
        contrast, self._contrast = self._contrast, None
        return contrast

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f'distance={self.distance}, difference={self.difference}, '
            f'temperature={self.temperature}, average={self.average}'
        )


def _class_weight(values: Sequence[float] | None) -> Tensor | None:
    if values is None:
        return None
    weights = [float(value) for value in values]
    if not weights or not all(math.isfinite(value) and value >= 0 for value in weights):
        raise ValueError(f'`class_weight` should be numbers >= 0. Found {list(values)}.')
    return torch.tensor(weights, dtype=torch.float32)
