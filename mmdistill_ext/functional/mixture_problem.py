"""The loss of a mixture of predictions as a function of the mixture's weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdistill_ext.functional.precision import full_precision

ROUNDING = 4
"""A gap of so many units in the last place of the logits is none."""


class MixtureProblem:
    """The loss of ``sum_n w_n logits_n`` and its derivatives along weights, ``(B, U or 1)``.

    Logits are shifted so that the label's is 0, or with ``'bce'`` turned so that every channel's
    target is 0: on the simplex the losses stay what they are, and no longer need the labels.

    Args:
        logits: ``(N, B, C, ...)``.
        target: ``(B, ...)``, class indices or ``ignore_index``.
        by_image: The weights are those of images, the loss is the mean over the valid units.
        difference: ``'ce'`` or ``'bce'``.
        ignore_index: Label of units that are ignored; they add nothing to any sum.
        background: With ``'bce'``: the label ``C`` is background.

    Attributes:
        logits: ``(N, B, C, U)``, shifted or turned, without gradient; 0 on ignored units.
        shape: ``(N, B, U or 1)``, that of the weights.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        by_image: bool,
        difference: str,
        ignore_index: int,
        background: bool,
    ) -> None:
        count, images, channels = logits.shape[:3]
        units = math.prod(target.shape[1:])
        target = target.reshape(images, 1, units)
        valid = target != ignore_index
        logits = full_precision(logits.detach()).reshape(count, images, channels, units)
        self.softmax = difference == 'ce'
        if self.softmax:
            label = target.long().where(valid, 0).expand(count, *target.shape)
            logits = logits - logits.gather(2, label)
        else:
            binary = channels == 1 and not background
            classes = torch.arange(channels, device=target.device).view(-1, 1) + binary
            logits = torch.where(target == classes, -logits, logits)  # the label C has no channel
        self.logits = logits.masked_fill_(~valid, 0)  # memory of its own
        self.by_image = by_image
        self.share = 1 / valid.sum(-1).clamp(min=1).to(logits) if by_image else None
        self.shape = (count, images, 1 if by_image else units)

    def mix(self, weights: Tensor) -> Tensor:
        """``sum_n w_n logits_n``, ``(B, C, U)``."""
        mixture = weights[0].unsqueeze(1) * self.logits[0]
        for part, weight in zip(self.logits[1:], weights[1:], strict=True):
            mixture.addcmul_(part, weight.unsqueeze(1))
        return mixture

    def residual_(self, mixture: Tensor) -> Tensor:
        """Derivative of the loss with respect to its logits ``(B, C, U)``, maybe in their place."""
        return mixture.softmax(1) if self.softmax else mixture.sigmoid_()

    def slope_(self, mixture: Tensor, along: Tensor) -> Tensor:
        """Derivative of the loss in the direction ``along``, ``(B, U or 1)``.

        Args:
            mixture: Logits ``(B, C, U)``; their memory is used.
            along: ``(B, C, U)``.
        """
        return self.reduce(self.residual_(mixture).mul_(along).sum(1))

    def slope_and_curvature_(self, mixture: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative in the direction ``along``, ``(B, U or 1)`` each.

        Args:
            mixture: Logits ``(B, C, U)``; their memory is used.
            along: ``(B, C, U)``.
        """
        if self.softmax:
            weighted = self.residual_(mixture).mul_(along)
            slope = weighted.sum(1)
            curvature = weighted.mul_(along).sum(1) - slope.square()
        else:
            spread = (-mixture).sigmoid_()
            weighted = self.residual_(mixture).mul_(along)
            slope = weighted.sum(1)
            curvature = weighted.mul_(along).mul_(spread).sum(1)
        return self.reduce(slope), self.reduce(curvature)

    def rounding(self) -> Tensor:
        """Size of a gap that is no more than rounding, ``(B, U or 1)``."""
        largest = torch.maximum(self.logits.amax((0, 2)), -self.logits.amin((0, 2)))
        return ROUNDING * torch.finfo(largest.dtype).eps * self.reduce(largest)

    def reduce(self, values: Tensor) -> Tensor:
        """Values ``(..., B, U)`` of units, or their mean over each image's valid units."""
        return values if self.share is None else values.sum(-1, keepdim=True) * self.share
