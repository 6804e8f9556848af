"""Sums of several tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import reduce

from torch import Tensor


def add_up(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of at least one tensor; the built-in ``sum`` starts from a number.

    Raises:
        TypeError: There is none.
    """
    return reduce(operator.add, tensors)
