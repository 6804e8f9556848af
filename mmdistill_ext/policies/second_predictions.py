"""How several networks make their second prediction together (COL-3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.functional import (
    GRANULARITIES,
    general_weights,
    linear,
    min_logit,
    min_loss,
    mix,
    simplex_weights,
    unit_difference,
    validation_weights,
)
from mmdistill_ext.functional.checks import check_choice, check_factor, check_positive
from mmdistill_ext.registry import SECOND_PREDICTIONS


class Kind(NamedTuple):
    """What the labels of a head mean."""

    difference: str
    ignore_index: int
    background: bool


class SecondPrediction:
    """Base: the logits of all networks become those of one prediction."""

    per = 'unit'
    weights_from: str | None = (
        None  # what its weights come from: 'metric' or 'errors' of held-out data
    )

    def combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None, kind: Kind) -> Tensor:
        """Make the second prediction of some units.

        Args:
            logits: ``(N, 1, C, n)``.
            labels: ``(1, n)``.
            weights: ``(N, 1, n)`` of the units' images, or ``(N,)`` of the networks, if it has any.
            kind: What the labels mean.

        Returns:
            ``(1, C, n)``.
        """
        return mix(logits, weights)

    def weigh_image(self, logits: Tensor, labels: Tensor, kind: Kind) -> Tensor:
        """Weights ``(N,)`` of an image; its logits and labels are as those of :meth:`combine`."""
        raise NotImplementedError

    def check(self, sigmoid: bool) -> None:
        """Refuse heads that it has no meaning for, ``ValueError``."""


@dataclass(frozen=True)
class _PerUnitOrImage(SecondPrediction):
    """Chosen for each ``'unit'`` (pixel, location of a detector), or once for each ``'image'``."""

    per: str = 'unit'

    def __post_init__(self) -> None:
        check_choice('second.per', self.per, GRANULARITIES)


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class MinLoss(_PerUnitOrImage):
    """The prediction with the smallest first loss.

    Args:
        per: Choose for each ``'unit'``, or for each ``'image'`` by the mean over its valid units
            (of a large image 16,384 of them).

    Raises:
        ValueError: ``per`` is neither.
    """

    def combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None, kind: Kind) -> Tensor:
        """The best of each unit, or the image's."""
        if weights is not None:
            return mix(logits, weights)
        difference, ignore_index, background = kind
        return min_loss(
            logits,
            labels,
            difference=difference,
            ignore_index=ignore_index,
            background=background,
        )

    def weigh_image(self, logits: Tensor, labels: Tensor, kind: Kind) -> Tensor:
        """1 for the best network."""
        losses = torch.stack([unit_difference(x, labels, *kind).sum() for x in logits])
        return torch.zeros_like(losses).index_fill_(0, losses.argmin(), 1)


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class Linear(_PerUnitOrImage):
    """The weighted sum with the smallest second loss; weights >= 0 of sum 1.

    Args:
        per: Weights for each ``'unit'``, or for each ``'image'`` by the mean over its valid units
            (of a large image 16,384 of them).
        iterations: Newton steps, >= 1. After 10 the loss is mostly within 1e-3 of its minimum for
            logits of ordinary size; each costs as much as any other.

    Raises:
        ValueError: ``per`` is neither, or ``iterations`` is no integer >= 1.
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.iterations) is not int or self.iterations < 1:
            raise ValueError(
                f'`second.iterations` should be an integer >= 1. Found {self.iterations!r}.'
            )

    def combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None, kind: Kind) -> Tensor:
        """The best mixture of each unit, or the image's."""
        if weights is not None:
            return mix(logits, weights)
        difference, ignore_index, background = kind
        return linear(
            logits,
            labels,
            difference=difference,
            ignore_index=ignore_index,
            background=background,
            iterations=self.iterations,
        )

    def weigh_image(self, logits: Tensor, labels: Tensor, kind: Kind) -> Tensor:
        """The best mixture's."""
        difference, ignore_index, background = kind
        found = simplex_weights(
            logits,
            labels,
            per='image',
            difference=difference,
            ignore_index=ignore_index,
            background=background,
            iterations=self.iterations,
        )
        return found.weights.squeeze(1)


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class MinLogit(SecondPrediction):
    """The smallest logit of each class.

    Args:
        shift: Subtract the label's logit in each network first, so that the label's is 0 and no
            other can be the smallest by a network's offset (KDCL); for softmax heads.
    """

    shift: bool = True

    def combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None, kind: Kind) -> Tensor:
        """The minimum over the networks."""
        target = labels if self.shift else None
        return min_logit(logits, target, ignore_index=kind.ignore_index)

    def check(self, sigmoid: bool) -> None:
        """A shift changes a sigmoid."""
        if sigmoid and self.shift:
            raise ValueError(
                '`second.shift` should be False for sigmoid heads, as those of most detectors '
                'are: to subtract the logit of the label changes them. Found True.'
            )


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class ValidationWeighted(SecondPrediction):
    """Weights that grow with each network's validation metric; equal before the first validation.

    Args:
        metric: Name of the metric as the evaluator gives it, e.g. ``'mIoU'`` or
            ``'coco/bbox_mAP'``; the larger the better.
        temperature: > 0, in the metric's unit: a network whose metric is so much larger counts e
            times as much.

    Raises:
        ValueError: The temperature is not above 0.
    """

    metric: str
    temperature: float
    weights_from = 'metric'

    def __post_init__(self) -> None:
        check_positive('second.temperature', self.temperature)

    def weights(self, scores: list[float]) -> Tensor:
        """``(N,)`` of the networks' metrics."""
        return validation_weights(scores, self.temperature)


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class General(SecondPrediction):
    """KDCL-General: weights of the least expected error on held-out images; they may be negative.

    Equal before the first validation.

    Args:
        ridge: >= 0, times its mean diagonal is added to the diagonal of the matrix of errors.

    Raises:
        ValueError: The ridge is below 0.
    """

    ridge: float = 1e-3
    weights_from = 'errors'

    def __post_init__(self) -> None:
        check_factor('second.ridge', self.ridge)

    def weights(self, correlation: Tensor) -> tuple[Tensor, float]:
        """``(N,)``, and the condition number of the matrix ``(N, N)``."""
        return general_weights(correlation, self.ridge)
