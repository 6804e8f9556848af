"""What a distilled student carries besides itself: the teacher and the terms of the loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmdistill_ext.arguments import check_arguments
from mmdistill_ext.distillers.build_terms import build_terms
from mmdistill_ext.distillers.first_step import check_schedules, named_at_first
from mmdistill_ext.distillers.fit import Fit, build_fit
from mmdistill_ext.distillers.loss_guard import LossGuard
from mmdistill_ext.distillers.tapped_forward import most_calls
from mmdistill_ext.distillers.teacher import Teacher
from mmdistill_ext.distillers.teacher_check import check_teacher_calls, check_teacher_units
from mmdistill_ext.distillers.terms import SUMMED, HeadTerm, StepRecords, Term
from mmdistill_ext.functional.checks import check_labels, given
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.taps import Taps


class Distillation:
    """One step of teacher-student training, around the student's own loss.

    It is no ``nn.Module`` and copies of the student share it: the teacher is in memory once. What
    its terms learn or remember is part of the student (:meth:`trainables`).

    Args:
        student: The built student.
        teacher: The teacher's arguments (see :class:`Teacher`).
        losses: Name -> config of a loss, with the distiller's own keys among the loss's (see
            :func:`~mmdistill_ext.distillers.build_terms.build_terms`).
        fuse_task_loss: Let the first active term of a head form the head's own cross-entropy too,
            in the same pass over the logits.
        fit: Arguments of :class:`~mmdistill_ext.distillers.fit.Fit`; implies ``fuse_task_loss``.

    Raises:
        ValueError: No losses, or a value is impossible.
    """

    def __init__(
        self,
        student: BaseModel,
        teacher: dict,
        losses: dict,
        fuse_task_loss: bool = False,
        fit: dict | None = None,
    ) -> None:
        check_arguments(Teacher, teacher, 'teacher')
        self._teacher = Teacher(**{**teacher, 'load_now': False})
        self._teacher.input.match(student)
        fuse = 'fit' if fit is not None else 'fuse_task_loss=True' if fuse_task_loss else None
        self.terms = build_terms(student, self._teacher, losses, fuse)
        self.fit = None if fit is None else build_fit(fit)
        if self.fit is not None:
            check_main_term(self.main_term)
        self._teacher.as_in_training = tuple(
            {path: None for term in self.terms for path in term.teacher_training}
        )
        self.guard = LossGuard()
        self._checked: set[str] = set()  # terms that have seen their first batch
        self._started = False

    def start(self) -> None:
        """Read the teacher's weights; building it does not, because inference needs none.

        Raises:
            FileNotFoundError: The teacher's checkpoint does not exist.
            ValueError: It is broken, unsafe, or of another model.
        """
        self._teacher.load()

    @property
    def teacher(self) -> Teacher:
        """The teacher, with its weights."""
        self.start()
        return self._teacher

    @property
    def classes(self) -> tuple[str, ...]:
        """The names that the teacher's checkpoint gives to the classes, or their numbers."""
        heads = self.head_terms
        count = heads[0].pair.data_classes if heads else 0
        return self.teacher.classes or tuple(map(str, range(count)))

    @property
    def head_terms(self) -> list[HeadTerm]:
        """The terms on heads."""
        return [term for term in self.terms if isinstance(term, HeadTerm)]

    @property
    def main_term(self) -> HeadTerm | None:
        """The first term on the head that the student predicts with that forms its own loss."""
        main = (t for t in self.head_terms if t.pair.predicts and t.loss.forms_own_loss)
        return next(main, None)

    @property
    def losses(self) -> dict[str, DistillLoss]:
        """Name -> loss module."""
        return {term.name: term.loss for term in self.terms}

    def trainables(self) -> nn.ModuleDict:
        """Name of a term -> what it learns or remembers, to become part of the student."""
        parts = {term.name: term.trainables() for term in self.terms}
        return nn.ModuleDict({name: nn.ModuleDict(part) for name, part in parts.items() if part})

    def __deepcopy__(self, memo: dict) -> Distillation:
        return self

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast teacher and losses as the student (``.to()``, ``.half()``, ``.cuda()``)."""
        for module in (self._teacher, *self.losses.values()):
            module._apply(fn)

    def set_device(self, device: torch.device) -> None:
        """Tell the teacher's data preprocessors where the student is."""
        self._teacher.model._set_device(device)

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
        data_samples: list | None,
    ) -> dict[str, Tensor]:
        """The student's own losses and those of the active terms; its own alone if none is active.

        Args:
            student: The student, for the taps.
            student_loss: The student's ``forward`` without the distillation.
            inputs: Batch ``(B, 3, H, W)``, preprocessed for the student.
            data_samples: The batch's data samples.

        Returns:
            Named scalars, as the framework's ``parse_losses`` takes them.
        """
        self.guard.see(inputs, data_samples)
        if not self._started:
            check_schedules([term.schedule for term in self.terms])
            student_loss = named_at_first('student', student_loss)
        active = self.active()
        if active:
            losses = self._distil(active, student, student_loss, inputs, data_samples)
        else:
            losses = student_loss(inputs, data_samples, mode='loss')
        self._started = True
        idle = {term.name for term in self.terms} - {term.name for term, _ in active}
        return losses | _idle_losses(student, idle)

    def _distil(
        self,
        active: list[tuple[Term, float]],
        student: nn.Module,
        student_loss: Callable[..., dict],
        inputs: Tensor,
        data_samples: list | None,
    ) -> dict[str, Tensor]:
        terms = [term for term, _ in active]
        leading = _leading_terms(terms)
        wanted = most_calls(term.teacher_calls for term in terms)
        run = self.teacher.calls
        run = run if self._started else named_at_first('teacher.model', run)
        teacher_calls = run(inputs, data_samples, wanted)
        for term in terms:
            if term.name not in self._checked:
                check_teacher_calls(term, teacher_calls)
        split = self.fit.split() if self.fit else None
        paths = {path: path for term in terms for path in term.student_calls}
        replaced = {tap: _no_loss for tap, term in leading.items() if term.fused}
        height, width = inputs.shape[2:]
        with Taps(student, paths, replaced) as taps, ExitStack() as stack:
            records = StepRecords(
                student,
                taps,
                teacher_calls,
                data_samples or [],
                (height, width),
                split,
                leading,
            )
            for tap, lead in leading.items():
                if split and lead.pair.splits_own:
                    call = teacher_calls[lead.pair.teacher_tap][-1]
                    own = lead.pair.split_own(taps, call, records.data_samples, split)
                    records.own[tap] = stack.enter_context(own)
            losses = student_loss(inputs, data_samples, mode='loss')
            for term, weight in active:
                self._check_once(term, records)
                form = term if self._started else named_at_first(f'losses.{term.name}', term)
                _merge(losses, form(records, weight), term.name)
                if self.fit and isinstance(term, HeadTerm) and term.leads(records):
                    self._record_fit(self.fit, term)
            taps.clear()
        self._checked.update(term.name for term in terms)
        return losses

    def _record_fit(self, fit: Fit, term: HeadTerm) -> None:
        if term.pair.predicts:
            fit.record(given(term.loss.records.pop_fit_sums(), 'fit_sums'))

    def _check_once(self, term: Term, records: StepRecords) -> None:
        """Check labels and teacher in the first step of a term."""
        if isinstance(term, HeadTerm) and term.name not in self._checked:
            units = records.units(term.pair)
            count = term.pair.num_classes + term.pair.background
            check_labels(units.labels, count, term.pair.ignore_index)
            check_teacher_units(term, units)


