"""Losses of a block with their gradients: in closed form where there is one, else by autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.values import Labels
from mmdistill_ext.functional.blocks.weighted_sum import clear_ignored_, gradient_of_units
from mmdistill_ext.functional.logits.differences import CrossEntropyDifference
from mmdistill_ext.functional.logits.distances import KL


class Prediction:
    """Logits of a block, without gradient, whose softmax is formed once for all losses.

    Args:
        logits: ``(1, C, n)``.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self._softened: dict[float, Prediction] = {1.0: self}

    def soften(self, temperature: float) -> Prediction:
        """That of ``x / T``."""
        if temperature not in self._softened:
            self._softened[temperature] = Prediction(self.logits / temperature)
        return self._softened[temperature]

    @cached_property
    def log_probabilities(self) -> Tensor:
        """``log softmax(x)``, ``(1, C, n)``."""
        return self.logits.log_softmax(1)

    @cached_property
    def probabilities(self) -> Tensor:
        """``softmax(x)``, ``(1, C, n)``."""
        return self.log_probabilities.exp()


def difference_with_gradient(
    difference: Callable[[Tensor, Labels], Tensor],
    prediction: Prediction,
    labels: Labels,
    counted: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Difference of each unit from its label, ``(1, n)``, and its gradient, ``(1, C, n)``.

    Args:
        difference: Logits ``(1, C, n)`` and labels -> ``(1, n)``.
        prediction: Of the units.
        labels: Of the units.
        counted: ``(1, n)``, 1 or 0; the gradient is 0 on units that do not count. None: no gradient
            is formed.
    """
    if type(difference) is not CrossEntropyDifference:  # one of a user's own may inherit from it
        return _by_autograd(lambda x: difference(x, labels), prediction.logits, counted)
    label = labels.index.unsqueeze(1)
    units = -prediction.log_probabilities.gather(1, label).squeeze(1)
    gradient = None
    if counted is not None:
        gradient = prediction.probabilities.clone()  # minus 1 at the label
        gradient.scatter_add_(1, label, torch.full_like(label, -1, dtype=gradient.dtype))
        clear_ignored_(gradient, units, counted)
    return units.where(labels.valid, 0), gradient


def distance_with_gradient(
    distance: Callable[[Tensor, Tensor, Labels], Tensor],
    student: Tensor,
    teacher: Prediction,
    labels: Labels,
    counted: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Distance of each unit from the teacher's, ``(1, n)``, and its gradient, ``(1, C, n)``.

    Args:
        distance: Logits ``(1, C, n)`` of both and labels -> ``(1, n)``.
        student: Logits that the gradient is of, ``(1, C, n)``.
        teacher: A constant.
        labels: Of the units.
        counted: ``(1, n)``, 1 or 0; the gradient is 0 on units that do not count. None: no gradient
            is formed.
    """
    if type(distance) is not KL or distance.standardize:
        return _by_autograd(lambda x: distance(x, teacher.logits, labels), student, counted)
    temperature, teacher = distance.temperature, teacher.soften(distance.temperature)
    log_probabilities = distance.soften(student).log_softmax(1)
    terms = (teacher.log_probabilities - log_probabilities).mul_(teacher.probabilities)
    units = terms.sum(1) * temperature**2
    if counted is None:
        return units, None
    gradient = log_probabilities.exp_().sub_(teacher.probabilities)
    if temperature != 1:
        gradient.mul_(temperature)
    return units, clear_ignored_(gradient, units, counted)


def _by_autograd(
    loss: Callable[[Tensor], Tensor], logits: Tensor, counted: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    differentiate = counted is not None
    with torch.set_grad_enabled(differentiate):
        logits = logits.detach().requires_grad_(differentiate)
        units = loss(logits)
    gradient = None if counted is None else gradient_of_units(units, logits, counted)
    return units.detach(), gradient
