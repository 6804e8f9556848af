"""The contract of a second prediction: what several networks predict together (COL-3)."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol

from mmengine.logging import print_log
from torch import Tensor

from mmdistill_ext.functional import GRANULARITIES, mix
from mmdistill_ext.functional.checks import check_choice, given
from mmdistill_ext.registry import SECOND_PREDICTIONS


class LabelSpec(NamedTuple):
    """What the labels of a head mean.

    Attributes:
        difference: The head's loss of a unit: ``'ce'`` of a softmax, ``'bce'`` of sigmoids.
        ignore_index: Label of units that are ignored.
        background: The label ``C`` is background, as detectors have it.
    """

    difference: str
    ignore_index: int
    background: bool

    @property
    def sigmoid(self) -> bool:
        """The head predicts independent sigmoids instead of one softmax."""
        return self.difference == 'bce'


class Validation(Protocol):
    """What a policy may ask for after a validation."""

    def scores(self, metric: str) -> Sequence[float | None]:
        """The metric of each network; None where it is missing or not finite."""

    def error_correlation(self) -> Tensor:
        """``(N, N)``, sums of the products of the networks' errors on held-out images."""


@dataclass(frozen=True)
class SecondPrediction(ABC):
    """Base of the policies: the logits of N networks become those of one prediction.

    A policy of one's own: a subclass with :meth:`combine`, registered with
    ``@SECOND_PREDICTIONS.register_module()``.

    Attributes:
        per: The policy chooses for each ``'unit'``, or once for each ``'image'``.
        weights_from: What the weights of the networks are found from after a validation: its
            ``'metric'``, the ``'errors'`` on held-out images; or None, the policy chooses by the
            labels. The distiller keeps the weights in the checkpoint.
        label_spec: What the labels mean; None before :meth:`bind`.
    """

    per: ClassVar[str] = 'unit'
    weights_from: ClassVar[Literal['metric', 'errors'] | None] = None
    label_spec: LabelSpec = field(
        default=None,  # type: ignore[assignment]  # only until `bind`, before anything asks for it
        init=False,
        repr=False,
    )

    def bind(self, label_spec: LabelSpec) -> SecondPrediction:
        """A copy of the policy for heads with such labels.

        Raises:
            ValueError: The policy has no meaning for these heads.
        """
        bound = copy.copy(self)
        object.__setattr__(bound, 'label_spec', label_spec)  # frozen for everybody else
        return bound

    @abstractmethod
    def combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Form the second prediction of some units (COL-3).

        Args:
            logits: ``(N, 1, C, n)``.
            labels: ``(1, n)``.
            weights: ``(N,)`` of the networks for a policy with ``weights_from``; ``(N, 1, n)`` of
                each unit's image for one with ``per='image'``; else None.

        Returns:
            ``(1, C, n)``.
        """

    def weigh_image(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weigh the networks for one image; asked of policies with ``per='image'`` (COL-3).

        Args:
            logits: ``(N, 1, C, n)`` of the image's units.
            labels: ``(1, n)``.

        Returns:
            ``(N,)``.
        """
        raise NotImplementedError

    def find_weights(self, validation: Validation) -> Tensor | None:
        """Find the networks' weights after a validation (COL-3).

        Args:
            validation: Gives what the policy asks for.

        Returns:
            ``(N,)``; None if the networks keep the weights that they have.
        """
        return None


@dataclass(frozen=True)
class PerUnitOrImage(SecondPrediction):
    """Base of policies that choose by the labels, for each ``'unit'`` or once for each ``'image'``.

    A unit is a pixel, or a location of a detector.
    """

    per: str = 'unit'  # type: ignore[misc]  # here a field, which configs set

    def __post_init__(self) -> None:
        check_choice('second.per', self.per, GRANULARITIES)

    def combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Choose for each unit, or mix by the weights of its image."""
        return self._combine_units(logits, labels) if weights is None else mix(logits, weights)

    @abstractmethod
    def _combine_units(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Second prediction ``(1, C, n)`` of units ``(N, 1, C, n)``, chosen for each unit."""


@dataclass(frozen=True)
class WeightedMean(SecondPrediction):
    """Base of policies that mix the logits by the networks' weights from the validation."""

    def combine(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """``sum_n w_n logits_n``."""
        return mix(logits, given(weights, 'weights'))


def build_second_prediction(cfg: dict, label_spec: LabelSpec) -> SecondPrediction:
    """Build the policy of the config key ``second``, bound to the networks' labels (COL-3).

    Raises:
        ValueError: There is no such policy, or it does not take such arguments or such labels.
    """
    policy: SecondPrediction = SECOND_PREDICTIONS.build_part(cfg, 'second', 'MinLoss')
    return policy.bind(label_spec)


def warn(message: str) -> None:
    """Log a warning of a policy that cannot find its weights as it should."""
    print_log(message, logger='current', level=logging.WARNING)
