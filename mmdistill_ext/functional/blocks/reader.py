"""Logits of several networks for the same labels, read block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.readers import (
    CoarseLogits,
    FullLogits,
    LevelLogits,
    LevelOrder,
    UnitOrder,
    logits_reader,
)
from mmdistill_ext.functional.blockwise import CPU_BLOCK_BYTES, DEVICE_BLOCK_BYTES
from mmdistill_ext.functional.checks import check_levels, check_logits, check_same_classes

IMAGE_UNITS = 2**14
"""Weights of whole images are found on at most so many of an image's units."""
CHUNK = 2**8
"""Units that are next to each other among these."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""A chunk begins so much of a period later than the one before: not in the same columns."""


class Networks:
    """Logits of N networks for the same labels, to be read block by block.

    Args:
        logits: Of each network ``(B, C, ...)``, where a map may have a size of its own, or levels
            ``(B, A, C, n)`` (see :func:`~mmdistill_ext.functional.blockwise_distillation`).
        target: ``(B, ...)``, or ``(B, N)`` of levels.
        align_corners: How each network's map is upsampled.
        ignore_index: Label of units that are not valid.
        background: The label ``C`` is background, as detectors have it.
        block_bytes: Size of one block of the logits of all networks.

    Raises:
        ValueError: Shapes or types do not fit.
    """

    def __init__(
        self,
        logits: Sequence[Tensor | Sequence[Tensor]],
        target: Tensor,
        align_corners: Sequence[bool] | None = None,
        ignore_index: int = 255,
        background: bool = False,
        block_bytes: int | None = None,
    ) -> None:
        if not logits:
            raise ValueError('`logits` should be those of at least one network. Found none.')
        first = logits[0]
        maps = isinstance(first, Tensor)
        for other in logits:
            if maps:
                check_logits('logits', other, target)
                check_same_classes(first, other)
            else:
                check_levels(first, other, target)
        self.leaves = [[x] if maps else list(x) for x in logits]
        dtypes = [x.dtype for group in self.leaves for x in group]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.channels = first.shape[1] if maps else first[0].shape[2]
        self.order = UnitOrder() if maps else LevelOrder(first)
        self.shape = target.shape
        self.target = self.order.to_blocks(target)
        corners = align_corners or [False] * len(logits)
        self.readers: list[FullLogits | CoarseLogits | LevelLogits] = [
            logits_reader(x, target.shape[1:], corner, self.dtype)
            for x, corner in zip(logits, corners, strict=True)
        ]
        self.ignore_index, self.background = ignore_index, background
        default = CPU_BLOCK_BYTES if target.device.type == 'cpu' else DEVICE_BLOCK_BYTES
        self.block_bytes = block_bytes or default

    def __len__(self) -> int:
        return len(self.readers)

    @property
    def step(self) -> int:
        """A block is a multiple of so many units."""
        return max(reader.step for reader in self.readers)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Row of the target, start and stop of each block."""
        rows, units = self.target.shape
        step_bytes = self.step * self.channels * self.dtype.itemsize * len(self)
        size = max(1, self.block_bytes // step_bytes) * self.step
        for row in range(rows):
            for start in range(0, units, size):
                yield row, start, min(start + size, units)

    def read(self, place: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Logits ``(N, 1, C, n)`` and labels ``(1, n)`` of a block, without gradient."""
        row, start, stop = place
        values = torch.stack([reader.read(row, start, stop).values for reader in self.readers])
        return values, self.target[row : row + 1, start:stop].long()

    def read_image(self, image: int, limit: int = IMAGE_UNITS) -> tuple[Tensor, Tensor]:
        """The same of an image: all of it, or ``limit`` units in chunks evenly spread over it."""
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
        parts = [self.read(segment) for segment in segments]
        return torch.cat([x for x, _ in parts], 3), torch.cat([y for _, y in parts], 1)

    @property
    def images(self) -> int:
        """Number of images."""
        return self.shape[0] if len(self.shape) > 1 else 1

    def spread(self, weights: Tensor) -> Tensor:
        """Weights ``(N, images)`` -> those of each unit's image, ``(N, rows, units)``."""
        found = weights.new_zeros(len(weights), *self.target.shape)
        for image in range(self.images):
            for row, start, stop in self.order.segments(image, self.target):
                found[:, row, start:stop] = weights[:, image, None]
        return found
