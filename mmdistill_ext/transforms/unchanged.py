"""What transforms of an image's look leave as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

VALUES = (
    'flip',
    'flip_direction',
    'scale',
    'scale_factor',
    'keep_ratio',
    'homography_matrix',
    'proposals',
)
"""What tells of the geometry: it may neither change nor be added."""

LABELS = (
    'gt_seg_map',
    'gt_edge_map',
    'gt_depth_map',
    'gt_bboxes',
    'gt_bboxes_labels',
    'gt_masks',
    'gt_keypoints',
    'gt_ignore_flags',
)
"""Labels, the same in new objects or not (as Albu's are)."""


def snapshot(results: Mapping) -> dict[str, Any]:
    """Copies of the labels of ``results``, and the size of its image, to compare with."""
    kept = {key: results[key] for key in VALUES if key in results}
    kept |= {key: as_array(results[key]).copy() for key in LABELS if results.get(key) is not None}
    kept['img'] = np.empty((*results['img'].shape[:2], 0))
    if 'img_shape' in results:
        kept['img_shape'] = results['img_shape']
    return kept


def changed_keys(before: Mapping, after: Mapping) -> list[str]:
    """Keys by which ``after`` has another geometry or other labels than ``before``.

    Args:
        before: Results, or their :func:`snapshot`.
        after: Results that transforms made of them.
    """
    changed = [key for key in (*VALUES, *LABELS) if not _same(before.get(key), after.get(key))]
    for key, shapes in dict(
        img_shape=(before.get('img_shape'), after.get('img_shape')),
        img=(before['img'].shape, after['img'].shape),
    ).items():
        if any(shapes) and tuple(shapes[0] or ())[:2] != tuple(shapes[1] or ())[:2]:
            changed.append('the size of `img`' if key == 'img' else key)
    return changed


def as_array(values: Any) -> np.ndarray:
    """Masks, boxes or labels as numbers."""
    masks = getattr(values, 'masks', None)
    if isinstance(masks, list):  # of polygons
        return np.concatenate([np.empty(0), *(xy for polygons in masks for xy in polygons)])
    if masks is not None:
        return masks
    return values.numpy() if hasattr(values, 'numpy') else np.asarray(values)


def _same(before: Any, after: Any) -> bool:
    """Whether both are missing, or the same numbers to a hundredth of a pixel."""
    if before is None or after is None:
        return before is after
    one, other = as_array(before), as_array(after)
    if one.shape != other.shape:
        return False
    if one.dtype.kind == 'f' or other.dtype.kind == 'f':
        return np.allclose(one, other, rtol=0, atol=0.01)
    return np.array_equal(one, other)
