"""Logits of several networks for the same labels, read block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.readers import (
    LevelOrder,
    LogitsReader,
    UnitOrder,
    logits_reader,
)
from mmdistill_ext.functional.blocks.values import Labels, Side, compute_dtype
from mmdistill_ext.functional.checks import (
    check_levels,
    check_logits,
    check_same_classes,
    check_units,
    num_label_classes,
)

CPU_BLOCK_BYTES = 2**21
DEVICE_BLOCK_BYTES = 2**25

IMAGE_UNITS = 2**14
"""Weights of whole images are found on at most so many of an image's units."""
CHUNK = 2**8
"""Length of a contiguous chunk of these units."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Offset from chunk to chunk, in periods, so that chunks do not line up in one image column."""


class Place(NamedTuple):
    """Where a block lies among all units, in the reader's order."""

    row: int
    start: int
    stop: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the block in values of ``(rows, units)``; gives ``(1, n)``."""
        return slice(self.row, self.row + 1), slice(self.start, self.stop)


class BlockReader:
    """Logits of N networks for the same labels, to be read block by block.

    A row of units is an image of maps; of levels one row holds the units of all images.

    Args:
        sides: Of each network; maps may differ in size, levels may not.
        labels: Of all units.
        block_bytes: Size of one block of one network's logits; by default 2 MiB on a CPU, 32 MiB
            on others.
        dtype: Type to compute in; by default float64 if a network's logits are, else float32.
        names: What errors call the sides, one name each.

    Attributes:
        target: ``(rows, units)``, the labels in the order that blocks are read in.
        extras: Of each network ``(rows, units)`` in the same order, or None.
        readers: How each network's logits are read.
        channels: ``C``.
        classes: Number of label values.

    Raises:
        ValueError: Shapes or types do not fit.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        labels: Labels,
        block_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        sides = list(sides)
        names = names or [f'logits[{i}]' for i in range(len(sides))]
        _check_sides(sides, names, labels.target)
        first, target = sides[0].logits, labels.target
        self.leaves = [side.leaves for side in sides]
        self.dtype = dtype or compute_dtype([x for leaves in self.leaves for x in leaves])
        self.order: UnitOrder
        if isinstance(first, Tensor):
            self.channels, self.order = first.shape[1], UnitOrder()
        else:
            self.channels, self.order = first[0].shape[2], LevelOrder(first)
        self.classes = num_label_classes(self.channels, labels.background)
        self.shape = target.shape
        self.ignore_index, self.background = labels.ignore_index, labels.background
        self.target = self.to_blocks(target)
        self.extras = [None if side.extra is None else self.to_blocks(side.extra) for side in sides]
        self.readers: list[LogitsReader] = [
            logits_reader(side.logits, target.shape[1:], side.align_corners, self.dtype)
            for side in sides
        ]
        self.step = max(reader.step for reader in self.readers)
        default = CPU_BLOCK_BYTES if target.device.type == 'cpu' else DEVICE_BLOCK_BYTES
        self.block_bytes = block_bytes or default

    def __len__(self) -> int:
        return len(self.readers)

    @property
    def of_levels(self) -> bool:
        """The logits are levels of detectors, not maps."""
        return isinstance(self.order, LevelOrder)

    @property
    def images(self) -> int:
        """Number of images."""
        return self.shape[0] if len(self.shape) > 1 else 1

    def to_blocks(self, values: Tensor) -> Tensor:
        """Values of units in the order of the blocks, ``(rows, units)``, without gradient."""
        return self.order.to_blocks(values.detach())

    def from_blocks(self, values: Tensor) -> Tensor:
        """Values ``(rows, units)`` in the shape of the labels."""
        return self.order.from_blocks(values, self.shape)

    def places(self) -> Iterator[Place]:
        """Every block once, in order."""
        rows, units = self.target.shape
        step_bytes = self.step * self.channels * self.dtype.itemsize
        size = max(1, self.block_bytes // step_bytes) * self.step
        for row in range(rows):
            for start in range(0, units, size):
                yield Place(row, start, min(start + size, units))

    def labels(self, place: Place) -> Labels:
        """Labels of a block, ``(1, n)`` int64."""
        target = self.target[place.slices].long()
        return Labels(target, self.ignore_index, self.background)

    def read(self, place: Place) -> Tensor:
        """Logits of a block, ``(N, 1, C, n)``, without gradient."""
        return torch.stack([reader.read(*place).values for reader in self.readers])

    def read_image(self, image: int, limit: int = IMAGE_UNITS) -> tuple[Tensor, Tensor]:
        """Logits and labels of an image: all of it, or ``limit`` units in chunks spread over it.

        Args:
            image: Its index.
            limit: At most about so many units.

        Returns:
            ``(N, 1, C, n)``, without gradient, and ``(1, n)``.
        """
        segments = self.order.segments(image, self.target)
        total = sum(stop - start for _, start, stop in segments)
        chunk = max(self.step, CHUNK)
        every = math.ceil(total / max(limit, chunk))
        if every > 1:
            chunk = chunk // self.step * self.step
            segments = [
                (row, at, min(at + chunk, stop))
                for row, start, stop in segments
                for turn, first in enumerate(range(start, stop, chunk * every))
                if (at := first + int(turn * GOLDEN % 1 * every) * chunk) < stop
            ]
        places = [Place(*segment) for segment in segments]
        targets = [self.labels(place).target for place in places]
        return torch.cat([self.read(place) for place in places], 3), torch.cat(targets, 1)

    def spread(self, weights: Tensor) -> Tensor:
        """Weights ``(N, images)`` -> those of each unit's image, ``(N, rows, units)``."""
        of_units = weights.new_zeros(len(weights), *self.target.shape)
        for image in range(self.images):
            for row, start, stop in self.order.segments(image, self.target):
                of_units[:, row, start:stop] = weights[:, image, None]
        return of_units


def _check_sides(sides: list[Side], names: Sequence[str], target: Tensor) -> None:
    if not sides:
        raise ValueError('`logits` should be those of at least one network. Found none.')
    first = sides[0].logits
    for side, name in zip(sides, names, strict=True):
        if not isinstance(first, Tensor):
            check_levels(first, side.logits, target, (names[0], name))
        elif isinstance(side.logits, Tensor):
            check_logits(name, side.logits, target)
            check_same_classes(first, side.logits, (names[0], name))
        else:
            raise ValueError(
                f'`{name}` should be maps (B, C, ...) as `{names[0]}` is. Found levels.'
            )
        check_units(f'{name}.extra', side.extra, target.shape)
