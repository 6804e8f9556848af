"""Labels of heads without a hard assignment, whose objects have bags of weighted units."""

import torch
from torch import Tensor

SHARE = 0.5
"""A unit is positive from this share of the largest weight in the bag on."""


def assign_bags(
    weights: Tensor, classes: Tensor, boxes: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Positive units of the bags of one image: those with at least half the largest weight.

    A unit of several bags belongs to the object in whose bag its share is the largest.

    Args:
        weights: ``(N, G)``, >= 0, weights of ``N`` units in the bags of ``G`` objects.
        classes: ``(G,)``, classes of the objects.
        boxes: ``(G, 4)``, boxes of the objects.
        num_classes: Label of background.

    Returns:
        Labels ``(N,)`` and assigned boxes ``(N, 4)``; 0 for background.
    """
    labels = torch.full((len(weights),), num_classes, device=weights.device)
    if not len(classes):
        return labels, boxes.new_zeros(len(weights), 4)
    share, owner = (weights / weights.amax(0).clamp(min=1e-12)).max(1)
    positive = share >= SHARE
    labels = classes[owner].where(positive, labels)
    return labels, boxes[owner].where(positive[:, None], 0)
