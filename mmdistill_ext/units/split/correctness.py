"""What a detecting teacher gets right: the simple samples of FIT (FIT-3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor


def correct_units(
    confidence: Tensor,
    labels: Tensor,
    num_classes: int,
    index: tuple[Tensor, ...],
    ious: Tensor,
    iou: float,
    score: float,
) -> Tensor:
    """Units whose class and box the teacher has right.

    A unit of an object is right when its class is the likeliest and the box overlaps the assigned
    one; background when that is the likeliest or, among independent classes, when none is above
    ``score``.

    Args:
        confidence: ``(B, N, C)`` or with background ``(B, N, C + 1)``, the teacher's scores in
            [0, 1].
        labels: ``(B, N)``, ``C`` for background.
        num_classes: ``C``.
        index: Image and unit of each of the ``P`` positive units.
        ious: ``(P,)``, IoU of the teacher's boxes with the assigned ones.
        iou: Overlap in (0, 1] from which on a box is right.
        score: In [0, 1).

    Returns:
        ``(B, N)`` bool.
    """
    best, likeliest = confidence.max(-1)
    right = (likeliest == labels) & ~best.isnan()
    if confidence.shape[-1] == num_classes:
        right = torch.where(labels == num_classes, best <= score, right)
    return right.index_put(index, right[index] & (ious >= iou))


def correct_images(
    confidence: Tensor,
    labels: Tensor,
    valid: Tensor,
    boxes_of: Callable[[int, Tensor, Tensor], Tensor],
    truth: Sequence[tuple[Tensor, Tensor, Tensor]],
    iou: float,
    score: float,
) -> Tensor:
    """Images on which the teacher finds every object and nothing else.

    A unit stands for its likeliest class. An object is found by a unit of its class above ``score``
    with a box that overlaps it. A unit is spurious when it is above ``score``, is no part of an
    object in the student's assignment, overlaps no object of its class and lies in no ignored box
    (a crowd). Both look at the units
    before any suppression of duplicates.

    Args:
        confidence: ``(B, N, C)``, the teacher's scores in [0, 1] of the object classes.
        labels: ``(B, N)``, ``C`` for background.
        valid: ``(B, N)`` bool; other units are neither found nor spurious.
        boxes_of: Gives the teacher's boxes ``(K, 4)`` of units ``(image, (K,), classes (K,))``.
        truth: Boxes ``(G, 4)``, classes ``(G,)`` and ignored boxes ``(I, 4)`` of each image.
        iou: Overlap in (0, 1].
        score: In [0, 1).

    Returns:
        ``(B,)`` bool.
    """
    best, likeliest = confidence.max(-1)
    seen = (best > score) & valid
    right = []
    for image, (objects, classes, ignored) in enumerate(truth):
        units = seen[image].nonzero().squeeze(1)
        kinds = likeliest[image, units]
        boxes = boxes_of(image, units, kinds).float()
        overlaps = bbox_overlaps(boxes, objects.float())
        hits = (overlaps >= iou) & (kinds[:, None] == classes)
        inside = bbox_overlaps(boxes, ignored.float(), mode='iof') >= iou
        known = hits.any(1) | inside.any(1)
        spurious = (labels[image, units] == confidence.shape[-1]) & ~known
        right.append(hits.any(0).all() & ~spurious.any())
    return torch.stack(right) if right else seen.any(1)
