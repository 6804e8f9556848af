"""What a distilled student carries besides itself: the teacher and the terms of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmdistill_ext.distillers.fit import build_fit
from mmdistill_ext.distillers.schedule import Schedule
from mmdistill_ext.distillers.teacher import Teacher
from mmdistill_ext.functional.checks import check_labels
from mmdistill_ext.registry import MODELS
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.base import FusedCrossEntropy
from mmdistill_ext.units.pair import HeadPair
from mmdistill_ext.units.pairing import pair_heads

SUMMED = ('l_soft', 'l_hard')
"""Scalars to which every term on a head adds its share."""


@dataclass
class Term:
    """One named loss between a head of the student and one of the teacher."""

    name: str
    loss: nn.Module
    pair: HeadPair
    schedule: Schedule
    fused: FusedCrossEntropy | None = None  # the head's own loss, where a term may form it


class Distillation:
    """One step of teacher-student training, around the student's own loss.

    It is no ``nn.Module`` and copies of the student share it: the teacher is in memory once.

    Args:
        student: The built student.
        teacher: The teacher's arguments (see :class:`Teacher`).
        losses: Name -> config of a loss, with the distiller's own keys ``head``, ``teacher_head``,
            ``weight``, ``begin``, ``warmup``, ``stop`` among the loss's.
        fuse_task_loss: Let the first active term of a head form the head's own cross-entropy too,
            in the same pass over the logits.
        fit: Arguments of :class:`~mmdistill_ext.distillers.fit.Fit`; implies ``fuse_task_loss``.

    Raises:
        ValueError: No losses, or a value is impossible.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: dict,
        losses: dict,
        fuse_task_loss: bool = False,
        fit: dict | None = None,
    ) -> None:
        if not losses:
            raise ValueError('`losses` should name at least one loss. Found none.')
        self.teacher = Teacher(**teacher)
        self.teacher.match_input(student)
        fuse = 'fit' if fit is not None else 'fuse_task_loss=True' if fuse_task_loss else None
        self.terms = [
            self._build_term(student, name, dict(cfg), fuse) for name, cfg in losses.items()
        ]
        self.fit = None if fit is None else build_fit(fit)
        if self.fit is not None:
            check_task(self.main_term)
        self.classes: tuple[str, ...] = self.teacher.classes or tuple(
            str(index) for index in range(self.terms[0].pair.data_classes)
        )
        self._labels_checked = False

    def _build_term(self, student: nn.Module, name: str, cfg: dict, fuse: str | None) -> Term:
        key = f'losses.{name}'
        keys = ('weight', 'begin', 'warmup', 'stop')
        schedule = Schedule(**{k: cfg.pop(k) for k in keys if k in cfg}, key=key)
        head, teacher_head = cfg.pop('head', None), cfg.pop('teacher_head', None)
        cfg.setdefault('_scope_', MODELS.scope)
        try:
            loss = MODELS.build(cfg)
        except (TypeError, ValueError) as error:
            raise ValueError(f'`{key}`: {error}') from error
        pair = pair_heads(student, self.teacher.model, head, teacher_head, key)
        loss.check(pair.num_classes, pair.sigmoid, pair.background, pair.box_distances)
        return Term(name, loss, pair, schedule, pair.fused_loss(fuse) if fuse else None)

    @property
    def main_term(self) -> Term | None:
        """The first term on the head that the student predicts with."""
        return next((term for term in self.terms if term.pair.predicts), None)

    @property
    def losses(self) -> dict[str, nn.Module]:
        """Name -> loss module."""
        return {term.name: term.loss for term in self.terms}

    def __deepcopy__(self, memo: dict) -> Distillation:
        return self

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast everything with the student (``.to()``, ``.half()``, ``.cuda()``)."""
        for module in (self.teacher, *self.losses.values()):
            module._apply(fn)

    def active(self) -> list[tuple[Term, float]]:
        """The terms that count at the current iteration, with their weights."""
        iteration = MessageHub.get_current_instance().get_info('iter', 0)
        weights = ((term, term.schedule.at(iteration)) for term in self.terms)
        return [(term, weight) for term, weight in weights if weight > 0]

    def step(
        self,
        student: nn.Module,
        student_loss: Callable[..., dict],
        inputs: Tensor,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """The student's own losses and those of the active terms; without any, just the former.

        Args:
            student: The student, for the taps.
            student_loss: Its ``forward``.
            inputs: Batch ``(B, 3, H, W)``, preprocessed for the student.
            data_samples: The batch's data samples.

        Returns:
            Named scalars, as the framework's ``parse_losses`` takes them.
        """
        active = self.active()
        if not active:
            return student_loss(inputs, data_samples, mode='loss')
        heads = list(dict.fromkeys(term.pair.teacher_tap for term, _ in active))
        teacher_calls = self.teacher(inputs, data_samples, heads)
        paths = {path: path for term, _ in active for path in term.pair.student_taps}
        replace = {term.pair.student_tap: _no_loss for term, _ in active if term.fused}
        split = self.fit.split() if self.fit else None
        with Taps(student, paths, replace) as taps, ExitStack() as stack:
            first = {}  # head -> the first active term on it
            for term, _ in active:
                first.setdefault(term.pair.student_tap, term)
            own = {}  # head -> the split of the loss that it forms itself
            for tap, term in first.items():
                if split and term.pair.splits_own:
                    arguments = (taps, teacher_calls[term.pair.teacher_tap], data_samples, split)
                    own[tap] = stack.enter_context(term.pair.split_own(*arguments))
            losses = student_loss(inputs, data_samples, mode='loss')
            built = {}  # heads of student and teacher -> their units
            for term, weight in active:
                pair = term.pair
                if pair.heads not in built:
                    call = teacher_calls[pair.teacher_tap]
                    arguments = (taps, call, data_samples, split, own.get(pair.student_tap))
                    built[pair.heads] = pair(*arguments)
                units, leads = built[pair.heads], first[pair.student_tap] is term
                units = dataclasses.replace(
                    units, fused=term.fused if leads else None, own=units.own if leads else None
                )
                if not self._labels_checked:
                    count = pair.num_classes + pair.background
                    check_labels(units.labels, count, units.ignore_index)
                for key, value in term.loss(units, weight).items():
                    full = f'{pair.prefix}.{_rename(key, term.name)}'
                    shared = key in SUMMED and full in losses
                    losses[full] = losses[full] + value if shared else value
                if split and leads and pair.predicts:
                    self.fit.record(term.loss.pop_fit_sums())
            taps.clear()
        self._labels_checked = True
        return losses


def check_task(term: Term | None) -> None:
    """Refuse the fit loss where there is no task loss to split and to measure (FIT-1).

    Raises:
        ValueError: No loss is on the head that the student predicts with, or that head's own loss
            has the weight 0.
    """
    if term is None:
        raise ValueError(
            '`fit` needs one of the `losses` on the head that the student predicts with '
            "(`head='decode_head'`, 'bbox_head', 'roi_head.bbox_head' or its last stage). Found "
            'none.'
        )
    if term.fused and not term.fused.loss_weight > 0:
        raise ValueError(
            '`fit` needs a student with a task loss: the `loss_weight` of its head should be > 0. '
            f"Found {term.fused.loss_weight} in '{term.fused.name}'."
        )


def _no_loss(seg_logits: Tensor, batch_data_samples: list) -> dict:
    """In place of a head's ``loss_by_feat`` when a term forms that loss in its own pass."""
    return {}


def _rename(key: str, name: str) -> str:
    """``loss`` -> ``loss_<name>``, ``loss_box`` -> ``loss_<name>_box``."""
    return {'loss': f'loss_{name}', 'loss_box': f'loss_{name}_box'}.get(key, key)
