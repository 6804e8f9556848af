"""What a block-wise pass is given, as values: the sides, their labels, and what to form of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """Logits of one network.

    Args:
        logits: ``(B, C, ...)``; a map ``(B, C, h, w)`` may have another size than the labels and is
            upsampled bilinearly. Or the levels of a detector, ``(B, A, C, n)`` each: ``A`` priors
            at ``n`` locations.
        align_corners: How a map is upsampled, as in :func:`torch.nn.functional.interpolate`.
        extra: Shape of the labels; added to the difference of each unit (that of its box, say).
    """

    logits: Tensor | Sequence[Tensor]
    align_corners: bool = False
    extra: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The logits as a list: one map, or every level."""
        return [self.logits] if isinstance(self.logits, Tensor) else list(self.logits)


@dataclass(frozen=True)
class Labels:
    """Labels of units, of a whole batch or of one block.

    Args:
        target: Class indices or ``ignore_index``: ``(B, ...)``; of levels ``(B, N)``, counted by
            level, location and prior; of a block ``(1, n)``, int64.
        ignore_index: Label of units that are ignored.
        background: The label ``C`` is background, no class at all, as detectors have it.
    """

    target: Tensor
    ignore_index: int = 255
    background: bool = False

    @cached_property
    def valid(self) -> Tensor:
        """Units that are not ignored, bool, in the shape of the target."""
        return self.target != self.ignore_index

    @cached_property
    def index(self) -> Tensor:
        """Class indices, int64, in the shape of the target; 0 where ignored."""
        return self.target.long().where(self.valid, 0)


@dataclass(frozen=True)
class CrossEntropy:
    """The head's own loss, where the pass is to form it too.

    Args:
        class_weight: ``(classes,)``, >= 0, multiplies the weight of each unit by that of its label.
    """

    class_weight: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """How a pass splits its losses into simple and hard parts (FIT-3 to FIT-5).

    Args:
        by: ``'unit'``, or ``'image'``: all units of an image are simple or hard together.
        threshold: Share of units in (0, 1] that the teacher gets right in a simple image.
        hard_weight: ``F(x)``, >= 0, the weight of hard units.
        simple: Bool in the shape of the labels, the simple units, where more than the logits
            decides; ``by`` is then of no account.
    """

    by: str = 'unit'
    threshold: float = 0.9
    hard_weight: float = 1.0
    simple: Tensor | None = None


def compute_dtype(leaves: Sequence[Tensor]) -> torch.dtype:
    """float64 if some of the tensors are, else float32."""
    return torch.float64 if torch.float64 in {x.dtype for x in leaves} else torch.float32
