"""Evaluation functions F(x) of the fit loss (FIT-5). The source lost its own; these are ours.

A function of one's own: a class with ``__call__(x: float) -> float``, >= 0, registered with
``@FIT_FUNCTIONS.register_module()``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmdistill_ext.functional import exponential_fit, logistic_fit
from mmdistill_ext.functional.checks import check_factor
from mmdistill_ext.registry import FIT_FUNCTIONS


@FIT_FUNCTIONS.register_module()
@dataclass(frozen=True)
class ExponentialFit:
    """``F(x) = min(b^x, f_max)``.

    Args:
        b: Base, > 1. With 10, F is 1/2 at x = -0.3.
        f_max: Upper bound, > 0; reached where the validation loss is far below the training loss.

    Raises:
        ValueError: A value is out of its range.
    """

    b: float = 10.0
    f_max: float = 2.0

    def __post_init__(self) -> None:
        self(0.0)

    def __call__(self, x: float) -> float:
        """F at a fitting error."""
        return exponential_fit(x, self.b, self.f_max)


@FIT_FUNCTIONS.register_module()
@dataclass(frozen=True)
class LogisticFit:
    """``F(x) = 2 / (1 + b^-x)``, in (0, 2).

    Args:
        b: Base, > 1.

    Raises:
        ValueError: ``b`` is not above 1.
    """

    b: float = 10.0

    def __post_init__(self) -> None:
        self(0.0)

    def __call__(self, x: float) -> float:
        """F at a fitting error."""
        return logistic_fit(x, self.b)


@FIT_FUNCTIONS.register_module()
@dataclass(frozen=True)
class ConstantFit:
    """``F(x) = c``; with 1 the run is plain distillation.

    Args:
        c: >= 0.

    Raises:
        ValueError: ``c`` is below 0.
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        check_factor('c', self.c)

    def __call__(self, x: float) -> float:
        """F, whatever the fitting error."""
        return float(self.c)
