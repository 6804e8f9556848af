"""The teacher-student distiller (FIT, SEL and plain distillation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from mmengine.model import BaseModel
from torch import Tensor

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.distillers.distillation import Distillation
from mmdistill_ext.distillers.extension import extend, register_extension
from mmdistill_ext.distillers.loss_guard import LossGuard
from mmdistill_ext.distillers.missing_teacher import MissingTeacher

if TYPE_CHECKING:
    from mmengine.model import BaseModel as Student  # what it is mixed into
else:
    Student = object


class DistilledModel(Student):
    """Mixed into the class of a built student: its loss gains the terms of a distillation.

    See :func:`~mmdistill_ext.distillers.extension.extend`. What terms learn or remember is part of
    the student under ``connectors``, which exists only if some term does.
    """

    distillation: Distillation | MissingTeacher

    def init_weights(self) -> None:
        """The student's; the training begins here, so the teacher has to be there."""
        self.distillation.start()
        super().init_weights()

    def forward(
        self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'
    ) -> Any:
        """The student's ``forward``; ``mode='loss'`` adds the terms of the distillation."""
        if mode != 'loss':
            return super().forward(inputs, data_samples, mode)
        return self.distillation.step(self, super().forward, inputs, data_samples)

    @property
    def loss_guard(self) -> LossGuard:
        """Ends the training at a loss that is not finite."""
        return self.distillation.guard

    def parse_losses(self, losses: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's ``parse_losses``; the sum is looked at before the optimizer's step."""
        loss, log_vars = super().parse_losses(losses)
        self.loss_guard.watch(loss, log_vars)
        return loss, log_vars

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.distillation.apply(fn)
        return super()._apply(fn, recurse)

    def _set_device(self, device: torch.device) -> None:
        self.distillation.set_device(device)
        super()._set_device(device)


@register_extension('TeacherStudentDistiller', inner='student')
def build_teacher_student(
    student: dict | str,
    teacher: dict,
    losses: dict,
    fuse_task_loss: bool = False,
    fit: dict | None = None,
    data_preprocessor: dict | None = None,
) -> BaseModel:
    """Build a student that learns from its labels and from a frozen teacher.

    Args:
        student: A model dict, a config path, or ``'mmseg::pspnet/...py'``.
        teacher: ``dict(model=..., checkpoint=...)``, with ``model`` in the same three forms; for
            losses of features any model (see :class:`~mmdistill_ext.distillers.teacher.Teacher`).
        losses: Name -> loss, e.g. ``dict(sel=dict(type='SelectiveLoss', temperature=2.0))``.
            Besides the loss's own arguments each takes ``weight`` (>= 0), ``begin``, ``warmup`` and
            ``stop`` (iterations). A loss of units takes ``head`` and ``teacher_head`` (by default
            the one that the model predicts with); a loss of features ``tap`` and ``teacher_tap``
            (the same when not given), ``connector``, ``grid`` and ``weight_by``, e.g.
            ``dict(cwd=dict(type='CWDLoss', tap='neck.0', connector=dict(type='Conv1x1')))``. When
            all are off the teacher does not run.
        fuse_task_loss: Form the head's own cross-entropy in the same block-wise pass.
        fit: Learn from what the teacher gets wrong by F(x), e.g.
            ``dict(function=dict(type='ExponentialFit', b=10.0), split='unit')`` (see
            :class:`~mmdistill_ext.distillers.fit.Fit`). It splits the losses of the heads that
            ``losses`` name, their own included, so it implies ``fuse_task_loss``; a ``FitHook``
            measures x.
        data_preprocessor: For a student that names none; the runner hands it over when the config
            has one beside the model.

    Returns:
        The student, its class extended by :class:`DistilledModel`; ``model.distillation`` holds the
        teacher and the losses.

    The student alone predicts, so files of the teacher that are not at hand are no error here:
    ``init_weights``, by which a training starts, raises it, or else the first loss.

    Raises:
        ValueError: Student, teacher and losses do not fit each other; the message names the key.
        FileNotFoundError: The student's config does not exist.
    """
    cfg = resolve_model_cfg(student, 'student')
    if data_preprocessor is not None:
        cfg.setdefault('data_preprocessor', data_preprocessor)
    model = build_model(cfg, 'student')
    if not isinstance(model, BaseModel):
        raise ValueError(
            '`student` should be a segmentor of mmsegmentation, a detector of mmdetection, or '
            f'another model of mmengine with a loss. Found {type(model).__name__}.'
        )
    distillation: Distillation | MissingTeacher
    try:
        distillation = Distillation(model, teacher, losses, fuse_task_loss, fit)
    except OSError as error:  # a config that is not here, a download that fails
        distillation = MissingTeacher(error)
    connectors = distillation.trainables()
    state = dict(connectors=connectors) if connectors else {}
    return extend(model, DistilledModel, distillation=distillation, **state)
