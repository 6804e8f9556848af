"""From logits to probabilities: what a head predicts with, and how one sort becomes another."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision


class Activation(NamedTuple):
    """What turns a head's logits into probabilities.

    Attributes:
        sigmoid: Every channel has a sigmoid of its own, instead of one softmax over all.
        channels: Number of channels, >= 1.
    """

    sigmoid: bool
    channels: int

    def __str__(self) -> str:
        if not self.sigmoid:
            return f'a softmax over {self.channels} channels'
        return f'{self.channels} sigmoids' if self.channels > 1 else 'one sigmoid'


def conversion(source: Activation, target: Activation) -> Callable[[Tensor], Tensor] | None:
    """How logits of one sort become logits of another that mean the same probabilities.

    A softmax gives each class a probability, which a sigmoid can state too: its log-odds. The other
    way only one sigmoid for two classes is a distribution; several do not sum to 1.

    Args:
        source: What the logits are for.
        target: What they should be for.

    Returns:
        The conversion of logits ``(B, C, ...)``; None if there is no exact one.
    """
    if source == target:
        return _unchanged
    if target.sigmoid and not source.sigmoid and source.channels == target.channels:
        return log_odds
    return _BINARY.get((source, target))


def log_odds(logits: Tensor) -> Tensor:
    """``log p - log (1 - p)`` of each class of a softmax: the logits of as many sigmoids.

    The largest is compared with the sum of the others, so that nothing cancels where ``p`` is 1
    within the precision of its type.

    Args:
        logits: ``(B, C, ...)``, ``C >= 2``.

    Returns:
        ``(B, C, ...)``, float32 or better.

    Example:
        >>> log_odds(torch.tensor([[20.0, -20.0]]))
        tensor([[ 40., -40.]])
    """
    logits = full_precision(logits)
    top = logits.argmax(1, keepdim=True)
    others = logits.scatter(1, top, float('-inf')).logsumexp(1, keepdim=True)
    total = logits.logsumexp(1, keepdim=True)
    below = (logits - total).scatter(1, top, float('-inf'))  # where p <= 1/2
    odds = logits - total - torch.log1p(-below.exp())
    return odds.scatter(1, top, logits.gather(1, top) - others)


def mask_logits(classes: Tensor, masks: Tensor) -> Tensor:
    """Per-pixel logits of a mask classifier (MaskFormer, NeurIPS 2021, section 3.4).

    A pixel's score of a class is ``sum_q softmax(classes_q)[c] sigmoid(mask_q)``, "no object" left
    out, as the head predicts. The softmax of the logarithm is that score over the sum of all.

    Args:
        classes: ``(B, Q, C + 1)``, logits of the classes of every query, the last is "no object".
        masks: ``(B, Q, H, W)``, logits of its mask.

    Returns:
        ``(B, C, H, W)``, at the masks' stride.
    """
    classes, masks = full_precision(classes), full_precision(masks)
    return log_scores(
        torch.einsum('bqc,bqhw->bchw', classes.softmax(-1)[..., :-1], masks.sigmoid())
    )


def log_scores(scores: Tensor) -> Tensor:
    """Logarithm of scores >= 0, such that 0 stays finite."""
    return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _difference(logits: Tensor) -> Tensor:
    return full_precision(logits).diff(dim=1)


def _beside_zero(logits: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(logits), logits), 1)


def _mirrored(logits: Tensor) -> Tensor:
    return torch.cat((-logits, logits), 1)


_ONE, _TWO, _PAIR = Activation(True, 1), Activation(True, 2), Activation(False, 2)
_BINARY: dict[tuple[Activation, Activation], Callable[[Tensor], Tensor]] = {
    (_PAIR, _ONE): _difference,
    (_ONE, _PAIR): _beside_zero,
    (_ONE, _TWO): _mirrored,
}
