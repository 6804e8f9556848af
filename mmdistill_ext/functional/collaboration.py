"""The second prediction of several networks, its loss and the pull towards it, block by block.

Requirements COL-3 and COL-4 of the documentation. As in
:mod:`~mmdistill_ext.functional.blockwise`, logits at the labels' resolution exist for one block at
a time, and each block is turned into losses and gradients while it is in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdistill_ext.functional.blocks.distillation_pass import gradient_of_units
from mmdistill_ext.functional.blocks.reader import Networks
from mmdistill_ext.functional.blocks.sums import PassSums
from mmdistill_ext.functional.checks import (
    check_difference,
    check_distance,
    check_temperature,
    num_label_classes,
)
from mmdistill_ext.functional.ensemble import error_correlation
from mmdistill_ext.functional.logits.selective import unit_difference, unit_distillation

__all__ = ['CollaborationResult', 'collaborate', 'networks_correlation']

Combine = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Logits ``(N, 1, C, n)``, labels ``(1, n)``, weights ``(N, 1, n)`` or None -> ``(1, C, n)``."""
WeighImage = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(N, 1, C, n)`` and labels ``(1, n)`` of one image -> weights ``(N,)``."""


@dataclass(frozen=True)
class CollaborationResult:
    """Sums of one pass; to normalise them is the caller's, who knows the other ranks' sums.

    Attributes:
        second_sum: Scalar, the second prediction's loss over the valid units; differentiable.
        pull_sums: Of each network a scalar, its distance from the second prediction over the valid
            units; differentiable with respect to that network alone.
        counts: ``(labels,)`` int64, valid units of each label.
    """

    second_sum: Tensor
    pull_sums: tuple[Tensor, ...]
    counts: Tensor


def collaborate(
    networks: Networks,
    combine: Combine,
    *,
    weigh_image: WeighImage | None = None,
    difference: str = 'ce',
    distance: str = 'kl',
    temperature: float = 1.0,
    second: bool = True,
    pull: bool = True,
) -> CollaborationResult:
    """Form the second prediction, its loss, and each network's distance from it (COL-3, COL-4).

    The second loss is differentiated with respect to all networks, through the mixture and not
    through the choice of its weights; the distances with respect to one network each, the second
    prediction being constant. All in float32 (float64 if a network's logits are), also under
    autocast. Nothing waits for the device.

    Args:
        networks: The logits and labels.
        combine: Makes the second prediction of a block.
        weigh_image: Gives the weights of an image, which ``combine`` gets for each unit of it.
        difference: The second loss, see
            :func:`~mmdistill_ext.functional.logits.selective.unit_difference`.
        distance: Between second prediction (the teacher there) and network, see
            :func:`~mmdistill_ext.functional.logits.selective.unit_distillation`.
        temperature: > 0, of the distance.
        second: Whether the second loss is to be differentiated.
        pull: Whether the distances are to be formed; else they are 0.

    Returns:
        The sums, see :class:`CollaborationResult`.

    Raises:
        ValueError: On unknown kinds or a temperature <= 0.
    """
    check_difference(difference, networks.channels, networks.background)
    check_distance(distance, networks.channels)
    check_temperature(temperature)
    made = _Pass(networks, combine, weigh_image, difference, distance, temperature, second, pull)
    leaves = [leaf for group in networks.leaves for leaf in group]
    made.differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    with torch.autocast(networks.target.device.type, enabled=False):
        second_sum, *pull_sums = PassSums.apply(made, *leaves)
    return CollaborationResult(second_sum, tuple(pull_sums), made.counts)


@dataclass
class _Pass:
    """Arguments of one pass; :meth:`run` leaves sums and gradients in its attributes."""

    networks: Networks
    combine: Combine
    weigh_image: WeighImage | None
    difference: str
    distance: str
    temperature: float
    second: bool
    pull: bool
    differentiate: bool = True

    def run(self) -> None:
        """Go through all blocks."""
        networks = self.networks
        self.classes = num_label_classes(networks.channels, networks.background)
        self.counts = networks.target.new_zeros(self.classes + 1, dtype=torch.int64)  # void first
        self.totals = networks.target.new_zeros(1 + len(networks), dtype=networks.dtype)
        self.seconds = self._new_gradients(self.second)
        self.pulls = self._new_gradients(self.pull)
        weights = self._weigh_images() if self.weigh_image else None
        for place in networks.places():
            self._block(place, weights)
        self.counts = self.counts[1:]
        self.sums = [total.clone() for total in self.totals]  # views cannot be changed in place
        self.gradients = [self._of_leaves(self.seconds)]
        for own in range(len(networks)):
            self.gradients.append(self._of_leaves(self.pulls, own))

    def _new_gradients(self, wanted: bool) -> list | None:
        if not (wanted and self.differentiate):
            return None
        return [reader.new_gradient() for reader in self.networks.readers]

    def _of_leaves(
        self, gradients: list | None, network: int | None = None
    ) -> list[Tensor | None] | None:
        """One per leaf of all networks; None for those of others than ``network``."""
        if gradients is None:
            return None
        found = []
        for place, (reader, leaves) in enumerate(
            zip(self.networks.readers, self.networks.leaves, strict=True)
        ):
            counts = network in (None, place)
            found += reader.in_shape(gradients[place]) if counts else [None] * len(leaves)
        return found

    def _weigh_images(self) -> Tensor:
        """Of each unit, ``(N, rows, units)``."""
        networks = self.networks
        weights = torch.stack(
            [self.weigh_image(*networks.read_image(i)) for i in range(networks.images)], 1
        )
        return networks.spread(weights.to(networks.dtype))

    def _block(self, place: tuple[int, int, int], weights: Tensor | None) -> None:
        networks = self.networks
        row, start, stop = place
        readings = [
            reader.read(row, start, stop, self.differentiate) for reader in networks.readers
        ]
        labels = networks.target[row : row + 1, start:stop].long()
        valid = labels != networks.ignore_index
        if weights is not None:
            weights = weights[:, row : row + 1, start:stop]
        bins = (1 + labels).where(valid, 0)
        self.counts.scatter_add_(0, bins[0], torch.ones_like(bins[0]))

        counted = valid.to(networks.dtype)
        stack = torch.stack([reading.values for reading in readings])
        with torch.set_grad_enabled(self.seconds is not None):
            leaf = stack.requires_grad_(self.seconds is not None)
            mixture = self.combine(leaf, labels, weights)
            kind = (self.difference, networks.ignore_index, networks.background)
            units = unit_difference(mixture, labels, *kind)
        self.totals[0] += units.detach().sum()
        if self.seconds is not None:
            upstream = gradient_of_units(units, leaf, counted)
            self._add(self.seconds, readings, upstream)
        if not self.pull:
            return
        mixture = mixture.detach()
        for network, reading in enumerate(readings):
            with torch.set_grad_enabled(self.pulls is not None):
                own = reading.values.detach().requires_grad_(self.pulls is not None)
                units = unit_distillation(own, mixture, self.distance, self.temperature)
            self.totals[1 + network] += units.detach().where(valid, 0).sum()
            if self.pulls is not None:
                upstream = gradient_of_units(units, own, counted)
                networks.readers[network].add_gradient(self.pulls[network], reading, upstream)

    def _add(self, gradients: list, readings: list, upstream: Tensor) -> None:
        parts = zip(self.networks.readers, gradients, readings, upstream, strict=True)
        for reader, gradient, reading, part in parts:
            reader.add_gradient(gradient, reading, part)


@torch.no_grad()
def networks_correlation(networks: Networks, difference: str = 'ce') -> tuple[Tensor, Tensor]:
    """:func:`~mmdistill_ext.functional.error_correlation` of all units, block by block.

    Returns:
        ``(N, N)`` and the number of valid units, both float64.
    """
    parts = [
        error_correlation(
            *networks.read(place),
            difference=difference,
            ignore_index=networks.ignore_index,
            background=networks.background,
        )
        for place in networks.places()
    ]
    return sum(matrix for matrix, _ in parts), sum(count for _, count in parts)
