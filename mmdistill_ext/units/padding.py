"""Padding of images in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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


def pad_semantic_labels(preprocessor: Any, samples: Sequence[Any]) -> None:
    """Pad semantic maps as in training, where mmdet's preprocessor is asked to (``pad_seg``).

    Outside of training it leaves them as they are, and losses on them cannot stack them.

    Args:
        preprocessor: The data preprocessor of a detector that has preprocessed the batch.
        samples: The batch's data samples, changed in place.
    """
    if getattr(preprocessor, 'pad_seg', False) and hasattr(preprocessor, 'pad_gt_sem_seg'):
        preprocessor.pad_gt_sem_seg(samples)
