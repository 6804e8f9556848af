"""Pictures of where the teacher wins: PNG masks and overlays (SEL-4, SEL-8)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from mmdistill_ext.checkpoint import write_atomic

CONTRAST_VALUES = dict(teacher=255, student=0, void=128)
"""Grey value of the pixels that the teacher won, that the student won, and that have no label."""

CONTRAST_COLORS = dict(teacher=(230, 159, 0), student=(0, 114, 178), void=(0, 0, 0))
"""RGB of such pixels in overlays; colour-blind readers can tell them apart (Okabe and Ito)."""


def check_contrast_values(values: Mapping[str, int] | None, key: str = 'values') -> dict[str, int]:
    """Complete ``values`` with :data:`CONTRAST_VALUES` and check the result.

    Args:
        values: Any of ``teacher``, ``student`` and ``void`` -> grey value in ``[0, 255]``.
        key: The config key or option to name in errors.

    Raises:
        ValueError: An unknown name, a value outside ``[0, 255]``, or two equal values.
    """
    unknown = sorted(set(values or {}) - set(CONTRAST_VALUES))
    if unknown:
        raise ValueError(
            f'`{key}` should have no keys but {", ".join(CONTRAST_VALUES)}. Found {unknown}.'
        )
    full = {**CONTRAST_VALUES, **(values or {})}
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in full.values())
    if not whole or min(full.values()) < 0 or max(full.values()) > 255:
        raise ValueError(f'`{key}` should be integers in [0, 255]. Found {full}.')
    if len(set(full.values())) < len(full):
        raise ValueError(f'`{key}` should be three different values. Found {full}.')
    return full


def contrast_overlay(
    image: np.ndarray,
    mask: np.ndarray,
    values: Mapping[str, int] | None = None,
    alpha: float = 0.5,
    legend: bool = False,
) -> np.ndarray:
    """Colour an image by who won each pixel.

    Args:
        image: RGB, ``(H, W, 3)`` uint8.
        mask: Contrast mask, ``(H, W)`` uint8.
        values: The mask's values (see :data:`CONTRAST_VALUES`).
        alpha: Weight of the colour, in ``[0, 1]``.
        legend: Add a strip below that names the colours.

    Returns:
        RGB, ``(H, W, 3)`` uint8; with a legend some rows higher.

    Raises:
        ValueError: The sizes differ, or the mask has other values than ``values``.
    """
    values = check_contrast_values(values)
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[:2] != mask.shape:
        raise ValueError(
            '`image` should be (H, W, 3) and `mask` (H, W) of the same size. '
            f'Found {image.shape} and {mask.shape}.'
        )
    foreign = np.setdiff1d(mask, list(values.values()))
    if foreign.size:
        raise ValueError(f'`mask` should hold only {values}. Found {foreign.tolist()}.')
    palette = np.zeros((256, 3), np.float32)
    for name, value in values.items():
        palette[value] = CONTRAST_COLORS[name]
    blended = image.astype(np.float32) * (1 - alpha) + palette[mask] * alpha
    overlay = blended.round().astype(np.uint8)
    return np.concatenate([overlay, _legend(overlay.shape[1])]) if legend else overlay


def _legend(width: int) -> np.ndarray:
    height = max(12, width // 24)
    strip = np.full((height, width, 3), 255, np.uint8)
    for i, (name, color) in enumerate(CONTRAST_COLORS.items()):
        left = i * width // 3
        strip[2 : height - 2, left + 2 : left + height - 2] = color
        cv2.putText(
            strip,
            name if name == 'void' or width < 300 else f'{name} better',
            (left + height, height - max(3, height // 4)),
            cv2.FONT_HERSHEY_SIMPLEX,
            min(height / 36, width / 640),
            (0, 0, 0),
            max(1, height // 24),
            cv2.LINE_AA,
        )
    return strip


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write a grey ``(H, W)`` or RGB ``(H, W, 3)`` uint8 picture: the whole file or none.

    Raises:
        ValueError: ``path`` does not end in ``.png``.
    """
    if Path(path).suffix.lower() != '.png':
        raise ValueError(f"`path` should end in '.png'. Found '{path}'.")
    pixels = image if image.ndim == 2 else image[..., ::-1]
    _, encoded = cv2.imencode('.png', pixels)
    write_atomic(path, lambda file: file.write_bytes(encoded.tobytes()))
