"""Differences between a prediction and its label, per unit: what decides who wins (SEL-2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mmdistill_ext.functional.blocks.values import Labels
from mmdistill_ext.functional.checks import check_choice, check_same_size
from mmdistill_ext.functional.precision import full_precision

__all__ = [
    'DIFFERENCES',
    'BinaryCrossEntropyDifference',
    'CrossEntropyDifference',
    'Difference',
    'check_difference',
    'find_difference',
    'unit_difference',
]


class Difference(ABC):
    """Difference of each unit's prediction from its label."""

    name: ClassVar[str]
    """What configs and errors call it."""
    softmax_only: ClassVar[bool] = False
    """It has no meaning for a head of independent sigmoids."""

    @property
    def described(self) -> str:
        """Its name and options, for errors."""
        return repr(self.name)

    def check(self, channels: int, background: bool = False) -> None:  # noqa: B027
        """Raise ``ValueError`` unless it exists for logits with so many channels.

        Args:
            channels: ``C``, >= 1.
            background: Labels go from 0 to ``C``, which is background.
        """

    @abstractmethod
    def __call__(self, logits: Tensor, labels: Labels) -> Tensor:
        """Form the difference.

        Args:
            logits: ``(B, C, ...)``, float32 or float64.
            labels: Of the ``(B, ...)`` units.

        Returns:
            ``(B, ...)``, >= 0, and 0 (with gradient 0) on units that are ignored.
        """


@dataclass(frozen=True)
class CrossEntropyDifference(Difference):
    """``-log softmax(x)_y``."""

    name = 'ce'
    softmax_only = True

    def check(self, channels: int, background: bool = False) -> None:
        """Raise ``ValueError`` for a head with background, or with one channel."""
        if background:
            raise ValueError(
                "`background=True` needs difference='bce': a softmax has a channel of its own for "
                "background. Found difference='ce'."
            )
        if channels == 1:
            raise ValueError(
                "`difference='ce'` is 0 everywhere on logits with one channel: a binary head needs "
                "difference='bce'. Found channels=1."
            )

    def __call__(self, logits: Tensor, labels: Labels) -> Tensor:
        """Cross-entropy of each unit, ``(B, ...)``."""
        logits, target = _without_ignored(logits, labels), labels.target.long()
        return F.cross_entropy(logits, target, reduction='none', ignore_index=labels.ignore_index)


@dataclass(frozen=True)
class BinaryCrossEntropyDifference(Difference):
    """``sum_c BCE(sigmoid(x_c), [c = y])``; background is no class, so that all terms are of 0.

    With one channel and labels of a binary segmenter (no background) the label is 0 (background)
    or 1 (foreground).
    """

    name = 'bce'

    def __call__(self, logits: Tensor, labels: Labels) -> Tensor:
        """Binary cross-entropy of each unit, ``(B, ...)``."""
        logits, label = _without_ignored(logits, labels), labels.index.unsqueeze(1)
        if labels.background:
            at_label = logits.gather(1, label.clamp(max=logits.shape[1] - 1))
            at_label = at_label.masked_fill(label == logits.shape[1], 0)
        else:
            at_label = logits * label if logits.shape[1] == 1 else logits.gather(1, label)
        return (F.softplus(logits).sum(1) - at_label.squeeze(1)).where(labels.valid, 0)


def _without_ignored(logits: Tensor, labels: Labels) -> Tensor:
    """Logits whose ignored units are 0 where they are differentiated.

    Values are safe without; a gradient of 0 times NaN is not.
    """
    return logits.masked_fill(~labels.valid.unsqueeze(1), 0) if logits.requires_grad else logits


DIFFERENCES: dict[str, Difference] = {
    x.name: x for x in (CrossEntropyDifference(), BinaryCrossEntropyDifference())
}


def find_difference(name: str) -> Difference:
    """The difference of that name.

    Raises:
        ValueError: There is none.
    """
    check_choice('difference', name, tuple(DIFFERENCES))
    return DIFFERENCES[name]


def check_difference(name: str, channels: int, background: bool = False) -> None:
    """Raise ``ValueError`` unless the difference exists for logits with so many channels."""
    find_difference(name).check(channels, background)


def unit_difference(
    logits: Tensor,
    target: Tensor,
    kind: str = 'ce',
    ignore_index: int = 255,
    background: bool = False,
) -> Tensor:
    """Difference between a prediction and its label, per unit (SEL-2).

    ``ce``: ``-log softmax(x)_y``. ``bce``: ``sum_c BCE(sigmoid(x_c), [c = y])``; the label ``C`` is
    background, no class at all, as detectors have it. With one channel and labels of a binary
    segmenter (``background=False``) it is 0 (background) or 1 (foreground).

    Args:
        logits: ``(B, C, ...)``.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        kind: ``'ce'`` or ``'bce'``.
        ignore_index: Label of units that are ignored.
        background: With ``bce``: labels go from 0 to ``C``, which is background.

    Returns:
        ``(B, ...)``, >= 0, and 0 (with gradient 0) on units that are ignored; float32, or float64
        for float64 logits.

    Raises:
        ValueError: On another kind, or shapes and types that do not fit.

    Example:
        >>> import torch
        >>> unit_difference(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 255]]))
        tensor([[0.6931, 0.6931, 0.0000]])
    """
    check_same_size('logits', logits, target)
    check_difference(kind, logits.shape[1], background)
    labels = Labels(target, ignore_index, background)
    return DIFFERENCES[kind](full_precision(logits), labels)
