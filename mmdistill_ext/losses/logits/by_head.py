"""What a loss compares and distils with, for either sort of head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from mmdistill_ext.functional import BCE, DIFFERENCES, KL, Difference, Distance, make_distance
from mmdistill_ext.functional.logits.differences import find_difference

T = TypeVar('T')


@dataclass(frozen=True)
class ByHead(Generic[T]):
    """One choice for heads with a softmax and one for heads with independent sigmoids."""

    softmax: T
    sigmoid: T

    def of(self, sigmoid: bool) -> T:
        """The choice for a head with or without sigmoid."""
        return self.sigmoid if sigmoid else self.softmax


def choose_difference(name: str | None = None) -> ByHead[Difference]:
    """The difference of that name; without one ``'ce'``, and ``'bce'`` for sigmoid heads.

    Raises:
        ValueError: There is none of that name.
    """
    if name is None:
        return ByHead(softmax=DIFFERENCES['ce'], sigmoid=DIFFERENCES['bce'])
    difference = find_difference(name)
    return ByHead(difference, difference)


def choose_distance(
    name: str | None = None, temperature: float = 1.0, standardize: bool = False
) -> ByHead[Distance]:
    """The distance of that name; without one ``'kl'``, and ``'bce'`` for sigmoid heads.

    Args:
        name: ``'kl'``, ``'reverse_kl'``, ``'mse'``, ``'bce'`` or None.
        temperature: > 0.
        standardize: Standardise the logits first, for softmax heads.

    Raises:
        ValueError: An argument is outside what is named above.
    """
    if name is None:
        softmax = KL(temperature, standardize)
        return ByHead(softmax, sigmoid=softmax if standardize else BCE(temperature))
    distance = make_distance(name, temperature, standardize)
    return ByHead(distance, distance)
