"""Second prediction of the mixture that fits the label best."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmdistill_ext.functional import linear, simplex_weights
from mmdistill_ext.policies.second_predictions.base import PerUnitOrImage
from mmdistill_ext.registry import SECOND_PREDICTIONS


@SECOND_PREDICTIONS.register_module()
@dataclass(frozen=True)
class Linear(PerUnitOrImage):
    """The mixture with the smallest second loss (COL-3; KDCL-Linear, CVPR 2020; CN111598182A).

    ``z = sum_n w_n z_n`` with ``w = argmin loss(sum_n w_n z_n, y)``, ``w_n >= 0``,
    ``sum_n w_n = 1``.

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

    def _combine_units(self, logits: Tensor, labels: Tensor) -> Tensor:
        return linear(logits, labels, iterations=self.iterations, **self.label_spec._asdict())

    def weigh_image(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The weights ``(N,)`` whose mixture has the smallest mean loss over the image."""
        options = dict(per='image', iterations=self.iterations, **self.label_spec._asdict())
        return simplex_weights(logits, labels, **options).weights.squeeze(1)
