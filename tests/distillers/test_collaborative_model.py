import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage

from mmdistill_ext.distillers import CollaborativeDistiller
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.registry import MODELS
from tests import tiny_det
from tests.tiny_networks import (
    MIN_LOSS,
    WEIGHTED,
    WEIGHTS,
    distiller,
    for_all,
    gradients,
    seg_batch,
    segmenter,
    segmenters,
    varied,
)


def test_the_networks_are_initialised_as_they_are_alone():
    students = dict(a=segmenter(), b=segmenter(4))
    constant = dict(type='Constant', layer='Conv2d', val=0.125)
    students['b']['backbone']['init_cfg'] = [constant]
    model = CollaborativeDistiller(students, MIN_LOSS)
    model.init_weights()
    weight = model.students['a'].decode_head.conv_seg.weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert (model.students['b'].backbone.layer1[0].conv1.weight == 0.125).all()
    model = CollaborativeDistiller(dict(a=tiny_det.retina(), b=tiny_det.retina()), MIN_LOSS)
    model.init_weights()
    for network in model.students.values():
        torch.testing.assert_close(  # focal loss begins with scores of 1 %
            network.bbox_head.retina_cls.bias.sigmoid(), torch.full((9,), 0.01)
        )


@pytest.mark.parametrize('pretrained', ['a', 'b'])
def test_pretrained_weights_reach_their_network(pretrained, tmp_path):
    source = build_model(segmenter())
    torch.save(source.backbone.state_dict(), tmp_path / 'x.pth')
    students = dict(a=segmenter(), b=segmenter())
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    students[pretrained]['backbone']['init_cfg'] = init
    model = CollaborativeDistiller(students, MIN_LOSS)
    model.init_weights()
    for name, network in model.students.items():
        own = network.backbone.layer1[0].conv1.weight
        assert torch.equal(own, source.backbone.layer1[0].conv1.weight) == (name == pretrained)


def test_the_state_is_that_of_the_plain_networks_and_the_weights():
    model = distiller()
    expected = {'weights'}
    for name, cfg in segmenters().items():
        expected |= {f'students.{name}.{key}' for key in build_model(cfg).state_dict()}
    assert set(model.state_dict()) == expected
    assert model.weights.tolist() == [0.5, 0.5]
    assert distiller(segmenters(3)).weights.tolist() == pytest.approx([1 / 3] * 3)
    model.weights.copy_(torch.tensor([0.1, 0.9]))
    other = distiller(seed=9)
    other.load_state_dict(model.state_dict())
    assert other.weights.tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize('kind', ['segmenters', 'detectors'])
def test_a_copy_uses_its_own_heads(kind):
    students = segmenters() if kind == 'segmenters' else dict(a=tiny_det.atss(), b=tiny_det.fcos())
    model = distiller(students)
    copied = copy.deepcopy(model)
    average = ExponentialMovingAverage(model).module
    for other in (copied, average):
        mine = {id(module) for module in model.modules()}
        its = {id(module) for module in other.modules()}
        for holder in (other.joint, other.data_preprocessor):
            for found in modules_in(holder.__dict__):
                assert id(found) in its
                assert id(found) not in mine
    for parameter in model.parameters():
        parameter.data.fill_(float('nan'))
    if kind == 'segmenters':
        losses = copied(*for_all(model, *seg_batch(torch.float32)), mode='loss')
    else:
        losses = copied(**copied.data_preprocessor(tiny_det.raw(), True), mode='loss')
    assert copied.parse_losses(losses)[0].isfinite()
    gradients(copied, losses)
    assert all(p.grad is None for p in model.parameters())


def modules_in(value, depth=0):
    """Modules that an object which is no module holds."""
    if isinstance(value, torch.nn.Module):
        return [value]
    if depth > 5 or isinstance(value, (str, torch.Tensor)):
        return []
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple)):
        items = list(value)
    else:
        items = list(getattr(value, '__dict__', {}).values())
    return [module for item in items for module in modules_in(item, depth + 1)]


