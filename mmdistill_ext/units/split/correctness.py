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
    """Units whose class and box the teacher has right (FIT-3).

    A unit with an object is right when the assigned class is the likeliest and the box overlaps the
    assigned box. A background unit is right when background is the likeliest or, among independent
    classes, when no class is above ``score``.

    Args:
        confidence: ``(B, N, C)`` or with background ``(B, N, C + 1)``, the teacher's scores in
            [0, 1].
        labels: ``(B, N)``, ``C`` for background.
        num_classes: ``C``.
        index: Image and unit of each of the ``P`` positive units.
        ious: ``(P,)``, IoU of the teacher's boxes with the assigned boxes.
        iou: Overlap in (0, 1] from which on a box is right.
        score: Score above which the teacher sees an object, in [0, 1).

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
    """Images on which the teacher finds every object and nothing else (FIT-3).

    A unit predicts its likeliest class. An object is found when a unit predicts its class with a
    score above ``score`` and a box that overlaps the object. A unit is spurious when its score is
    above ``score``, it is background in the student's assignment, its box overlaps no object of
    the predicted class and it lies in no ignored box (a crowd). Duplicates are not suppressed
    before.

    Args:
        confidence: ``(B, N, C)``, the teacher's scores in [0, 1] of the object classes.
        labels: ``(B, N)``, ``C`` for background.
        valid: ``(B, N)`` bool; other units neither find an object nor are spurious.
        boxes_of: Gives the teacher's boxes ``(K, 4)`` of units ``(image, (K,), classes (K,))``.
        truth: Boxes ``(G, 4)``, classes ``(G,)`` and ignored boxes ``(I, 4)`` of each image.
        iou: IoU from which on a box overlaps an object, in (0, 1].
        score: Score above which the teacher sees an object, in [0, 1).

    Returns:
        ``(B,)`` bool.
    """
    best, likeliest = confidence.max(-1)
    seen = (best > score) & valid
    right = []
    for image, (objects, classes, ignored) in enumerate(truth):
        units = seen[image].nonzero().squeeze(1)
        predicted = likeliest[image, units]
        boxes = boxes_of(image, units, predicted).float()
        overlaps = bbox_overlaps(boxes, objects.float())
        hits = (overlaps >= iou) & (predicted[:, None] == classes)
        inside = bbox_overlaps(boxes, ignored.float(), mode='iof') >= iou
        known = hits.any(1) | inside.any(1)
        spurious = (labels[image, units] == confidence.shape[-1]) & ~known
        right.append(hits.any(0).all() & ~spurious.any())
    return torch.stack(right) if right else seen.any(1)
