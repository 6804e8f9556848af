"""The first and the second GT loss of a detector are one function (FIT-1, FIT-6)."""

import copy

import pytest
import torch
from torch import nn

from mmdistill_ext.isolation import eval_mode
from mmdistill_ext.units.dense.pair import DensePair
from tests import tiny_det

BN = dict(type='BN', requires_grad=True)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def build(name):
    """A detector with statistics to be spoilt, in backbone and head."""
    cfg = tiny_det.FAMILIES[name]()
    cfg['backbone']['norm_eval'] = False
    if name != 'retina':
        cfg['bbox_head']['norm_cfg'] = BN
    model = tiny_det.build(cfg, 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.train()


def pair_up(model):
    return DensePair(model, model, 'bbox_head', 'bbox_head', 'losses.kd')


def measure(model, batch=None):
    return pair_up(model).gt_loss(model, copy.deepcopy(batch or tiny_det.raw()))


def plain(model, boxes=True):
    """The training loss, normalised with the kept statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()
    with torch.no_grad():
        losses = model(*tiny_det.batch(model, boxes), mode='loss')
    return model.parse_losses(losses)[0]


@pytest.mark.parametrize('boxes', [True, False])
@pytest.mark.parametrize('name', tiny_det.FAMILIES)
def test_equals_the_training_loss(name, boxes):
    model = build(name)
    expected = plain(model, boxes)
    model.eval()
    found = measure(model, tiny_det.raw(boxes))
    torch.testing.assert_close(found, torch.stack((3 * expected, torch.tensor(3.0))))
    assert not found.requires_grad
    assert found[0] > 0


@pytest.mark.parametrize('name', tiny_det.FAMILIES)
def test_no_trace_is_left(name):
    model = build(name)
    model.backbone.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    attributes = [set(vars(module)) for module in model.modules()]
    with eval_mode(model):
        measure(model)
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_trace_is_left_when_it_fails(monkeypatch):
    model = build('fcos_norm').eval()
    monkeypatch.setattr(model.bbox_head.loss_bbox, 'forward', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(model)
    assert not any(module.training for module in model.modules())
    assert 'loss_by_feat' not in vars(model.bbox_head)


def test_the_mode_of_layers_counts():
    """Batch statistics would give another loss."""
    model = build('atss')
    trained = measure(model)
    assert model.bbox_head.training
    assert not torch.allclose(measure(model.eval()), trained)


def test_a_batch_is_the_sum_of_its_images_weighed_by_their_number():
    model = build('gfl').eval()
    found = measure(model)
    assert found[1] == len(tiny_det.SIZES)
    single = {key: value[:1] for key, value in tiny_det.raw().items()}
    assert measure(model, single)[1] == 1


def test_under_autocast_the_sums_are_float32():
    model = build('gfl').eval()
    expected = measure(model)
    with torch.autocast('cpu', torch.bfloat16):
        found = measure(model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_labels_are_looked_for():
    pair, sample = pair_up(build('gfl')), tiny_det.raw()['data_samples'][0]
    assert pair.has_labels(dict(data_samples=sample))
    del sample.gt_instances
    assert not pair.has_labels(dict(data_samples=sample))
