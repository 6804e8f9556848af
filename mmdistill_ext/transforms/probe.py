"""Tells transforms of an image's look from those of its geometry, before any image is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np

from mmdistill_ext.isolation import isolated_rng
from mmdistill_ext.transforms.unchanged import changed_keys

SEEDS = range(6)
SIZE = (72, 96)
PATCH = slice(18, 42), slice(22, 46)
"""Rows and columns that differ between the two probes; off the centre, so that no flip keeps it."""
MARGIN = 3
"""Pixels by which a patch may grow (blur) or shrink (median) where it is."""


def find_geometry(transform: Any) -> str | None:
    """What a transform changes apart from the look of an image; None if nothing.

    Each transform inside compositions, such as ``RandomApply``, is tried alone, and applied for
    sure. Two images are given to it that differ in one patch only: a transform of the look leaves
    the difference in its place. Labels that are all around, ``flip`` and the like have to stay too.
    Moves of an image without its labels by :data:`MARGIN` pixels or fewer are not seen.

    Args:
        transform: A callable from results to results, or a list of them.

    Returns:
        Words for an error. None also for a transform that cannot run on a probe, because it needs
        a file or keys of its own.
    """
    return next(filter(None, map(_geometry_of, _leaves(transform))), None)


def _geometry_of(transform: Callable) -> str | None:
    """What one transform changes, tried on the first kind of results that it can run on."""
    with suppress(Exception):  # it may keep images, as mmdet's CachedMosaic does
        transform = copy.deepcopy(transform)
    for dtype, labels in product((np.uint8, np.float32), probe_labels()):
        try:
            return next(filter(None, (_change(transform, dtype, labels, s) for s in SEEDS)), None)
        except Exception:
            continue
    return None


def _change(transform: Callable, dtype: type, labels: dict, seed: int) -> str | None:
    images = []
    for image in probe_images(dtype):
        given = dict(img=image, img_shape=SIZE, ori_shape=SIZE, img_path='', img_id=0)
        before = {**given, **labels}
        with isolated_rng(seed):
            after = transform(copy.deepcopy(before))
        if after is None:
            return 'the image itself: it is dropped'
        changed = changed_keys(before, after)
        if changed:
            return ', '.join(changed)
        images.append(np.asarray(after['img'], np.float64).reshape(*SIZE, -1))
    return 'where things are in `img`' if _moved(*images) else None


def _moved(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the difference of two images has left the patch on one side and not the other."""
    differs = np.abs(one - other).max(2) > 0
    grows = shrinks = False
    for axis, patch in enumerate(PATCH):
        places = np.flatnonzero(differs.any(1 - axis))
        if not len(places):  # all black, say
            return False
        first, last = places[0] - patch.start, places[-1] - (patch.stop - 1)
        grows |= first < -MARGIN or last > MARGIN
        shrinks |= first > MARGIN or last < -MARGIN
    return grows and shrinks


def probe_images(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Two images ``(H, W, 3)`` with the same histogram that differ in every pixel of a patch."""
    rng = np.random.default_rng(0)
    image = rng.integers(40, 216, (*SIZE, 3), np.uint8)
    height, width = (part.stop - part.start for part in PATCH)
    bits = rng.permutation(np.arange(height * width) % 2).reshape(height, width, 1)
    one, other = image.copy(), image.copy()
    one[PATCH], other[PATCH] = 60 + 130 * bits, 190 - 130 * bits
    return one.astype(dtype), other.astype(dtype)


def probe_labels() -> Iterator[dict]:
    """Labels of every kind, all around, as the pipelines of the frameworks have them."""
    pixels = dict(gt_seg_map=PlaceLabels()(*SIZE), seg_fields=['gt_seg_map'])
    boxes = np.array([[4, 5, 30, 40], [40, 8, 90, 60], [10, 30, 50, 70]], np.float32)
    objects = dict(gt_bboxes_labels=np.arange(3), gt_ignore_flags=np.zeros(3, bool))
    try:
        from mmdet.structures.bbox import HorizontalBoxes
    except ImportError:  # a user of mmseg
        pass
    else:
        yield dict(gt_bboxes=HorizontalBoxes(boxes), **objects, **pixels)
        yield dict(gt_bboxes=HorizontalBoxes(boxes), **objects)
    yield dict(gt_bboxes=boxes, **objects, **pixels)
    yield pixels


class PlaceLabels:
    """Label maps that no move of pixels leaves as they are, uint8 in ``[0, 250]``.

    The largest one so far is kept: maps of other sizes are cut from it.
    """

    def __init__(self) -> None:
        self._map = np.empty((0, 0), np.uint8)

    def __call__(self, height: int, width: int) -> np.ndarray:
        """A new map ``(H, W)``."""
        size = np.maximum(self._map.shape, (height, width))
        if self._map.shape != tuple(size):
            rows, columns = np.ogrid[: size[0], : size[1]]
            places = rows * 7 + columns * 13 + (rows * rows + columns * rows) // 11
            self._map = (places % 251).astype(np.uint8)
        return self._map[:height, :width].copy()


def _leaves(transform: Any) -> Iterator[Callable]:
    """The transforms inside lists and compositions that hand ``results`` on as they are."""
    if isinstance(transform, (list, tuple)):
        for part in transform:
            yield from _leaves(part)
    elif hasattr(transform, 'transforms') and not hasattr(transform, 'mapping'):
        yield from _leaves(transform.transforms)
    else:
        yield from _applied(transform)


def _applied(transform: Any) -> Iterator[Callable]:
    """Copies that are applied for sure, of a transform with probabilities; else the transform."""
    chances = {
        name: value
        for name, value in getattr(transform, '__dict__', {}).items()
        if 'prob' in name and isinstance(value, float) and 0 < value < 1
    }
    for name in chances:
        copied = copy.copy(transform)
        setattr(copied, name, 1.0)
        yield copied
    if not chances:
        yield transform
