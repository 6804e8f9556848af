"""The pass over all blocks of several networks: combine, compare, pull, and sum up gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.closed_forms import (
    Prediction,
    difference_with_gradient,
    distance_with_gradient,
)
from mmdistill_ext.functional.blocks.reader import BlockReader, Place
from mmdistill_ext.functional.blocks.readers import Reading
from mmdistill_ext.functional.blocks.values import Labels
from mmdistill_ext.functional.blocks.weighted_sum import clear_ignored_

Combine = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Logits ``(N, 1, C, n)``, labels ``(1, n)``, weights ``(N, 1, n)`` or None -> ``(1, C, n)``."""
WeighImage = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(N, 1, C, n)`` and labels ``(1, n)`` of one image -> weights ``(N,)``."""
PullLoss = Callable[[Tensor, Tensor, Labels], Tensor]
"""Logits ``(1, C, n)`` of a network and of the second prediction, and labels -> ``(1, n)``."""


class CollaborationPass:
    """One pass over N networks; :meth:`run` leaves sums and gradients in the attributes.

    Args:
        reader: The networks' logits and the labels.
        combine: Makes the second prediction of a block.
        weigh_image: Gives the weights of an image; None: ``combine`` gets none.
        second_loss: Loss of the second prediction, logits and labels -> ``(1, n)``.
        pull_loss: Distance of a network from the second prediction; None: there is no pull.
        differentiate_second: Form the gradients of the second loss.
        differentiate_pull: Form the gradients of the pull.

    Attributes:
        counts: ``(labels,)`` int64, valid units of each label.
    """

    def __init__(
        self,
        reader: BlockReader,
        combine: Combine,
        weigh_image: WeighImage | None,
        second_loss: Callable[[Tensor, Labels], Tensor],
        pull_loss: PullLoss | None,
        differentiate_second: bool,
        differentiate_pull: bool,
    ) -> None:
        self.reader, self.combine, self.weigh_image = reader, combine, weigh_image
        self.second_loss, self.pull_loss = second_loss, pull_loss
        zeros = reader.target.new_zeros
        self._histogram = zeros(reader.classes + 1, dtype=torch.int64)  # ignored first
        self._totals = zeros(1 + len(reader), dtype=reader.dtype)  # the second loss, the pulls
        self._seconds = self._new_gradients() if differentiate_second else None
        self._pulls = self._new_gradients() if differentiate_pull else None

    def run(self) -> None:
        """Go through all blocks."""
        weights = self._weigh_images(self.weigh_image) if self.weigh_image else None
        for place in self.reader.places():
            index = (slice(None), *place.slices)
            self._block(place, None if weights is None else weights[index])
        self.counts = self._histogram[1:]
        self.sums = [total.clone() for total in self._totals]  # views cannot be changed in place
        self.gradients = [self._of_leaves(self._seconds)]
        for network in range(len(self.reader)):
            self.gradients.append(self._of_leaves(self._pulls, network))

    def _block(self, place: Place, weights: Tensor | None) -> None:
        labels = self.reader.labels(place)
        bins = (1 + labels.index).where(labels.valid, 0)
        self._histogram.scatter_add_(0, bins[0], torch.ones_like(bins[0]))
        differentiate = self._seconds is not None or self._pulls is not None
        readings = [reader.read(*place, differentiate) for reader in self.reader.readers]
        logits = torch.stack([reading.values for reading in readings])
        counted = labels.valid.to(self.reader.dtype)
        mixture = self._second(readings, logits, labels, weights, counted)
        if self.pull_loss is not None:
            self._pull(self.pull_loss, readings, logits.detach(), mixture, labels, counted)

    def _second(
        self,
        readings: list[Reading],
        logits: Tensor,
        labels: Labels,
        weights: Tensor | None,
        counted: Tensor,
    ) -> Prediction:
        """Add the second loss of a block; give the second prediction, without gradient."""
        seconds = self._seconds
        differentiate = seconds is not None
        with torch.set_grad_enabled(differentiate):
            logits = logits.requires_grad_(differentiate)
            mixture = self.combine(logits, labels.target, weights)
        prediction = Prediction(mixture.detach())
        units, upstream = difference_with_gradient(
            self.second_loss, prediction, labels, counted if differentiate else None
        )
        self._totals[0] += units.sum()
        if seconds is not None:
            (upstream,) = torch.autograd.grad(mixture, logits, upstream)
            parts = zip(
                self.reader.readers,
                seconds,
                readings,
                clear_ignored_(upstream, units, counted),
                strict=True,
            )
            for reader, gradient, reading, part in parts:
                reader.add_gradient(gradient, reading, part)
        return prediction

    def _pull(
        self,
        pull_loss: PullLoss,
        readings: list[Reading],
        logits: Tensor,
        mixture: Prediction,
        labels: Labels,
        counted: Tensor,
    ) -> None:
        """Add the distances of a block, network by network."""
        pulls = self._pulls
        for network, reader in enumerate(self.reader.readers):
            units, upstream = distance_with_gradient(
                pull_loss, logits[network], mixture, labels, None if pulls is None else counted
            )
            self._totals[1 + network] += units.where(labels.valid, 0).sum()
            if pulls is not None and upstream is not None:
                reader.add_gradient(pulls[network], readings[network], upstream)

    def _new_gradients(self) -> list:
        return [reader.new_gradient() for reader in self.reader.readers]

    def _of_leaves(
        self, gradients: list | None, network: int | None = None
    ) -> list[Tensor | None] | None:
        """One gradient per leaf of all networks; None at leaves of other networks than this."""
        if gradients is None:
            return None
        of_leaves: list[Tensor | None] = []
        for place, leaves in enumerate(self.reader.leaves):
            if network in (None, place):
                of_leaves += self.reader.readers[place].in_shape(gradients[place])
            else:
                of_leaves += [None] * len(leaves)
        return of_leaves

    def _weigh_images(self, weigh_image: WeighImage) -> Tensor:
        """Weights of each unit, ``(N, rows, units)``."""
        images = range(self.reader.images)
        weights = [weigh_image(*self.reader.read_image(image)) for image in images]
        return self.reader.spread(torch.stack(weights, 1).to(self.reader.dtype))
