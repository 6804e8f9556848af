"""What a distillation with the fit loss knows besides its terms (FIT)."""

from __future__ import annotations

import math

from torch import Tensor

from mmdistill_ext.arguments import check_arguments
from mmdistill_ext.functional import SPLITS
from mmdistill_ext.functional.checks import check_choice, check_threshold
from mmdistill_ext.policies.fit_functions import ConstantFit
from mmdistill_ext.registry import FIT_FUNCTIONS
from mmdistill_ext.units.base import SplitRule


class Fit:
    """Splits the losses and weighs the hard samples by F(x); the x comes from a ``FitHook``.

    Args:
        function: Config of the evaluation function, e.g. ``dict(type='ExponentialFit', b=10.0)``.
        split: A sample is a ``'unit'`` (pixel) or an ``'image'`` (FIT-3).
        threshold: With ``'image'``: share of units in (0, 1] that the teacher gets right in a
            simple image of a segmenter.
        iou: Detectors: overlap in (0, 1] from which on the teacher's box is right.
        score: Detectors: score in [0, 1) above which the teacher sees an object. By ``'unit'``,
            background is right where there is none; by ``'image'``, an image is simple when every
            object is seen and nothing else.

    Attributes:
        error: The fitting error x; 0 until it is first measured.
        has_hook: A hook measures x and takes the records; without one none are kept.

    Raises:
        ValueError: A value is out of its range, or there is no such function.
    """

    def __init__(
        self,
        function: dict,
        split: str = 'unit',
        threshold: float = 0.9,
        iou: float = 0.5,
        score: float = 0.3,
    ) -> None:
        check_choice('fit.split', split, SPLITS)
        check_threshold(threshold, 'fit.threshold')
        check_threshold(iou, 'fit.iou')
        if not isinstance(score, int | float) or not 0 <= score < 1:
            raise ValueError(f'`fit.score` should be in [0, 1). Found {score!r}.')
        self.function = FIT_FUNCTIONS.build_part(function, 'fit.function', 'ExponentialFit')
        self.by = split
        self.threshold = threshold
        self.iou = iou
        self.score = score
        self.error = 0.0
        self.has_hook = False
        self._records: list[Tensor] = []

    @property
    def weight(self) -> float:
        """F(x).

        Raises:
            ValueError: The function gives no number >= 0.
        """
        found = self.function(self.error)
        try:
            weight = float(found)
        except (TypeError, ValueError):
            weight = math.nan
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f'`fit.function` should give a finite F(x) >= 0. Found {found!r} from '
                f'{self.function} at x={self.error}.'
            )
        return weight

    def split(self) -> SplitRule:
        """How the losses of the next step are split.

        Raises:
            ValueError: Nothing measures x.
        """
        if not (self.has_hook or isinstance(self.function, ConstantFit)):
            raise ValueError(
                f'`fit.function`={self.function} needs the fitting error. Add '
                "dict(type='mmdistill_ext.FitHook') to `custom_hooks`; found none."
            )
        return SplitRule(self.by, self.threshold, self.weight, self.iou, self.score)

    def record(self, sums: Tensor) -> None:
        """Keep the sums of one step on the device, without a host sync."""
        if self.has_hook:
            self._records.append(sums.detach())

    def pop_records(self) -> list[Tensor]:
        """The sums since the last call, ``(4,)`` each (see ``Records.pop_fit_sums``)."""
        records, self._records = self._records, []
        return records


def build_fit(cfg: dict) -> Fit:
    """Build a :class:`Fit` from the config key ``fit``.

    Raises:
        ValueError: The config is no dict of :class:`Fit`'s arguments, or a value is impossible.
    """
    if not isinstance(cfg, dict):
        raise ValueError(
            "`fit` should be a config such as dict(function=dict(type='ExponentialFit'), "
            f"split='unit'). Found {cfg!r}."
        )
    check_arguments(Fit, cfg, 'fit')
    return Fit(**cfg)
