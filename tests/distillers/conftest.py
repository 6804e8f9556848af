"""What distillers of segmenters train with."""

import pytest
import torch
from mmengine.logging import MessageHub

from tests import tiny_seg


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Return the config of a teacher with its file of weights, a wider segmenter."""
    path = tiny_seg.save_weights(tmp_path_factory.mktemp('t') / 't.pth', tiny_seg.model(16), seed=1)
    return dict(model=tiny_seg.model(16), checkpoint=path)


@pytest.fixture
def batch():
    """Return two images and their labels, the first rows of which are ignored."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 32, 40))
    labels[:, :4] = 255
    return torch.randn(2, 3, 32, 40), tiny_seg.samples(labels)


@pytest.fixture
def iteration():
    """Return a function that says which iteration it is; the former one comes back."""
    hub = MessageHub.get_current_instance()
    before = hub.get_info('iter', 0)
    yield lambda value: hub.update_info('iter', value)
    hub.update_info('iter', before)
