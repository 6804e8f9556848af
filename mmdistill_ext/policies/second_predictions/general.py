"""Second prediction of the mixture with the least expected error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdistill_ext.functional import general_weights
from mmdistill_ext.functional.checks import check_factor
from mmdistill_ext.policies.second_predictions.base import Validation, WeightedMean, warn
from mmdistill_ext.registry import SECOND_PREDICTIONS

ILL_CONDITIONED = 1e6
"""Condition number of a matrix of errors that is worth a warning."""


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class General(WeightedMean):
    """The mixture of the least expected error on held-out images (COL-3; KDCL-General, CVPR 2020).

    ``z = sum_n w_n z_n`` with ``w = C^-1 1 / (1^T C^-1 1)`` and ``C_nm`` the mean product of the
    errors of the networks ``n`` and ``m``. Weights may be negative; they are equal before the first
    validation.

    Args:
        ridge: >= 0, times its mean diagonal is added to the diagonal of ``C``.

    Raises:
        ValueError: The ridge is below 0.
    """

    ridge: float = 1e-3
    weights_from = 'errors'

    def __post_init__(self) -> None:
        check_factor('second.ridge', self.ridge)

    def find_weights(self, validation: Validation) -> Tensor | None:
        """``C^-1 1 / (1^T C^-1 1)``, ``(N,)``; None unless ``C`` is finite and above 0."""
        correlation = validation.error_correlation()
        if not torch.isfinite(correlation).all() or not correlation.diagonal().mean() > 0:
            warn('The errors on held-out images are not finite, or none: the weights stay.')
            return None
        weights, condition = general_weights(correlation.cpu(), self.ridge)
        if condition > ILL_CONDITIONED:
            warn(
                f'The networks err nearly alike (condition number {condition:.1e}): '
                f'second.ridge={self.ridge} decides.'
            )
        return weights
