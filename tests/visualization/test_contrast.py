"""Pictures of contrast masks."""

import cv2
import numpy as np
import pytest

from mmdistill_ext.visualization.contrast import (
    CONTRAST_COLORS,
    check_contrast_values,
    contrast_overlay,
    write_png,
)

MASK = np.array([[255, 0, 128], [0, 0, 255]], np.uint8)


def test_overlay_mixes_image_and_colour():
    image = np.full((2, 3, 3), 100, np.uint8)
    overlay = contrast_overlay(image, MASK, alpha=0.25)
    expected = [0.75 * 100 + 0.25 * channel for channel in CONTRAST_COLORS['teacher']]
    assert overlay[0, 0].tolist() == np.round(expected).tolist()
    assert overlay[0, 2].tolist() == [75, 75, 75]
    assert np.array_equal(contrast_overlay(image, MASK, alpha=0.0), image)


def test_overlay_with_other_values():
    values = dict(teacher=1, student=2, void=3)
    mask = np.select([MASK == 255, MASK == 0], [1, 2], 3).astype(np.uint8)
    image = np.zeros((2, 3, 3), np.uint8)
    assert np.array_equal(contrast_overlay(image, mask, values), contrast_overlay(image, MASK))


def test_legend_adds_rows_below_and_changes_nothing_above():
    image, mask = np.zeros((200, 300, 3), np.uint8), np.zeros((200, 300), np.uint8)
    plain, full = contrast_overlay(image, mask), contrast_overlay(image, mask, legend=True)
    assert np.array_equal(full[:200], plain)
    colors = {tuple(pixel) for pixel in full[200:].reshape(-1, 3).tolist()}
    assert set(CONTRAST_COLORS.values()) <= colors


@pytest.mark.parametrize(
    ('image', 'mask', 'message'),
    [
        (np.zeros((2, 4, 3), np.uint8), MASK, r'\(2, 4, 3\) and \(2, 3\)'),
        (np.zeros((2, 3, 1), np.uint8), MASK, 'same size'),
        (np.zeros((2, 3, 3), np.uint8), MASK + np.uint8(7), r'Found \[6, 7, 135\]'),
    ],
)
def test_overlay_refuses(image: np.ndarray, mask: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        contrast_overlay(image, mask)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (dict(teacher=256), 'integers in'),
        (dict(student=-1), 'integers in'),
        (dict(void=0.5), 'integers in'),
        (dict(teacher=0), 'three different values'),
        (dict(pupil=1), r"Found \['pupil'\]"),
    ],
)
def test_values_are_checked(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        check_contrast_values(values)


def test_values_are_completed():
    assert check_contrast_values(dict(void=7)) == dict(teacher=255, student=0, void=7)


def test_png_is_exact_and_alone(tmp_path):
    write_png(tmp_path / 'new/mask.png', MASK)
    assert np.array_equal(cv2.imread(str(tmp_path / 'new/mask.png'), cv2.IMREAD_UNCHANGED), MASK)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['mask.png']


def test_png_keeps_rgb_order(tmp_path):
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    write_png(tmp_path / 'red.png', red)
    assert cv2.imread(str(tmp_path / 'red.png'))[0, 0].tolist() == [0, 0, 255]


def test_png_needs_its_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"end in '\.png'"):
        write_png(tmp_path / 'mask.jpg', MASK)
