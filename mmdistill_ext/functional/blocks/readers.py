"""Logits read block by block, upsampled where they are coarser than the labels.

Bilinear interpolation is linear and separable: a block of output rows needs a few source rows,
stretched in width, times the matching part of a small row matrix. The gradient goes the same way
back, so that logits at full resolution never exist for more than one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill_ext.functional.checks import given


class Reading(NamedTuple):
    """One block of logits and where it came from."""

    values: Tensor  # (1, C, n)
    place: tuple  # index, in the logits, of what was read
    source: Tensor | None = None  # what was read, a leaf
    graph: Tensor | None = None  # the values, attached to `source`


class LogitsReader(Protocol):
    """Reads logits block by block, and gathers their gradient in memory of a form of its own.

    Attributes:
        step: A block begins at a multiple of so many units.
        channels: ``C``.
        dtype: Type to compute in.
        device: Where the logits are.
    """

    step: int
    channels: int
    dtype: torch.dtype
    device: torch.device

    def read(self, image: int, start: int, stop: int, differentiate: bool = False) -> Reading:
        """Units ``start`` to ``stop`` of one image, or row of units."""

    def new_gradient(self) -> Any:
        """Memory for the gradient, a tensor or one of each level."""

    def add_gradient(self, gradient: Any, reading: Reading, upstream: Tensor) -> None:
        """Add the gradient of one block to what :meth:`new_gradient` gave."""

    def in_shape(self, gradient: Any) -> list[Tensor]:
        """The gradient of each leaf, in the logits' own shape."""


class FullLogits:
    """Logits ``(B, C, ...)`` with one prediction per label.

    Args:
        logits: ``(B, C, ...)``; ``(N, C)`` counts as one image of N units.
        dtype: Type to compute in.
    """

    step = 1  # a block may begin at any unit

    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.channels, self.dtype = logits.shape, logits.shape[1], dtype
        self.device = logits.device
        self.logits = logits.t()[None] if logits.ndim == 2 else logits.flatten(2)

    def read(self, image: int, start: int, stop: int, differentiate: bool = False) -> Reading:
        """Units ``start`` to ``stop`` of one image."""
        place = (slice(image, image + 1), slice(None), slice(start, stop))
        return Reading(self.logits[place].to(self.dtype).contiguous(), place)

    def new_gradient(self) -> Tensor:
        """Memory for the gradient; the blocks cover it once."""
        return torch.empty_like(self.logits, dtype=self.dtype)

    def add_gradient(self, gradient: Tensor, reading: Reading, upstream: Tensor) -> None:
        """Store the gradient of one block."""
        gradient[reading.place] = upstream

    def in_shape(self, gradient: Tensor) -> list[Tensor]:
        """The gradient in the logits' own shape."""
        return [gradient[0].t() if len(self.shape) == 2 else gradient.view(self.shape)]


class CoarseLogits:
    """Logits ``(B, C, h, w)`` of a map that is brought to ``(H, W)`` bilinearly.

    Args:
        logits: ``(B, C, h, w)``.
        size: ``(H, W)``.
        align_corners: As in :func:`torch.nn.functional.interpolate`.
        dtype: Type to compute in.
    """

    def __init__(
        self, logits: Tensor, size: tuple[int, int], align_corners: bool, dtype: torch.dtype
    ) -> None:
        self.logits, self.channels, self.dtype = logits, logits.shape[1], dtype
        self.device = logits.device
        self.align_corners = align_corners
        self.step = self.width = size[1]  # a block is whole rows
        self.rows, self.needed = _row_matrix(
            logits.shape[2], size[0], align_corners, dtype, logits.device
        )

    def read(self, image: int, start: int, stop: int, differentiate: bool = False) -> Reading:
        """Units ``start`` to ``stop``, whole rows, of one image."""
        top, bottom = start // self.width, stop // self.width
        first, last = self.needed[top][0], self.needed[bottom - 1][1]
        place = (slice(image, image + 1), slice(None), slice(first, last))
        source = self.logits[place].to(self.dtype).requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            stretched = _stretch(source, self.width, self.align_corners)
            graph = (self.rows[top:bottom, first:last] @ stretched).flatten(2)
        return Reading(graph.detach(), place, source, graph)

    def new_gradient(self) -> Tensor:
        """Memory for the gradient, at the coarse resolution."""
        return torch.zeros_like(self.logits, dtype=self.dtype)

    def add_gradient(self, gradient: Tensor, reading: Reading, upstream: Tensor) -> None:
        """Add the gradient of one block; neighbouring blocks share source rows."""
        graph, source = given(reading.graph, 'graph'), given(reading.source, 'source')
        (coarse,) = torch.autograd.grad(graph, source, upstream, retain_graph=True)
        gradient[reading.place] += coarse

    def in_shape(self, gradient: Tensor) -> list[Tensor]:
        """The gradient in the logits' own shape."""
        return [gradient]


