"""Masks of a batch come back to the images, whatever the preprocessor made of them."""

import random

import cv2
import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.hooks.batch_geometry import BatchGeometry
from mmdistill_ext.hooks.contrast_mask_hook import on_images
from tests import tiny_det, tiny_seg

SIZES = ((60, 90), (64, 80), (40, 56))
RESIZE = dict(type='BatchSyncRandomResize', interval=1, size_divisor=32)


def detector(*augments, divisor=32):
    """mmdet's preprocessor, which keeps grey values."""
    return dict(
        **dict(type='DetDataPreprocessor', _scope_='mmdet', pad_size_divisor=divisor),
        batch_augments=[dict(augment, _scope_='mmdet') for augment in augments] or None,
    )


def segmenter(**padding):
    return dict(type='SegDataPreProcessor', _scope_='mmseg', **padding)


PREPROCESSORS = {
    'padded': detector(),
    'not padded': detector(divisor=1),
    'smaller': detector(dict(RESIZE, random_size_range=(32, 32))),
    'larger': detector(dict(RESIZE, random_size_range=(192, 192))),
    'padded twice': detector(dict(type='BatchFixedSizePad', size=(128, 160))),
    'smaller and padded': detector(dict(type='BatchResize', scale=(48, 72), pad_size_divisor=32)),
    'larger and padded': detector(dict(type='BatchResize', scale=(150, 300), pad_size_divisor=64)),
    'larger in two steps': detector(
        dict(RESIZE, random_size_range=(96, 96)), dict(type='BatchResize', scale=(150, 300))
    ),
    'segmenter': segmenter(size_divisor=32),
    'segmenter of one size': segmenter(size=(96, 100)),
}


def pictures():
    """White shapes on black, as a loader gives them."""
    images = []
    for place, (height, width) in enumerate(SIZES):
        image = np.zeros((height, width), np.uint8)
        cv2.ellipse(
            image, (width // 3, height // 2), (width // 4, height // 3), 20, 0, 360, 255, -1
        )
        image[-9:, -14:] = 255  # what is cut off where sizes are mixed up
        image[: 3 + place] = 255
        images.append(image)
    return images


@pytest.fixture
def iteration():
    hub = MessageHub.get_current_instance()
    before = hub.get_info('iter', 0)
    hub.update_info('iter', 0)
    yield
    hub.update_info('iter', before)


@pytest.mark.parametrize('name', PREPROCESSORS)
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_masks_lie_on_what_they_are_of(name, channels, iteration):
    """The mask of each image is that image, as the batch shows it."""
    preprocessor = build_model(PREPROCESSORS[name], 'data_preprocessor')
    is_segmenter = name.startswith('segmenter')
    for _ in range(2):  # the first batch keeps its size and draws that of the next
        images = pictures()
        if is_segmenter:
            samples = [tiny_seg.sample(torch.zeros(size, dtype=torch.int64)) for size in SIZES]
        else:
            samples = tiny_det.raw()['data_samples']
        inputs = [torch.from_numpy(image).repeat(channels, 1, 1) for image in images]
        data = dict(inputs=inputs, data_samples=samples)
        geometry = BatchGeometry(preprocessor)
        random.seed(0)
        batch = preprocessor(data, True)
        geometry.close()
        masks = (batch['inputs'][:, 0] > 127).numpy().astype(np.uint8) * 255
        shown = list(on_images(data, masks, geometry))
        assert len(shown) == 3
        for (image, _, mask), expected in zip(shown, images, strict=True):
            assert mask.shape == expected.shape
            assert np.array_equal(image, expected[..., None].repeat(3, 2))
            edges = cv2.dilate(expected, np.ones((7, 7))) != cv2.erode(expected, np.ones((7, 7)))
            assert not ((mask != expected) & ~edges).any()
            assert (mask != expected).mean() < (0.15 if 'smaller' in name else 0.06)
    size = masks.shape[1:]
    if name in ('smaller', 'larger', 'larger in two steps'):
        assert size != (64, 96)


def test_nothing_is_noted_after_the_step():
    preprocessor = build_model(detector(), 'data_preprocessor')
    geometry = BatchGeometry(preprocessor)
    assert len(preprocessor._forward_hooks) == 1
    geometry.close()
    assert not preprocessor._forward_hooks
    rows, columns = geometry.pixels(0, (2, 3), {}, (4, 4))
    assert rows.tolist() == [0, 1]
    assert columns.tolist() == [0, 1, 2]
