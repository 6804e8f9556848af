import copy

import pytest
import torch
from torch import nn

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.tapped_forward import most_calls, tapped_forward
from tests import tiny_seg


@pytest.fixture
def segmenter():
    torch.manual_seed(0)
    cfg = tiny_seg.model(8)
    head = dict(copy.deepcopy(cfg['decode_head']), in_channels=16)
    cfg['auxiliary_head'] = [dict(head, in_index=1), dict(head, in_channels=32, in_index=2)]
    return build_model(cfg).eval()


def ran(model):
    """Names of what runs, in order."""
    done = []
    for name in ('backbone', 'decode_head', 'auxiliary_head.0', 'auxiliary_head.1'):
        inner = name if name == 'backbone' else f'{name}.conv_seg'  # heads are called by method
        module = model.get_submodule(inner)
        module.register_forward_pre_hook(lambda *_, name=name: done.append(name))
    return done


@pytest.mark.parametrize(
    ('wanted', 'expected'),
    [
        (dict(extract_feat=1), ['backbone']),
        (dict(decode_head=1), ['backbone', 'decode_head']),
        ({'auxiliary_head.1': 1}, ['backbone', 'auxiliary_head.1']),
        ({'auxiliary_head.1.conv_seg': 1, 'backbone': 1}, ['backbone', 'auxiliary_head.1']),
        (
            {'auxiliary_head.0': 1, 'decode_head': 1},
            ['backbone', 'decode_head', 'auxiliary_head.0'],
        ),
        (dict(backbone=None), ['backbone', 'decode_head']),  # unknown: to the end
    ],
)
def test_nothing_runs_that_nobody_wants(segmenter, wanted, expected, batch):
    done = ran(segmenter)
    calls = tapped_forward(segmenter, *batch, wanted)
    assert done == expected
    assert {path: len(found) for path, found in calls.items()} == dict.fromkeys(wanted, 1)


def test_outputs_are_the_models_own(segmenter, batch):
    calls = tapped_forward(segmenter, *batch, {'decode_head': 1, 'auxiliary_head.0': 1})
    with torch.no_grad():
        features = segmenter.extract_feat(batch[0])
        assert torch.equal(calls['decode_head'][0].output, segmenter.decode_head(features))
        expected = segmenter.auxiliary_head[0](features)
    assert torch.equal(calls['auxiliary_head.0'][0].output, expected)
    assert not calls['decode_head'][0].output.requires_grad


def test_any_module_that_takes_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    inputs = torch.randn(2, 3, 4, 4)
    calls = tapped_forward(model, inputs, None, {'0': 1, 'forward': None})
    assert torch.equal(calls['0'][0].args[0], inputs)
    assert calls['forward'][0].output.shape == (2, 5, 4, 4)


def test_several_want_the_most_calls_of_each():
    assert most_calls([dict(a=1, b=2), dict(a=3), dict(b=None), dict(b=1, c=1)]) == dict(
        a=3, b=None, c=1
    )
