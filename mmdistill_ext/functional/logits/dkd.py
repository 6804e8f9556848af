"""Decoupled knowledge distillation: the label's class and the other classes, each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.values import Labels
from mmdistill_ext.functional.checks import check_factor, given
from mmdistill_ext.functional.logits.distances import SoftmaxDistance, bernoulli_kl

__all__ = ['DKD', 'DkdParts', 'decouple']


class DkdParts(NamedTuple):
    """The two parts of a divergence, ``(B, ...)`` each, >= 0 up to rounding."""

    target: Tensor
    other: Tensor


def decouple(student: Tensor, teacher: Tensor, labels: Labels) -> DkdParts:
    """TCKD and NCKD per unit (Zhao et al., CVPR 2022, https://arxiv.org/abs/2203.08679).

    With ``p = softmax(x)``, the label ``t`` and ``q = softmax`` over the other classes alone:
    TCKD is ``KL`` between the pairs ``(p_t, 1 - p_t)`` of teacher and student, NCKD is
    ``KL(q_teacher || q_student)``. ``KL(p_teacher || p_student) = TCKD + (1 - p_teacher,t) NCKD``.

    Args:
        student: ``(B, C, ...)``, C >= 2; with two classes NCKD is 0.
        teacher: ``(B, C, ...)``, without gradient.
        labels: Of the ``(B, ...)`` units; ignored ones are given the label 0.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 3, 1), torch.tensor([[[2.0], [1.0], [0.0]]])
        >>> target, other = decouple(student, teacher, Labels(torch.tensor([[0]])))
        >>> torch.cat((target, other))
        tensor([[0.2291],
                [0.1109]])
    """
    index = labels.index.unsqueeze(1)
    student, student_odds = _conditional(student, index)
    teacher, teacher_odds = _conditional(teacher, index)
    target = bernoulli_kl(student_odds, teacher_odds).squeeze(1)
    teachers = teacher.exp().scatter(1, index, 0)  # the label's class takes no part
    return DkdParts(target, (teachers * (teacher - student)).sum(1))


def _conditional(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the other classes among themselves, log-odds of the label's.

    The log-probability at the label's own class has no meaning, but is finite.
    """
    total = logits.scatter(1, index, -torch.inf).logsumexp(1, keepdim=True)
    return logits - total, logits.gather(1, index) - total


@dataclass(frozen=True)
class DKD(SoftmaxDistance):
    """``T^2 (alpha TCKD + beta NCKD)`` of ``x / T`` (DKD, https://arxiv.org/abs/2203.08679, eq. 7).

    Args:
        temperature: > 0.
        standardize: Standardise the logits of each unit first.
        alpha: >= 0, weight of TCKD.
        beta: >= 0, weight of NCKD.

    Raises:
        ValueError: An argument is outside what is named above.
    """

    alpha: float = 1.0
    beta: float = 8.0
    name = 'dkd'

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor('alpha', self.alpha)
        check_factor('beta', self.beta)

    def __call__(self, student: Tensor, teacher: Tensor, labels: Labels | None = None) -> Tensor:
        """Distance of each unit, ``(B, ...)``."""
        parts = decouple(self.soften(student), self.soften(teacher), given(labels, 'labels'))
        target, other = parts
        return (self.alpha * target + self.beta * other) * self.temperature**2
