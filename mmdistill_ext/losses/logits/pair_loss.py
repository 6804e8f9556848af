"""What the losses on pairs of teacher and student have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from torch import Tensor

from mmdistill_ext.functional import BlockwiseResult, blockwise_distillation
from mmdistill_ext.functional.checks import (
    DIFFERENCES,
    DISTANCES,
    check_choice,
    check_temperature,
    num_label_classes,
)
from mmdistill_ext.functional.fit import weigh_rows
from mmdistill_ext.losses.averages import (
    AVERAGES,
    class_weight_tensor,
    denominators,
    scale_of,
)
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.losses.boxes.box_term import BoxTerm
from mmdistill_ext.losses.logits.fused_cross_entropy import own_losses, own_scale, own_weight
from mmdistill_ext.units.base import Contrast, Units
from mmdistill_ext.units.boxes import box_ious


class PairLoss(DistillLoss):
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
        average: Over the ``'selected'`` or all ``'valid'`` units, or over the number of
            ``'positive'`` ones as detectors do (at least 1).
        box: Arguments of :class:`~mmdistill_ext.losses.boxes.box_term.BoxTerm`, to distil a
            detector's boxes too; averaged over the positive units.
        together: Class and box of a unit are selected together, by the sum of both differences,
            instead of each on its own.

    Attributes:
        keep_contrast: Set to True to have the next forward keep what :meth:`pop_contrast` gives.

    Raises:
        ValueError: When an argument is outside what is named above.
    """

    forms_own_loss = True
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
        box: dict | None = None,
        together: bool = False,
    ) -> None:
        super().__init__()
        if distance is not None:
            check_choice('distance', distance, DISTANCES)
        if difference is not None:
            check_choice('difference', difference, DIFFERENCES)
        check_temperature(temperature)
        check_choice('average', average, AVERAGES)
        if together and box is None:
            raise ValueError(
                '`together=True` needs a `box` to select together with. Found box=None.'
            )
        if box is not None and not isinstance(box, dict):
            raise ValueError(f"`box` should be a dict such as dict(distance='iou'). Found {box!r}.")
        self.box = None if box is None else BoxTerm(**box)
        self.together = together
        self.selection = selection
        self.distance = distance
        self.difference = difference
        self.temperature = temperature
        self.average = average
        self.keep_contrast = False
        self._contrast: Contrast | None = None
        self._fit_sums: Tensor | None = None
        self.register_buffer('class_weight', class_weight_tensor(class_weight), persistent=False)
        self.register_buffer('counts', None, persistent=False)

    def kinds(self, sigmoid: bool) -> tuple[str, str]:
        """Difference and distance for a head with or without sigmoid."""
        automatic = ('bce', 'bce') if sigmoid else ('ce', 'kl')
        return self.difference or automatic[0], self.distance or automatic[1]

    def check(
        self,
        num_classes: int,
        sigmoid: bool,
        background: bool = False,
        box_distances: Sequence[str] = (),
    ) -> None:
        """Whether the loss fits a head, to be asked before the first step.

        Args:
            num_classes: Number of label classes, 2 for a binary head; background not counted.
            sigmoid: The head predicts independent sigmoids instead of one softmax.
            background: The head is a detector's: there is background besides the classes.
            box_distances: Distances that there are between the boxes of the two heads.

        Raises:
            ValueError: On softmax kinds for a sigmoid head, another number of class weights, or a
                distance of boxes that the heads do not have.
        """
        if self.box is not None and self.box.distance not in box_distances:
            raise ValueError(
                f'`box.distance` should be one of {", ".join(box_distances)} for these heads. '
                f'Found {self.box.distance!r}.'
                if box_distances
                else f'`box` is for heads with boxes: leave it out. Found {self.box.distance!r}.'
            )
        if self.average == 'positive' and not background:
            raise ValueError("`average='positive'` is for detectors. Found a head without boxes.")
        softmax = [kind for kind in self.kinds(sigmoid) if kind in ('ce', 'kl', 'reverse_kl')]
        if sigmoid and softmax:
            raise ValueError(
                "`difference` and `distance` should be 'bce' (or 'mse') for a sigmoid head. "
                f'Found {", ".join(map(repr, softmax))}.'
            )
        expected = num_classes + 1 if background else num_label_classes(num_classes)
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
            ``loss``, times ``weight``; if ``units.fused`` is set, the head's own entries too, as
            the head itself gives them; if ``units.split`` is set, ``l_soft`` and ``l_hard`` too,
            what is in these losses from simple and from hard samples, before ``F(x)``.
        """
        compared = self.box is not None and self.selection == 'teacher_better'
        ious = box_ious(units.boxes) if compared else None
        result = self._run(units, ious)
        scale = weight * self._scale(result, units)
        losses = {'loss': scale * result.distill_sum, **self._shares(result)}
        parts = []
        if units.fused is not None:
            losses.update(own_losses(result, units.labels, units.fused))
        if units.split is not None:
            parts.append(scale * result.distill_parts)
            if units.fused is not None:
                parts.append(own_scale(result, units.labels, units.fused) * result.task_parts)
            if units.own is not None:
                parts.append(units.own.parts)
        if self.box is not None:
            losses['loss_box'], box_parts = self._box_loss(result, units, ious, weight)
            parts.append(box_parts)
        if units.split is not None:
            losses['l_soft'], losses['l_hard'] = sum(parts).unbind()
        return losses

    def _shares(self, result: BlockwiseResult) -> dict[str, Tensor]:
        """More scalars for the log."""
        return {}

    def _box_loss(
        self,
        result: BlockwiseResult,
        units: Units,
        ious: tuple[Tensor, Tensor] | None,
        weight: float,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and its parts ``(2,)`` if split."""
        index = units.boxes.index
        if self.together:
            selected = result.wins[index]
        elif ious is not None:
            student, teacher = ious
            selected = teacher > student  # the smaller 1 - IoU
        else:
            selected = torch.ones_like(index[0], dtype=torch.bool)
        distances = self.box(units.boxes, selected)
        scale = weight * self.box.weight * scale_of(self._positives, 'positive')
        if units.split is None:
            return scale * distances.sum(), None
        return weigh_rows(distances, units.simple[index], units.split.hard_weight, scale)

    def _run(self, units: Units, ious: tuple[Tensor, Tensor] | None = None) -> BlockwiseResult:
        extras = (None, None)
        if self.together:
            zeros = torch.zeros_like(units.labels, dtype=torch.float32)
            extras = tuple(zeros.index_put(units.boxes.index, 1 - iou) for iou in ious)
        student_extra, teacher_extra = extras
        difference, distance = self.kinds(units.sigmoid)
        task_class_weight = units.fused.class_weight if units.fused is not None else None
        if task_class_weight is not None:
            task_class_weight = units.student.new_tensor(task_class_weight, dtype=torch.float32)
        split = {}
        if units.split is not None:
            split = dict(
                split=units.split.by,
                simple=units.simple,
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
            background=units.background,
            student_extra=student_extra,
            teacher_extra=teacher_extra,
            student_align_corners=units.student_align_corners,
            teacher_align_corners=units.teacher_align_corners,
            task=units.fused is not None,
            task_class_weight=task_class_weight,
            keep_contrast=self.keep_contrast or self.together,
            **split,
        )
        self.counts = result.counts if self.counts is None else self.counts + result.counts
        if self.keep_contrast:
            valid = units.labels != units.ignore_index
            self._contrast = Contrast(result.wins, valid, units.paint)
        return result

    def _scale(self, result: BlockwiseResult, units: Units) -> Tensor:
        """What the sum is multiplied by; one collective brings FIT's sums along (FIT-2)."""
        sums = denominators(result, self.average, self.class_weight)
        if units.split is not None and units.fused is not None:
            gt = torch.stack((result.task_parts.sum(), own_weight(result, units.fused)))
            sums = torch.cat((sums, gt, result.simple.to(sums)))
        elif units.own is not None:
            sums = torch.cat((sums, units.own.sums.to(sums), units.own.samples.to(sums)))
        all_reduce(sums)
        if len(sums) > 2:
            self._fit_sums = sums[2:]
        total, self._positives = sums[:2]
        return scale_of(total, self.average)

    def pop_fit_sums(self) -> Tensor | None:
        """Sums of the last forward with a split and the task, over all ranks, once; else None.

        Returns:
            ``(4,)``: the task loss before ``F(x)`` and its weights (the first GT loss is their
            quotient; weights are pixels, of detectors images), simple samples and valid samples.
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

    def pop_contrast(self) -> Contrast | None:
        """Where the teacher won and which units are valid (SEL-4).

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
