"""Distances of the student's prediction from the teacher's, per unit: what is distilled (SEL-5)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mmdistill_ext.functional.blocks.values import Labels
from mmdistill_ext.functional.checks import check_choice, check_temperature
from mmdistill_ext.functional.logits.standardize import standardize_logits
from mmdistill_ext.functional.precision import full_precision

__all__ = [
    'BCE',
    'DISTANCES',
    'KL',
    'MSE',
    'Distance',
    'ReverseKL',
    'make_distance',
    'unit_distillation',
]


class Distance(ABC):
    """Distance of each unit of the student from the teacher's."""

    name: ClassVar[str]
    """What configs and errors call it."""
    softmax_only: ClassVar[bool] = False
    """It has no meaning for a head of independent sigmoids."""

    @property
    def described(self) -> str:
        """Its name and options, for errors."""
        return repr(self.name)

    def check(self, channels: int) -> None:  # noqa: B027
        """Raise ``ValueError`` unless it exists for logits with so many channels."""

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, labels: Labels | None = None) -> Tensor:
        """Form the distance.

        Args:
            student: ``(B, C, ...)``, float32 or float64.
            teacher: The same, without gradient.
            labels: Of the ``(B, ...)`` units; not every distance needs them.

        Returns:
            ``(B, ...)``, >= 0 up to rounding, 0 where the two are equal.
        """


@dataclass(frozen=True)
class Tempered(Distance):
    """A distance of logits that are divided by a temperature.

    Args:
        temperature: > 0; the distance is multiplied by its square.

    Raises:
        ValueError: The temperature is not a finite number above 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def soften(self, logits: Tensor) -> Tensor:
        """``x / T``."""
        return logits if self.temperature == 1 else logits / self.temperature


@dataclass(frozen=True)
class SoftmaxDistance(Tempered):
    """A distance between ``softmax(x / T)`` of both.

    Args:
        temperature: > 0; the distance is multiplied by its square.
        standardize: Bring each unit's logits to mean 0 and standard deviation 1 first, see
            :func:`~mmdistill_ext.functional.logits.standardize.standardize_logits`.
    """

    standardize: bool = False
    softmax_only = True

    @property
    def described(self) -> str:
        """Its name and options, for errors."""
        return f'{self.name!r}{" with standardize=True" if self.standardize else ""}'

    def check(self, channels: int) -> None:
        """Raise ``ValueError`` for one channel: its softmax is 1."""
        if channels == 1:
            raise ValueError(
                f'`distance={self.name!r}` is 0 everywhere on logits with one channel: a binary '
                "head needs distance='bce' or 'mse'. Found channels=1."
            )

    def soften(self, logits: Tensor) -> Tensor:
        """``x / T``, of standardised logits if asked for."""
        return super().soften(standardize_logits(logits) if self.standardize else logits)


@dataclass(frozen=True)
class KL(SoftmaxDistance):
    """``T^2 KL(p_teacher || p_student)`` (Hinton et al., https://arxiv.org/abs/1503.02531)."""

    name = 'kl'

    def __call__(self, student: Tensor, teacher: Tensor, labels: Labels | None = None) -> Tensor:
        """Divergence of each unit, ``(B, ...)``."""
        student, teacher = (self.soften(x).log_softmax(1) for x in (student, teacher))
        return (teacher.exp() * (teacher - student)).sum(1) * self.temperature**2


@dataclass(frozen=True)
class ReverseKL(SoftmaxDistance):
    """``T^2 KL(p_student || p_teacher)``."""

    name = 'reverse_kl'

    def __call__(self, student: Tensor, teacher: Tensor, labels: Labels | None = None) -> Tensor:
        """Divergence of each unit, ``(B, ...)``."""
        student, teacher = (self.soften(x).log_softmax(1) for x in (student, teacher))
        return (student.exp() * (student - teacher)).sum(1) * self.temperature**2


@dataclass(frozen=True)
class MSE(Distance):
    """Mean over the classes of ``(x_student - x_teacher)^2``, without temperature."""

    name = 'mse'

    def __call__(self, student: Tensor, teacher: Tensor, labels: Labels | None = None) -> Tensor:
        """Squared error of each unit, ``(B, ...)``."""
        return (student - teacher).square().mean(1)


@dataclass(frozen=True)
class BCE(Tempered):
    """``T^2 sum_c KL(Bernoulli(q_t,c) || Bernoulli(q_s,c))`` with ``q = sigmoid(x / T)``."""

    name = 'bce'

    def __call__(self, student: Tensor, teacher: Tensor, labels: Labels | None = None) -> Tensor:
        """Divergence of each unit, ``(B, ...)``."""
        student, teacher = self.soften(student), self.soften(teacher)
        return bernoulli_kl(student, teacher).sum(1) * self.temperature**2


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(Bernoulli(sigmoid(teacher)) || Bernoulli(sigmoid(student)))`` of each logit."""
    distance = F.softplus(student) - F.softplus(teacher)
    return distance + teacher.sigmoid() * (teacher - student)


DISTANCES: dict[str, type[Distance]] = {x.name: x for x in (KL, ReverseKL, MSE, BCE)}


def make_distance(name: str, temperature: float = 1.0, standardize: bool = False) -> Distance:
    """The distance of that name.

    Args:
        name: ``'kl'``, ``'reverse_kl'``, ``'mse'`` or ``'bce'``.
        temperature: > 0; ``'mse'`` has none.
        standardize: Standardise the logits first; of ``'kl'`` and ``'reverse_kl'``.

    Raises:
        ValueError: There is none of that name, the temperature is not above 0, or the distance
            knows no standardised logits.
    """
    check_choice('distance', name, tuple(DISTANCES))
    check_temperature(temperature)
    kind = DISTANCES[name]
    if issubclass(kind, SoftmaxDistance):
        return kind(temperature, standardize)
    if standardize:
        raise ValueError(
            "`standardize=True` needs a softmax: distance='kl' or 'reverse_kl'. "
            f'Found distance={name!r}.'
        )
    return kind(temperature) if issubclass(kind, Tempered) else kind()


def unit_distillation(
    student: Tensor, teacher: Tensor, kind: str = 'kl', temperature: float = 1.0
) -> Tensor:
    """Distance of the student's prediction from the teacher's, per unit (SEL-5).

    With ``p = softmax(x / T)`` and, for ``bce``, ``q = sigmoid(x / T)``:
    ``kl``: ``T^2 KL(p_teacher || p_student)``; ``reverse_kl``: ``T^2 KL(p_student || p_teacher)``;
    ``mse``: mean over the classes of ``(x_student - x_teacher)^2``, without temperature;
    ``bce``: ``T^2 sum_c KL(Bernoulli(q_teacher,c) || Bernoulli(q_student,c))``.

    Args:
        student: ``(B, C, ...)``.
        teacher: ``(B, C, ...)``, taken as constant.
        kind: ``'kl'``, ``'reverse_kl'``, ``'mse'`` or ``'bce'``.
        temperature: > 0.

    Returns:
        ``(B, ...)``, >= 0 up to rounding, 0 where the two are equal; float32, or float64 for
        float64 logits.

    Raises:
        ValueError: On another kind, a temperature <= 0 or shapes that do not fit.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            '`student` and `teacher` should have the same shape. '
            f'Found {tuple(student.shape)} and {tuple(teacher.shape)}.'
        )
    distance = make_distance(kind, temperature)
    distance.check(student.shape[1])
    return distance(full_precision(student), full_precision(teacher.detach()))
