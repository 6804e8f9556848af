"""Padding of images in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def padding_of(meta: Mapping, size: Sequence[int]) -> tuple[int, int, int, int]:
    """Padding of an image in a batch: left, right, top, bottom, in pixels.

    mmseg records the padding in the meta information; mmdet pads on the right and at the bottom.

    Args:
        meta: Meta information of the data sample.
        size: Height and width of the batch.
    """
    if 'padding_size' in meta or 'img_shape' not in meta:
        return meta.get('padding_size', (0, 0, 0, 0))
    height, width = meta['img_shape'][:2]
    return 0, size[1] - width, 0, size[0] - height
