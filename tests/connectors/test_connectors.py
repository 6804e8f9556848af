import pytest
import torch
from torch import nn

from mmdistill_ext.connectors import MLP, Conv1x1, Norm, Resize
from mmdistill_ext.connectors.build import build_connector
from mmdistill_ext.registry import CONNECTORS


@pytest.mark.parametrize('name', sorted(CONNECTORS.module_dict))
def test_every_registered_connector_takes_maps_and_learns_or_not(name):
    module = CONNECTORS.build(dict(type=name, in_channels=4, out_channels=6)).eval()
    features = torch.randn(2, 4, 5, 7)
    found = module(features)
    assert found.ndim == 4
    assert len(found) == 2
    expected = 4 if name in ('Norm', 'Resize') else 6
    assert found.shape[1] == expected
    assert bool(list(module.parameters())) == (name != 'Resize')


def test_conv_is_one_linear_map():
    module, features = Conv1x1(3, 5), torch.randn(1, 3, 2, 2)
    expected = torch.einsum('oc,bchw->bohw', module.weight[:, :, 0, 0], features)
    torch.testing.assert_close(module(features), expected)
    assert Conv1x1(3, 5, bias=False).bias is None


def test_mlp_has_a_relu_between_two_maps():
    module, features = MLP(3, 5, hidden_channels=4), torch.randn(1, 3, 2, 2)
    expected = module[2](module[0](features).clamp(min=0))
    torch.testing.assert_close(module(features), expected)
    assert module[0].out_channels == 4
    assert MLP(3, 5)[0].out_channels == 5


def test_norm_is_a_layer_of_mmcv():
    assert isinstance(Norm(4).norm, nn.BatchNorm2d)
    assert isinstance(Norm(4, norm_cfg=dict(type='GN', num_groups=2)).norm, nn.GroupNorm)


def test_resize_changes_both_sides():
    assert Resize(scale_factor=0.5)(torch.zeros(1, 2, 6, 8)).shape == (1, 2, 3, 4)


def test_several_are_sized_one_after_the_other():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    cfg = [dict(type='Conv1x1'), dict(type='Norm'), dict(type='MLP', hidden_channels=2)]
    module = build_connector(cfg, 4, 6, 'key')
    assert torch.equal(torch.rand(1), expected)  # no random number of the training is drawn
    assert (module[0].in_channels, module[1].norm.num_features) == (4, 6)
    assert module.training
    assert module[1].norm.num_batches_tracked == 0
    assert module(torch.randn(2, 4, 3, 3)).shape == (2, 6, 3, 3)


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(type='Conv2x2'), '`losses.a.connector.type`.*Conv2x2'),
        (dict(type='Conv1x1', size=3), '`losses.a.connector.size`'),
        (dict(type='MLP', hidden_channels=0), '`losses.a.connector.hidden_channels`.*Found 0'),
        (dict(type='Resize', scale_factor=0), '`losses.a.connector.scale_factor`'),
        ('Conv1x1', "`losses.a.connector` should be a config.*Found 'Conv1x1'"),
        ([dict(type='Norm')], '`losses.a.connector` should give 6 channels.*Found 4'),
        (dict(type='Norm', norm_cfg=dict(type='GN', num_groups=3)), '`losses.a.connector`'),
        (
            [dict(type='Conv1x1'), dict(type='Conv1x1', in_channels=4)],
            '`losses.a.connector` should take 6 channels',
        ),
    ],
)
def test_mistakes_name_the_key(cfg, message):
    with pytest.raises(ValueError, match=message):
        build_connector(cfg, 4, 6, 'losses.a.connector')