def test_it_is_built_from_a_config_and_trained_by_a_step():
    cfg = dict(type='mmdistill_ext.CollaborativeDistiller', students=segmenters(), second=MIN_LOSS)
    model = varied(MODELS.build(cfg)).train()
    data = dict(
        inputs=[torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8) for _ in range(2)],
        data_samples=seg_batch()[1],
    )
    before = copy.deepcopy(model.state_dict())
    from mmengine.optim import OptimWrapper

    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1))
    logged = model.train_step(data, wrapper)
    terms = [value for key, value in logged.items() if 'loss' in key and key != 'loss']
    assert len(terms) == 5
    assert logged['loss'].item() == pytest.approx(float(sum(terms)), rel=1e-5)
    for name in 'ab':
        key = f'students.{name}.decode_head.conv_seg.weight'
        assert not torch.equal(model.state_dict()[key], before[key])


def test_a_preprocessor_beside_the_model_is_for_networks_without():
    students = segmenters()
    own = students['a'].pop('data_preprocessor')
    students['b']['data_preprocessor']['size'] = (64, 64)
    model = distiller(students, data_preprocessor=own)
    sizes = [network.data_preprocessor.size for network in model.students.values()]
    assert sizes == [(32, 40), (64, 64)]
    assert model.data_preprocessor.leads == dict(a='a', b='b')


def test_the_tensor_mode_gives_every_networks_output():
    model = distiller().eval()
    inputs, _ = seg_batch(torch.float32)
    found = model(dict.fromkeys(model.names, inputs))
    for name, network in model.students.items():
        assert torch.equal(found[name], network(inputs, mode='tensor'))


@pytest.mark.parametrize('second', [WEIGHTED, dict(type='General')], ids=lambda x: x['type'])
def test_weights_of_the_validation_need_their_hook(second):
    model = distiller(second=second)
    arguments = for_all(model, *seg_batch(torch.float32))
    message = f'`second`={second["type"]} .*CollaborationHook.*`custom_hooks`. Found none'
    with pytest.raises(ValueError, match=message):
        model(*arguments, mode='loss')
    model.eval()(*arguments, mode='predict')
    model.has_hook = True
    model(*arguments, mode='loss')


def slide(cfg):
    cfg['test_cfg'] = dict(mode='slide', crop_size=(24, 24), stride=(16, 16))
    return cfg


@pytest.mark.parametrize('mode', ['whole', 'slide'])
@pytest.mark.parametrize('count', [2, 3])
def test_segmenters_predict_by_the_weighted_mean_of_their_logits(mode, count):
    students = segmenters(count)
    if mode == 'slide':
        students = {name: slide(cfg) for name, cfg in students.items()}
    model = distiller(students).eval()
    model.weights.copy_(WEIGHTS[:count])
    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8) for _ in range(2)]
    samples = seg_batch()[1]
    for sample in samples:
        sample.set_metainfo(dict(ori_shape=(16, 20), img_path='x.png'))
    data = dict(inputs=images, data_samples=samples)
    expected = {
        name: network.test_step(copy.deepcopy(data)) for name, network in model.students.items()
    }
    mixture, inputs = 0, model.data_preprocessor(copy.deepcopy(data), False)
    for network, weight in zip(model.students.values(), WEIGHTS, strict=False):
        metas = [sample.metainfo for sample in inputs['data_samples']['a']]
        with torch.no_grad():
            mixture = mixture + weight * network.inference(inputs['inputs']['a'], metas)
    mixture = F.interpolate(mixture, (16, 20), mode='bilinear')

    for step in (model.val_step, model.test_step):
        found = step(copy.deepcopy(data))
        assert len(found) == 2
        for place, sample in enumerate(found):
            torch.testing.assert_close(sample.seg_logits.data, mixture[place], atol=1e-5, rtol=1e-5)
            assert torch.equal(sample.pred_sem_seg.data[0], sample.seg_logits.data.argmax(0))
            assert torch.equal(sample.gt_sem_seg.data, samples[place].gt_sem_seg.data)
            assert list(sample.networks) == model.names
            for name, own in sample.networks.items():
                other = expected[name][place]
                assert torch.equal(own.seg_logits.data, other.seg_logits.data)
                assert torch.equal(own.pred_sem_seg.data, other.pred_sem_seg.data)
                assert torch.equal(own.gt_sem_seg.data, other.gt_sem_seg.data)
                assert own.metainfo == other.metainfo
                assert 'networks' not in own
    labels = {name: torch.cat([s.pred_sem_seg.data for s in own]) for name, own in expected.items()}
    assert not torch.equal(labels['a'], labels['b'])
