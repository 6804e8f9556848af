"""Logits read block by block, upsampled where they are coarser than the labels.

Bilinear interpolation is linear and separable: a block of output rows needs a few source rows,
stretched in width, times the matching part of a small row matrix. The gradient goes the same way
back, so that logits at full resolution never exist for more than one block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Reading(NamedTuple):
    """One block of logits and where it came from."""

    values: Tensor  # (1, C, n)
    place: tuple  # index, in the logits, of what was read
    source: Tensor | None = None  # what was read, a leaf
    graph: Tensor | None = None  # the values, attached to `source`


class FullLogits:
    """Logits ``(B, C, ...)`` with one prediction per label.

    Args:
        logits: ``(B, C, ...)``; ``(N, C)`` counts as one image of N units.
        dtype: Type to compute in.
    """

    step = 1  # a block may begin at any unit

    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.channels, self.dtype = logits.shape, logits.shape[1], dtype
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

    def in_shape(self, gradient: Tensor) -> Tensor:
        """The gradient in the logits' own shape."""
        return gradient[0].t() if len(self.shape) == 2 else gradient.view(self.shape)


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
            stretched = F.interpolate(
                source,
                size=(last - first, self.width),
                mode='bilinear',
                align_corners=self.align_corners,
            )
            graph = (self.rows[top:bottom, first:last] @ stretched).flatten(2)
        return Reading(graph.detach(), place, source, graph)

    def new_gradient(self) -> Tensor:
        """Memory for the gradient, at the coarse resolution."""
        return torch.zeros_like(self.logits, dtype=self.dtype)

    def add_gradient(self, gradient: Tensor, reading: Reading, upstream: Tensor) -> None:
        """Add the gradient of one block; neighbouring blocks share source rows."""
        (coarse,) = torch.autograd.grad(reading.graph, reading.source, upstream, retain_graph=True)
        gradient[reading.place] += coarse

    def in_shape(self, gradient: Tensor) -> Tensor:
        """The gradient in the logits' own shape."""
        return gradient


@lru_cache(maxsize=32)
def _row_matrix(
    source: int, target: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Bilinear interpolation of rows as a matrix, and which source rows each row needs.

    Made on the CPU and cached, so that later steps do not wait for a GPU.
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
    logits: Tensor, size: torch.Size, align_corners: bool, dtype: torch.dtype
) -> FullLogits | CoarseLogits:
    """How to read logits for labels of the given size.

    Raises:
        ValueError: When the sizes differ and are not those of two maps.
    """
    if logits.shape[2:] == size:
        return FullLogits(logits, dtype)
    if logits.ndim != 4:
        raise ValueError(
            'Only maps (B, C, h, w) can be brought to the size of the labels. '
            f'Found logits of shape {tuple(logits.shape)} for labels of size {tuple(size)}.'
        )
    return CoarseLogits(logits, tuple(size), align_corners, dtype)
