"""The terms of a distillation: each one named loss, and what it is formed of."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmdistill_ext.distillers.schedule import Schedule
from mmdistill_ext.functional.add_up import add_up
from mmdistill_ext.losses.base import DistillLoss
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.base import FusedCrossEntropy, SplitRule, Units
from mmdistill_ext.units.features.pair import FeaturePair
from mmdistill_ext.units.pair import HeadPair
from mmdistill_ext.units.split.head_split import HeadSplit

SUMMED = ('l_soft', 'l_hard')
"""Scalars to which every term on a head adds its share (FIT-4)."""


@dataclass
class StepRecords:
    """What was recorded in one training step.

    Args:
        student: The student.
        taps: Calls of the student.
        teacher: Path -> calls of the teacher.
        data_samples: The batch's data samples.
        size: Height and width of the batch.
        split: How losses are split into simple and hard samples; None without FIT.
        leading: Tap of a head's own loss -> the term that may form that loss.
        own: Tap of a head's own loss -> how that loss was split, where the head forms it.
    """

    student: nn.Module
    taps: Taps
    teacher: Mapping[str, list[Call]]
    data_samples: list
    size: tuple[int, int]
    split: SplitRule | None = None
    leading: Mapping[str, HeadTerm] = field(default_factory=dict)
    own: dict[str, HeadSplit] = field(default_factory=dict)
    _units: dict[tuple[str, str], Units] = field(default_factory=dict)

    def units(self, pair: HeadPair) -> Units:
        """The units of two heads, built when they are first asked for."""
        if pair.heads not in self._units:
            call = self.teacher[pair.teacher_tap][-1]
            own = self.own.get(pair.student_tap)
            arguments = (self.taps, call, self.data_samples, self.split, own)
            self._units[pair.heads] = pair(*arguments)
        return self._units[pair.heads]


class Term(ABC):
    """One named loss between student and teacher.

    Args:
        name: Its name under ``losses``.
        loss: The loss.
        schedule: Its weight over the iterations.

    Attributes:
        student_calls: Paths in the student whose calls are needed.
        teacher_training: Paths of modules of the teacher that compute as in training.
    """

    student_calls: tuple[str, ...]
    teacher_training: tuple[str, ...] = ()

    def __init__(self, name: str, loss: DistillLoss, schedule: Schedule) -> None:
        self.name, self.loss, self.schedule = name, loss, schedule

    @property
    @abstractmethod
    def teacher_calls(self) -> dict[str, int | None]:
        """Path in the teacher -> number of its calls in a forward; None when unknown."""

    def trainables(self) -> dict[str, nn.Module]:
        """What belongs to the student's checkpoint: modules with parameters or a memory."""
        has_state = len(self.loss.state_dict()) > 0
        return {'loss': self.loss} if has_state else {}

    def loss_of(self, student: nn.Module) -> DistillLoss:
        """The loss as this student holds it: a copy of a student has a copy of what it learns."""
        return self._part(student, 'loss') or self.loss

    def _part(self, student: nn.Module, name: str) -> Any:
        connectors = getattr(student, 'connectors', {})
        if self.name not in connectors or name not in connectors[self.name]:
            return None
        return connectors[self.name][name]

    @abstractmethod
    def __call__(self, records: StepRecords, weight: float) -> dict[str, Tensor]:
        """Form the term's scalars, under their names in the log."""


class HeadTerm(Term):
    """A loss of the units that a head of the student and one of the teacher predict.

    Args:
        name: Its name under ``losses``.
        loss: The loss.
        schedule: Its weight over the iterations.
        pair: The two heads.
        fused: The head's own loss, where the loss may form it in place of the head.
    """

    def __init__(
        self,
        name: str,
        loss: DistillLoss,
        schedule: Schedule,
        pair: HeadPair,
        fused: FusedCrossEntropy | None = None,
    ) -> None:
        super().__init__(name, loss, schedule)
        self.pair, self.fused = pair, fused
        self.student_calls = tuple(pair.student_taps)
        self.teacher_training = pair.teacher_training

    @property
    def teacher_calls(self) -> dict[str, int | None]:
        """Path of the teacher's head -> one call."""
        return {self.pair.teacher_tap: 1}

    def leads(self, records: StepRecords) -> bool:
        """Whether this term forms, or accounts for, the head's own loss in this step."""
        return records.leading.get(self.pair.student_tap) is self

    def __call__(self, records: StepRecords, weight: float) -> dict[str, Tensor]:
        """Form the loss of the units of this step."""
        units = records.units(self.pair)
        leads = self.leads(records)
        units = dataclasses.replace(
            units,
            fused=self.fused if leads else None,
            own=units.own if leads else None,
            split=units.split if self.loss.forms_own_loss else None,
        )
        scalars = self.loss_of(records.student)(units, weight)
        kept = units.fused.name if units.fused else None  # the head's own loss keeps its name
        names = {key: key if key == kept else _rename(key, self.name) for key in scalars}
        return {f'{self.pair.prefix}.{names[key]}': value for key, value in scalars.items()}


class FeatureTerm(Term):
    """A loss of features that are tapped in both models.

    Args:
        name: Its name under ``losses``.
        loss: The loss.
        schedule: Its weight over the iterations.
        pair: The two taps, with their connectors.
    """

    def __init__(self, name: str, loss: DistillLoss, schedule: Schedule, pair: FeaturePair) -> None:
        super().__init__(name, loss, schedule)
        self.pair = pair
        self.student_calls = (pair.tap.call,)
        self.teacher_training = pair.weights.teacher_training

    @property
    def teacher_calls(self) -> dict[str, int | None]:
        """Path in the teacher -> number of its calls; known once the pair has been matched."""
        return self.pair.teacher_calls

    def trainables(self) -> dict[str, nn.Module]:
        """The loss, if it learns or remembers something, and the connectors of all levels."""
        parts = super().trainables()
        if self.pair.connectors is not None:
            parts['levels'] = self.pair.connectors
        return parts

    def __call__(self, records: StepRecords, weight: float) -> dict[str, Tensor]:
        """Form the mean of the losses of all tapped levels."""
        loss = self.loss_of(records.student)
        connectors = self._part(records.student, 'levels')
        levels = self.pair(
            records.taps, records.teacher, records.data_samples, records.size, connectors
        )
        formed = [loss(features, weight) for features in levels]
        return {
            _rename(key, self.name): add_up(level[key] for level in formed) / len(formed)
            for key in formed[0]
        }


def _rename(key: str, name: str) -> str:
    """``loss`` -> ``loss_<name>``, ``loss_box`` -> ``loss_<name>_box``."""
    if key == 'loss':
        return f'loss_{name}'
    return f'loss_{name}_{key.removeprefix("loss_")}' if key.startswith('loss_') else key