def check_main_term(term: HeadTerm | None) -> HeadTerm:
    """Refuse the fit loss where there is no own loss to split and to measure (FIT-1).

    Raises:
        ValueError: No loss that can split the own loss is on the head that the student predicts
            with, or that head's own loss has the weight 0.
    """
    if term is None:
        raise ValueError(
            '`fit` needs one of the `losses` on the head that the student predicts with '
            "(`head='decode_head'`, 'bbox_head', 'roi_head.bbox_head' or its last stage), one that "
            'splits its own loss, as KDLoss and SelectiveLoss do. Found none.'
        )
    if term.fused and not term.fused.loss_weight > 0:
        raise ValueError(
            '`fit` needs a student with a task loss: the `loss_weight` of its head should be > 0. '
            f"Found {term.fused.loss_weight} in '{term.fused.name}'."
        )
    return term


def _leading_terms(terms: list[Term]) -> dict[str, HeadTerm]:
    """Tap of a head's own loss -> the first active term that may form that loss."""
    leading: dict[str, HeadTerm] = {}
    for term in terms:
        if isinstance(term, HeadTerm) and term.loss.forms_own_loss:
            leading.setdefault(term.pair.student_tap, term)
    return leading


def _merge(losses: dict[str, Tensor], scalars: dict[str, Tensor], name: str) -> None:
    """Add a term's scalars to the student's.

    Raises:
        ValueError: The model has a loss of such a name already.
    """
    for key, value in scalars.items():
        if key in losses and key.rpartition('.')[2] in SUMMED:
            value = losses[key] + value
        elif key in losses and 'loss' in key:
            raise ValueError(
                f"`losses` should have names that the student's own losses leave free. Found "
                f"'{name}', and '{key}' is there already: choose another name."
            )
        losses[key] = value


def _idle_losses(student: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Losses of 0 over the parameters of terms that are off in this step.

    DistributedDataParallel expects a gradient for every parameter.
    """
    losses = {}
    for name, part in getattr(student, 'connectors', {}).items():
        if name in names and any(parameter.requires_grad for parameter in part.parameters()):
            losses[f'loss_{name}'] = sum(p.sum() * 0 for p in part.parameters())
    return losses


def _no_loss(seg_logits: Tensor, batch_data_samples: list) -> dict:
    """Replaces a head's ``loss_by_feat`` when a term forms that loss in its own pass."""
    return {}
