"""Pictures of boxes and instance masks: several sets of them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import cv2
import numpy as np
from mmengine.fileio import get
from mmengine.structures import InstanceData

if TYPE_CHECKING:  # users of segmentation have no mmdet
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer

GAP = 4
"""Pixels between two panels."""


def read_image(sample: DetDataSample, backend_args: dict | None = None) -> np.ndarray:
    """The original image of a data sample, ``(H, W, 3)`` uint8 RGB.

    Raises:
        ValueError: The sample does not say where its image is.
    """
    import mmcv

    check_path(sample)
    content = get(sample.img_path, backend_args=backend_args)
    return mmcv.imfrombytes(content, channel_order='rgb')


def check_path(sample: DetDataSample) -> None:
    """Refuse a data sample that does not say where its image is."""
    if 'img_path' not in sample:
        raise ValueError(
            "`val_dataloader.dataset.pipeline` should pack 'img_path' (`meta_keys` of "
            f'PackDetInputs) for `BoxComparisonHook`. Found {sorted(sample.metainfo_keys())}.'
        )


def compare_boxes(
    visualizer: DetLocalVisualizer,
    image: np.ndarray,
    panels: Mapping[str, InstanceData],
    score_thr: float = 0.3,
) -> np.ndarray:
    """Draw several sets of instances on one image, in panels from left to right.

    Args:
        visualizer: One that has no backends; its ``dataset_meta`` names the classes.
        image: RGB, ``(H, W, 3)`` uint8.
        panels: Caption -> instances, with ``scores`` if they are predictions.
        score_thr: Predictions with a score above it are drawn.

    Returns:
        RGB, ``(C + H, N * W + (N - 1) * GAP, 3)`` uint8: N panels under captions of C rows.
    """
    from mmdet.structures import DetDataSample

    columns = []
    for caption, instances in panels.items():
        field = 'pred_instances' if 'scores' in instances else 'gt_instances'
        visualizer.add_datasample(
            caption,
            image,
            DetDataSample(**{field: instances}),
            draw_gt=field == 'gt_instances',
            draw_pred=field == 'pred_instances',
            pred_score_thr=score_thr,
        )
        strip = _caption(caption, *image.shape[:2])
        panel = np.concatenate([strip, visualizer.get_image()])
        columns += [panel, np.full((len(panel), GAP, 3), 255, np.uint8)]
    return np.concatenate(columns[:-1], axis=1)


def _caption(text: str, image_height: int, width: int) -> np.ndarray:
    """A white strip with a name that fits into it."""
    height = max(16, image_height // 20)
    (full_width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 1, 1)
    strip = np.full((height, width, 3), 255, np.uint8)
    cv2.putText(
        strip,
        text,
        (2, height - height // 3),
        cv2.FONT_HERSHEY_SIMPLEX,
        min(height / 36, (width - 4) / full_width),
        (0, 0, 0),
        max(1, height // 24),
        cv2.LINE_AA,
    )
    return strip
