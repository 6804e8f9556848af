"""Evaluation functions F(x) of the fit loss (FIT-5). The source lost its own; these are ours.

They share one file because each is a single formula, and one is chosen by comparing the three. A
function of one's own: a class with ``__call__(x: float) -> float``, >= 0, registered with
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
    """``F(x) = min(b^x, f_max)`` (FIT-5, ours).

    Args:
        b: Base, > 1. With 10, F is 1/2 at x = -0.3.
        f_max: Upper bound of F(x), > 0; F reaches it where the validation loss is far below the
            training loss.

    Raises:
        ValueError: A value is out of its range.
    """

    b: float = 10.0
    f_max: float = 2.0

    def __post_init__(self) -> None:
        self(0.0)

    def __call__(self, x: float) -> float:
        """F(x) at the fitting error x."""
        return exponential_fit(x, self.b, self.f_max)


@FIT_FUNCTIONS.register_module()
@dataclass(frozen=True)
class LogisticFit:
    """``F(x) = 2 / (1 + b^-x)``, in (0, 2) (FIT-5, ours).

    Args:
        b: Base, > 1.

    Raises:
        ValueError: ``b`` is not above 1.
    """

    b: float = 10.0

    def __post_init__(self) -> None:
        self(0.0)

    def __call__(self, x: float) -> float:
        """F(x) at the fitting error x."""
        return logistic_fit(x, self.b)


@FIT_FUNCTIONS.register_module()
@dataclass(frozen=True)
class ConstantFit:
    """``F(x) = c`` (FIT-5, ours); with 1 the run is plain distillation.

    Args:
        c: >= 0.

    Raises:
        ValueError: ``c`` is below 0.
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        check_factor('c', self.c)

    def __call__(self, x: float) -> float:
        """``c`` at any fitting error x."""
        return float(self.c)