class LevelLogits:
    """Logits of a detector's levels, ``(B, A, C, n)`` each, as its convolutions left them.

    The units are counted by level, image, prior and location here, so that a block is copied from
    and to the maps in long rows: nothing is transposed, nothing of full size is put together.

    Args:
        levels: Logits of ``A`` priors at the ``n`` locations of each level.
        dtype: Type to compute in.
    """

    step = 1

    def __init__(self, levels: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.shapes, self.channels, self.dtype = _shapes(levels), levels[0].shape[2], dtype
        self.device = levels[0].device
        self.levels = [level.flatten(0, 1) for level in levels]

    def read(self, image: int, start: int, stop: int, differentiate: bool = False) -> Reading:
        """Units ``start`` to ``stop`` of all images."""
        values = self.levels[0].new_empty((1, self.channels, stop - start), dtype=self.dtype)
        for level, rows, columns, place in self._pieces(start, stop):
            piece = self.levels[level][rows, :, columns].transpose(0, 1)
            values[0, :, place].view(piece.shape).copy_(piece)
        return Reading(values, (start, stop))

    def new_gradient(self) -> list[Tensor]:
        """Memory for the gradient; the blocks cover it once."""
        return [torch.empty_like(level, dtype=self.dtype) for level in self.levels]

    def add_gradient(self, gradient: list[Tensor], reading: Reading, upstream: Tensor) -> None:
        """Store the gradient of one block."""
        for level, rows, columns, place in self._pieces(*reading.place):
            piece = gradient[level][rows, :, columns].transpose(0, 1)
            piece.copy_(upstream[0, :, place].view(piece.shape))

    def in_shape(self, gradient: list[Tensor]) -> list[Tensor]:
        """The gradient in the logits' own shape."""
        return [x.view(shape) for x, shape in zip(gradient, self.shapes, strict=True)]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, slice, slice, slice]]:
        """Level, rows and columns of what a block is made of, and its place in the block."""
        first = 0  # unit of the level's first row
        for level, (rows, _, count) in enumerate(x.shape for x in self.levels):
            at, end = max(start, first) - first, min(stop, first + rows * count) - first
            while at < end:
                row, column = divmod(at, count)
                whole = 0 if column else (end - at) // count
                height, width = (whole, count) if whole else (1, min(count - column, end - at))
                place = first + at - start
                yield (
                    level,
                    slice(row, row + height),
                    slice(column, column + width),
                    slice(place, place + height * width),
                )
                at += height * width
            first += rows * count


class UnitOrder:
    """Values of units, ``(B, ...)``, in the order that blocks are read in, and back."""

    def to_blocks(self, values: Tensor) -> Tensor:
        """``(images, units)``."""
        return values.flatten(1) if values.ndim > 1 else values[None]

    def from_blocks(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Values ``(images, units)`` in the shape of the labels."""
        return values.view(shape)

    def segments(self, image: int, target: Tensor) -> list[tuple[int, int, int]]:
        """Row, start and stop of an image's units in ``target``, which is in this order."""
        return [(image, 0, target.shape[1])]


class LevelOrder(UnitOrder):
    """Detectors count their units ``(B, N)`` by level, location and prior.

    Args:
        levels: Logits ``(B, A, C, n)`` of each level.
    """

    def __init__(self, levels: Sequence[Tensor]) -> None:
        self.shapes = [(images, count, priors) for images, priors, _, count in _shapes(levels)]
        self.sizes = [count * priors for _, count, priors in self.shapes]

    def to_blocks(self, values: Tensor) -> Tensor:
        """``(1, B * N)``, by level, image, prior and location."""
        parts = zip(values.split(self.sizes, 1), self.shapes, strict=True)
        return torch.cat([part.reshape(s).transpose(1, 2).flatten() for part, s in parts])[None]

    def from_blocks(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Values ``(1, B * N)`` in the shape of the labels, ``(B, N)``."""
        images = shape[0]
        parts = zip(values[0].split([images * n for n in self.sizes]), self.shapes, strict=True)
        return torch.cat([p.view(b, a, n).transpose(1, 2).flatten(1) for p, (b, n, a) in parts], 1)

    def segments(self, image: int, target: Tensor) -> list[tuple[int, int, int]]:
        """One of each level."""
        segments, first = [], 0
        for (images, *_), size in zip(self.shapes, self.sizes, strict=True):
            segments.append((0, first + image * size, first + (image + 1) * size))
            first += images * size
        return segments


def _shapes(levels: Sequence[Tensor]) -> list[torch.Size]:
    return [level.shape for level in levels]


def _stretch(source: Tensor, width: int, align_corners: bool) -> Tensor:
    """Rows ``(1, C, h, w)`` interpolated to ``(1, C, h, width)``."""
    if source.device.type == 'cpu':  # the same numbers in half the time
        flat = source.flatten(1, 2)
        wide = F.interpolate(flat, size=width, mode='linear', align_corners=align_corners)
        return wide.unflatten(1, source.shape[1:3])
    size = (source.shape[2], width)  # a mode with a deterministic gradient on a GPU
    return F.interpolate(source, size=size, mode='bilinear', align_corners=align_corners)


@lru_cache(maxsize=32)
def _row_matrix(
    source: int, target: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Bilinear interpolation of rows as a matrix, and which source rows each row needs.

    Made on the CPU and cached, so that later steps have no host sync.
    """
    matrix = F.interpolate(
        torch.eye(source, dtype=dtype)[None, None],
        size=(target, source),
        mode='bilinear',
        align_corners=align_corners,
    )[0, 0]
    needed = (matrix != 0).int()
    first, last = needed.argmax(1), source - needed.flip(1).argmax(1)
    return matrix.to(device), list(zip(first.tolist(), last.tolist(), strict=True))


def logits_reader(
    logits: Tensor | Sequence[Tensor], size: torch.Size, align_corners: bool, dtype: torch.dtype
) -> LogitsReader:
    """How to read logits for labels of the given size.

    Raises:
        ValueError: When the sizes differ and are not those of two maps.
    """
    if not isinstance(logits, Tensor):
        return LevelLogits([level.detach() for level in logits], dtype)
    logits = logits.detach()
    if logits.shape[2:] == size:
        return FullLogits(logits, dtype)
    if logits.ndim != 4:
        raise ValueError(
            'Only maps (B, C, h, w) can be brought to the size of the labels. '
            f'Found logits of shape {tuple(logits.shape)} for labels of size {tuple(size)}.'
        )
    height, width = size
    return CoarseLogits(logits, (height, width), align_corners, dtype)
