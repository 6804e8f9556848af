"""What a detecting teacher gets right: the simple samples of FIT (FIT-3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Detections(NamedTuple):
    """What a teacher sees in one image."""

    boxes: Tensor  # (K, 4)
    classes: Tensor  # (K,)


def seen_units(
    confidence: Tensor,
    valid: Tensor,
    boxes_of: Callable[[int, Tensor, Tensor], Tensor],
    score: float,
) -> list[Detections]:
    """The units of each image that see an object; a unit predicts its likeliest class.

    Args:
        confidence: ``(B, N, C)``, the teacher's scores in [0, 1] of the object classes.
        valid: ``(B, N)`` bool; other units see nothing.
        boxes_of: Gives the teacher's boxes ``(K, 4)`` of units ``(image, (K,), classes (K,))``.
        score: Score above which the teacher sees an object, in [0, 1).
    """
    best, likeliest = confidence.max(-1)
    seen = (best > score) & valid
    detections = []
    for image in range(len(confidence)):
        units = seen[image].nonzero().squeeze(1)
        classes = likeliest[image, units]
        detections.append(Detections(boxes_of(image, units, classes), classes))
    return detections


def correct_images(
    detections: Sequence[Detections],
    truth: Sequence[tuple[Tensor, Tensor, Tensor]],
    iou: float,
) -> Tensor:
    """Images on which the teacher finds every object and nothing else (FIT-3).

    An object is found by a detection of its class that overlaps it. Every detection has to find an
    object, one that others have found too, or lie in an ignored box (a crowd); which units the
    student assigns to objects is of no account.

    Args:
        detections: What the teacher sees in each image. Duplicates do no harm.
        truth: Boxes ``(G, 4)``, classes ``(G,)`` and ignored boxes ``(I, 4)`` of each image.
        iou: IoU from which on a box overlaps an object, in (0, 1].

    Returns:
        ``(B,)`` bool.
    """
    right = []
    for (boxes, predicted), (objects, classes, ignored) in zip(detections, truth, strict=True):
        boxes = boxes.float()
        hits = bbox_overlaps(boxes, objects.float()) >= iou
        hits = hits & (predicted[:, None] == classes)
        inside = bbox_overlaps(boxes, ignored.float(), mode='iof') >= iou
        known = hits.any(1) | inside.any(1)
        right.append(hits.any(0).all() & known.all())
    return torch.stack(right) if right else torch.zeros(0, dtype=torch.bool)
