"""The second prediction of several networks, its loss and the pull towards it, block by block.

Requirements COL-3 and COL-4 of the documentation. As in
:mod:`~mmdistill_ext.functional.blockwise`, logits at the labels' resolution exist for one block at
a time, and each block is turned into losses and gradients while it is in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmdistill_ext.functional.add_up import add_up
from mmdistill_ext.functional.blocks.collaboration_pass import (
    CollaborationPass,
    Combine,
    WeighImage,
)
from mmdistill_ext.functional.blocks.reader import BlockReader
from mmdistill_ext.functional.blocks.sums import PassSums
from mmdistill_ext.functional.ensemble import error_correlation
from mmdistill_ext.functional.logits.differences import find_difference
from mmdistill_ext.functional.logits.distances import make_distance

__all__ = ['CollaborationResult', 'collaborate', 'networks_correlation']


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
    reader: BlockReader,
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
    autocast. There is no host sync.

    Args:
        reader: The networks' logits and the labels.
        combine: Makes the second prediction of a block.
        weigh_image: Gives the weights of an image, which ``combine`` gets for each unit of it.
        difference: The second loss, see
            :func:`~mmdistill_ext.functional.logits.differences.unit_difference`.
        distance: Between second prediction (the teacher there) and network, see
            :func:`~mmdistill_ext.functional.logits.distances.unit_distillation`.
        temperature: > 0, of the distance.
        second: Whether the second loss is to be differentiated.
        pull: Whether the distances are to be formed; else they are 0.

    Returns:
        The sums, see :class:`CollaborationResult`.

    Raises:
        ValueError: On unknown names or a temperature <= 0.
    """
    second_loss, pull_loss = find_difference(difference), make_distance(distance, temperature)
    second_loss.check(reader.channels, reader.background)
    pull_loss.check(reader.channels)
    leaves = [leaf for group in reader.leaves for leaf in group]
    differentiate = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    block_pass = CollaborationPass(
        reader,
        combine,
        weigh_image,
        second_loss,
        pull_loss if pull else None,
        differentiate_second=second and differentiate,
        differentiate_pull=pull and differentiate,
    )
    with torch.autocast(reader.target.device.type, enabled=False):
        second_sum, *pull_sums = PassSums.apply(block_pass, *leaves)
    return CollaborationResult(second_sum, tuple(pull_sums), block_pass.counts)


@torch.no_grad()
def networks_correlation(reader: BlockReader, difference: str = 'ce') -> tuple[Tensor, Tensor]:
    """:func:`~mmdistill_ext.functional.error_correlation` of all units, block by block.

    Args:
        reader: The networks' logits and the labels.
        difference: ``'ce'`` or ``'bce'``.

    Returns:
        ``(N, N)`` and the number of valid units, both float64.
    """
    parts = [
        error_correlation(
            reader.read(place),
            reader.labels(place).target,
            difference=difference,
            ignore_index=reader.ignore_index,
            background=reader.background,
        )
        for place in reader.places()
    ]
    return add_up(matrix for matrix, _ in parts), add_up(count for _, count in parts)
