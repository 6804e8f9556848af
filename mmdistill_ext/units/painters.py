"""Where a detector's units lie in the image (SEL-4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Level(NamedTuple):
    """One level of a detector's units."""

    height: int
    width: int
    priors: int  # per location
    stride: int


class Levels(tuple[Level, ...]):
    """Units level by level, within a level rows, columns, priors; painted as one map per level.

    Each location is a square with its stride as side. The teacher wins the square if it wins most
    of the valid priors there.
    """

    @property
    def sizes(self) -> list[int]:
        """Number of units of each level."""
        return [level.height * level.width * level.priors for level in self]

    def __call__(self, wins: Tensor, valid: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """``(B, N)`` -> maps of each level."""
        maps = {}
        for level, *both in self.by_location(wins, valid):
            better, counted = (
                x.repeat_interleave(level.stride, 1).repeat_interleave(level.stride, 2)
                for x in both
            )
            maps[f'_stride{level.stride}'] = better, counted
        return maps

    def by_location(self, wins: Tensor, valid: Tensor) -> Iterator[tuple[Level, Tensor, Tensor]]:
        """Each level, with who wins and what is valid at its locations, ``(B, height, width)``."""
        parts = zip(self, wins.split(self.sizes, 1), valid.split(self.sizes, 1), strict=True)
        for level, won, known in parts:
            shape = (len(wins), level.height, level.width, level.priors)
            won, known = won.view(shape).sum(-1), known.view(shape).sum(-1)
            yield level, 2 * won > known, known > 0


@dataclass(frozen=True)
class Stretched:
    """Levels whose locations divide the image evenly, whatever their stride.

    Args:
        levels: The levels.
        size: Height and width of the batch's images, in pixels.
        name: What a level is called by.
    """

    levels: Levels
    size: tuple[int, int]
    name: str = 'stride'

    def __call__(self, wins: Tensor, valid: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """``(B, N)`` -> maps of each level."""
        maps = {}
        for level, *both in self.levels.by_location(wins, valid):
            stretched = F.interpolate(torch.stack(both, 1).float(), self.size, mode='nearest')
            better, counted = stretched.bool().unbind(1)
            maps[f'_{self.name}{level.stride}'] = better, counted
        return maps


@dataclass(frozen=True)
class MaskRegions:
    """Masks that are one unit each, or whose pixels are units; painted as one map.

    Where several masks have a unit, the teacher wins if it wins most of them.
    """

    size: tuple[int, int]  # of the batch's images, in pixels
    images: int
    index: tuple[Tensor, ...]  # image of each mask; and its unit, where units are (B, N)
    masks: Tensor | None = None  # (P, h, w) bool, where units are (B, N)

    def __call__(self, wins: Tensor, valid: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """``(B, N)``, or ``(P, h, w)`` -> one map."""
        if self.masks is not None:
            wins, valid = (x[self.index][:, None, None] & self.masks for x in (wins, valid))
        both = torch.stack((wins & valid, valid)).int()
        counts = both.new_zeros(2, self.images, *both.shape[2:]).index_add(1, self.index[0], both)
        won, known = F.interpolate(counts.float(), self.size, mode='nearest')
        return {'': (2 * won > known, known > 0)}


@dataclass(frozen=True)
class BoxRegions:
    """Boxes that are one unit each, or hold a map of units; painted as one map.

    A unit covers its box; a map ``(h, w)`` is enlarged to its box. Where boxes overlap, the teacher
    wins if it wins most of them. Units of image ``i + k * images`` lie in image ``i``, at which
    the student looks several times.
    """

    size: tuple[int, int]  # of the batch's images, in pixels
    images: int
    index: tuple[Tensor, ...]  # image of each box; and its unit, where units are (B, N)
    boxes: Tensor  # (P, 4)

    def __call__(self, wins: Tensor, valid: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """``(B, N)``, or ``(P, h, w)`` -> one map."""
        counts = torch.zeros(2, self.images, *self.size, dtype=torch.int32)
        if len(self.index) > 1:
            wins, valid = wins[self.index][:, None, None], valid[self.index][:, None, None]
        limit = self.boxes.new_tensor(self.size).flip(0).repeat(2)
        corners = self.boxes.clamp(min=0).minimum(limit).round().long().tolist()
        places = zip((self.index[0] % self.images).tolist(), corners, wins, valid, strict=True)
        for image, (left, top, right, bottom), won, known in places:
            if right <= left or bottom <= top:
                continue
            both = torch.stack((won & known, known))[None].float().cpu()
            both = F.interpolate(both, (bottom - top, right - left), mode='nearest')[0].int()
            counts[:, image, top:bottom, left:right] += both
        won, known = counts
        return {'': (2 * won > known, known > 0)}
