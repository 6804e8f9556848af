"""One padding for networks that are configured to pad to other sizes (COL-6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Padding:
    """How a data preprocessor pads a batch, to the right and at the bottom.

    Args:
        divisor: Height and width become multiples of it.
        size: Height and width become at least this; None without.
    """

    divisor: int = 1
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, preprocessor: nn.Module, training: bool) -> Padding:
        """The padding of a preprocessor of mmseg, mmdet or mmengine; none of any other."""
        if not hasattr(preprocessor, 'size_divisor'):
            return cls(getattr(preprocessor, 'pad_size_divisor', None) or 1)
        rule: Mapping = (
            vars(preprocessor) if training else getattr(preprocessor, 'test_cfg', None)
        ) or {}
        size = rule.get('size')
        return cls(rule.get('size_divisor') or 1, None if size is None else tuple(size))

    @classmethod
    def common(cls, paddings: Iterable[Padding]) -> Padding:
        """The smallest padding that suits several networks."""
        paddings = list(paddings)
        divisor = lcm(*(padding.divisor for padding in paddings))
        sizes = [padding.size for padding in paddings if padding.size]
        if not sizes:
            return cls(divisor)
        height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*sizes, strict=True))
        return cls(divisor, (height, width))


@contextmanager
def padded_as(preprocessor: nn.Module, padding: Padding, training: bool) -> Iterator[None]:
    """Let a data preprocessor pad in another way; it is as before afterwards."""
    if Padding.of(preprocessor, training) == padding:
        yield
        return
    changes = _attributes(preprocessor, padding, training)
    before = {name: getattr(preprocessor, name) for name in changes}
    vars(preprocessor).update(changes)
    try:
        yield
    finally:
        vars(preprocessor).update(before)


def _attributes(preprocessor: nn.Module, padding: Padding, training: bool) -> dict[str, Any]:
    """What to set so that a preprocessor pads in this way."""
    if not hasattr(preprocessor, 'size_divisor'):
        known = hasattr(preprocessor, 'pad_size_divisor')
        return dict(pad_size_divisor=padding.divisor) if known else {}
    # mmseg takes one of the two
    rule = dict(size=padding.size, size_divisor=None if padding.size else padding.divisor)
    return rule if training else dict(test_cfg=rule)
