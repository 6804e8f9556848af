import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub
from mmengine.model import ExponentialMovingAverage
from mmengine.structures import InstanceData

from mmdistill_ext.distillers import CollaborativeDistiller
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.functional import (
    error_correlation,
    linear,
    min_logit,
    min_loss,
    mix,
    unit_difference,
    unit_distillation,
)
from mmdistill_ext.registry import MODELS
from mmdistill_ext.taps import Taps
from tests import tiny_det, tiny_seg

MIN_LOSS = dict(type='MinLoss')
WEIGHTED = dict(type='ValidationWeighted', metric='mIoU', temperature=1.0)


@pytest.fixture
def iteration():
    hub = MessageHub.get_current_instance()
    before = hub.get_info('iter', 0)
    yield lambda value: hub.update_info('iter', value)
    hub.update_info('iter', before)


def segmenter(channels=8, aligned=False, strides=(1, 2, 1, 1), **head):
    cfg = tiny_seg.model(channels)
    cfg['backbone']['strides'] = strides
    cfg['decode_head'].update(align_corners=aligned, **head)
    return cfg


def segmenters(count=2):
    """Of different widths, strides and ways to upsample."""
    made = dict(
        a=segmenter(),
        b=segmenter(4, True, (1, 2, 2, 2)),
        c=segmenter(6, False, (1, 1, 1, 1)),
    )
    return dict(list(made.items())[:count])


def varied(model):
    """Weights that give predictions as different as after a while of training."""
    for network in model.students.values():
        if hasattr(network, 'decode_head'):
            torch.nn.init.normal_(network.decode_head.conv_seg.weight, 0, 0.5)
        else:
            tiny_det.vary(network)
            for name, parameter in network.bbox_head.named_parameters():
                if 'cls' in name and name.endswith('bias'):
                    parameter.data.zero_()  # scores of about a half, not of 1 %
    return model


def distiller(students=None, seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault('second', MIN_LOSS)
    model = CollaborativeDistiller(students or segmenters(), **options)
    model.init_weights()
    return varied(model).train()


def alone(model):
    """The networks as they are, each a model of its own."""
    return copy.deepcopy(dict(model.students.items()))


def seg_batch(dtype=torch.float64):
    torch.manual_seed(1)
    labels = torch.randint(0, 3, (2, 32, 40))
    labels[:, :4] = 255
    return torch.randn(2, 3, 32, 40, dtype=dtype), tiny_seg.samples(labels)


def for_all(model, inputs, samples):
    """The same for every network."""
    return dict.fromkeys(model.names, inputs), dict.fromkeys(model.names, samples)


def gradients(model, losses):
    """Of a whole step, by the parameter's name."""
    total, _ = model.parse_losses(losses)
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


SECONDS = {
    'MinLoss': (MIN_LOSS, lambda x, y: min_loss(x, y)),
    'MinLoss of images': (dict(MIN_LOSS, per='image'), lambda x, y: min_loss(x, y, per='image')),
    'Linear': (dict(type='Linear', iterations=8), lambda x, y: linear(x, y, iterations=8)),
    'Linear of images': (
        dict(type='Linear', per='image'),
        lambda x, y: linear(x, y, per='image', iterations=10),
    ),
    'MinLogit': (dict(type='MinLogit'), lambda x, y: min_logit(x, y)),
    'MinLogit as is': (dict(type='MinLogit', shift=False), lambda x, y: min_logit(x)),
    'ValidationWeighted': (WEIGHTED, lambda x, y: mix(x, WEIGHTS[: len(x)])),
    'General': (dict(type='General'), lambda x, y: mix(x, WEIGHTS[: len(x)])),
}
WEIGHTS = torch.tensor([0.9, 0.3, -0.2])


# -- segmentation: losses


@pytest.mark.parametrize('count', [2, 3])
@pytest.mark.parametrize('name', SECONDS)
def test_losses_of_segmenters_equal_those_of_the_networks_run_alone(name, count):
    second, combine = SECONDS[name]
    model = distiller(
        segmenters(count), second=second, second_weight=0.5, kl=dict(weight=0.3, temperature=2.0)
    ).double()
    model.watched = True
    model.weights.copy_(WEIGHTS[:count])
    networks = alone(model)
    inputs, samples = seg_batch()
    losses = model(*for_all(model, inputs, samples), mode='loss')

    expected, logits = {}, []
    target = torch.cat([sample.gt_sem_seg.data for sample in samples])
    for key, network in networks.items():
        with Taps(network, dict(logits='decode_head')) as taps:
            own = network(inputs, samples, mode='loss')
        expected |= {
            f'{key}/loss_ce': own['decode.loss_ce'],
            f'{key}/acc_seg': own['decode.acc_seg'],
        }
        logits.append(
            F.interpolate(
                taps['logits'].output,
                (32, 40),
                mode='bilinear',
                align_corners=network.decode_head.align_corners,
            )
        )
    logits = torch.stack(logits)
    valid = target != 255
    mixture = combine(logits, target)
    expected['ensemble/loss'] = 0.5 * unit_difference(mixture, target)[valid].mean()
    for key, own in zip(networks, logits, strict=True):
        pull = unit_distillation(own, mixture.detach(), 'kl', 2.0)[valid].mean()
        expected[f'{key}/loss_kl'] = 0.3 * pull
    assert losses.keys() == expected.keys()
    for key, value in losses.items():
        torch.testing.assert_close(value, expected[key], msg=key)

    total, logged = model.parse_losses(losses)
    terms = [value for key, value in expected.items() if 'loss' in key]
    torch.testing.assert_close(total, sum(terms))
    assert logged.keys() == {'loss', *expected}
    found = gradients(model, losses)
    sum(terms).backward()
    for key, network in networks.items():
        for parameter, value in network.named_parameters():
            torch.testing.assert_close(found[f'students.{key}.{parameter}'], value.grad)
        for buffer, value in network.named_buffers():
            torch.testing.assert_close(model.students[key].get_buffer(buffer), value)


def binary(**change):
    cfg = segmenter(num_classes=2, out_channels=1, threshold=0.3)
    cfg['decode_head']['loss_decode'] = dict(type='CrossEntropyLoss', use_sigmoid=True)
    cfg['decode_head'].update(change)
    return cfg


def test_binary_segmenters():
    second = dict(type='MinLogit', shift=False)
    model = distiller(dict(a=binary(), b=binary(align_corners=True)), second=second).double()
    networks = alone(model)
    inputs, samples = seg_batch()
    for sample in samples:
        sample.gt_sem_seg.data[sample.gt_sem_seg.data == 2] = 0
    losses = model(*for_all(model, inputs, samples), mode='loss')
    target = torch.cat([sample.gt_sem_seg.data for sample in samples])
    logits = torch.stack(
        [
            F.interpolate(
                network(inputs, mode='tensor'),
                (32, 40),
                mode='bilinear',
                align_corners=network.decode_head.align_corners,
            )[:, 0]
            for network in networks.values()
        ]
    )
    valid = target != 255
    loss = F.binary_cross_entropy_with_logits(logits.amin(0)[valid], target[valid].double())
    torch.testing.assert_close(losses['ensemble/loss'], loss)
    for own, key in zip(logits, 'ab', strict=True):
        p, q = (x[valid].sigmoid() for x in (logits.amin(0), own))
        pull = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        torch.testing.assert_close(losses[f'{key}/loss_kl'], pull.mean())


@pytest.mark.parametrize('kind', ['segmenters', 'detectors'])
def test_without_weights_the_networks_train_alone_bit_by_bit(kind):
    students = segmenters() if kind == 'segmenters' else dict(a=tiny_det.atss(), b=tiny_det.gfl())
    model = distiller(students, second_weight=0.0, kl=dict(weight=0.0))
    networks = alone(model)
    if kind == 'segmenters':
        arguments = for_all(model, *seg_batch(torch.float32))
    else:
        data = model.data_preprocessor(tiny_det.raw(), True)
        arguments = data['inputs'], data['data_samples']
    losses = model(*arguments, mode='loss')
    assert not any('kl' in key or key.startswith('ensemble') for key in losses)
    found = gradients(model, losses)
    for key, network in networks.items():
        own = network(arguments[0][key], arguments[1][key], mode='loss')
        assert {f'{key}/{name.removeprefix("decode.")}' for name in own} <= losses.keys()
        for name, gradient in gradients(network, own).items():
            other = found[f'students.{key}.{name}']
            assert (gradient is None) == (other is None), name
            assert gradient is None or torch.equal(gradient, other), name
        for name, value in network.named_buffers():
            assert torch.equal(model.students[key].get_buffer(name), value), name


def test_the_pull_follows_its_schedule(iteration):
    model = distiller(kl=dict(weight=2.0, begin=2, warmup=4, stop=7)).eval()
    arguments = for_all(model, *seg_batch(torch.float32))
    found = []
    for value in range(8):
        iteration(value)
        losses = model(*arguments, mode='loss')
        assert 'ensemble/loss' in losses
        assert ('a/loss_kl' in losses) == ('b/loss_kl' in losses)
        found.append(float(losses.get('a/loss_kl', 0)))
    assert found[:2] == [0, 0]
    assert found[7] == 0
    shares = [value / found[5] for value in found[2:7]]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_the_second_loss_alone_is_the_sources_claim():
    model = distiller(kl=dict(weight=0.0))
    losses = model(*for_all(model, *seg_batch(torch.float32)), mode='loss')
    assert {key for key in losses if 'loss' in key} == {'a/loss_ce', 'b/loss_ce', 'ensemble/loss'}
    (losses['ensemble/loss']).backward()
    for network in model.students.values():
        assert network.decode_head.conv_seg.weight.grad.any()
        assert network.backbone.stem[0].weight.grad.any()


def test_an_auxiliary_head_keeps_its_own_loss():
    cfg = segmenter()
    cfg['auxiliary_head'] = dict(cfg['decode_head'], in_channels=32, in_index=2)
    model = distiller(dict(a=cfg, b=segmenter()))
    losses = model(*for_all(model, *seg_batch(torch.float32)), mode='loss')
    assert {'a/loss_ce', 'a/aux.loss_ce', 'a/loss_kl', 'b/loss_ce', 'b/loss_kl'} <= losses.keys()


def test_without_a_label_the_networks_are_left_alone():
    model = distiller().eval()
    inputs, samples = seg_batch(torch.float32)
    for sample in samples:
        sample.gt_sem_seg.data.fill_(255)
    losses = model(*for_all(model, inputs, samples), mode='loss')
    for key in ('ensemble/loss', 'a/loss_kl', 'b/loss_kl'):
        assert losses[key].item() == 0
    joint = sum(losses[key] for key in ('ensemble/loss', 'a/loss_kl', 'b/loss_kl'))
    joint.backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_labels_outside_the_classes_are_refused_in_the_first_step():
    model = distiller(second_weight=1.0)
    inputs, samples = seg_batch(torch.float32)
    samples[1].gt_sem_seg.data[0, 9, 9] = 7
    arguments = for_all(model, inputs, samples)
    with pytest.raises(ValueError, match=r'Labels should be in \[0, 3\).*values 7'):
        model(*arguments, mode='loss')


def test_a_box_outside_the_classes_is_refused_in_the_first_step():
    model = distiller(detectors('atss gfl'))
    data = model.data_preprocessor(tiny_det.raw(), True)
    data['data_samples']['n0'][0].gt_instances.labels[0] = 9
    with pytest.raises(ValueError, match='Labels should be in.*values 9'):
        model(**data, mode='loss')


def test_one_step_under_autocast_gives_losses_in_fp32():
    model = distiller(second=dict(type='Linear'))
    arguments = for_all(model, *seg_batch(torch.float32))
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(*arguments, mode='loss')
    for key in ('ensemble/loss', 'a/loss_kl', 'b/loss_kl'):
        assert losses[key].dtype == torch.float32
        assert losses[key].isfinite()
    assert all(g.isfinite().all() for g in gradients(model, losses).values() if g is not None)


@pytest.mark.parametrize('keys', [('ensemble/loss',), ('a/loss_kl', 'b/loss_kl')])
def test_a_few_steps_down_a_term_lower_it(keys):
    model = distiller(second=dict(type='Linear'))
    inputs, samples = seg_batch(torch.float32)
    for sample in samples:  # something that can be learnt
        sample.gt_sem_seg.data[:, :, :20], sample.gt_sem_seg.data[:, :, 20:] = 0, 2
    arguments = for_all(model, inputs, samples)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    values = []
    for _ in range(12):
        losses = model(*arguments, mode='loss')
        total = sum(losses[key] for key in keys)
        values.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert values[-1] < 0.6 * values[0]


def test_nothing_is_kept_after_the_step():
    model = distiller()
    seen = []
    for network in model.students.values():
        forward = network.decode_head.forward

        def spy(inputs, forward=forward):
            output = forward(inputs)
            seen.append(weakref.ref(output))
            return output

        network.decode_head.forward = spy
    losses = model(*for_all(model, *seg_batch(torch.float32)), mode='loss')
    gradients(model, losses)
    del losses
    gc.collect()
    assert [x() for x in seen] == [None, None]  # and no second forward


# -- one network at a time


def dropping(students):
    for cfg in students.values():
        cfg['decode_head'].update(dropout_ratio=0.5)
    return students


@pytest.mark.parametrize('second', [MIN_LOSS, dict(type='Linear', per='image')])
def test_one_network_at_a_time_is_the_same_training(second):
    results = []
    for sequential in (False, True):
        model = distiller(dropping(segmenters(3)), second=second, sequential_backward=sequential)
        found = []
        for seed in (3, 4):
            torch.manual_seed(seed)
            losses = model(*for_all(model, *seg_batch(torch.float32)), mode='loss')
            found.append({key: value.detach() for key, value in losses.items()})
            found.append(gradients(model, losses))
            found.append({key: value.clone() for key, value in model.named_buffers()})
            found.append(dict(random=torch.rand(3)))  # nor do the random numbers that follow
        results.append(found)
    for plain, sequential in zip(*results, strict=True):
        assert plain.keys() == sequential.keys()
        for key, value in plain.items():
            assert torch.equal(value, sequential[key]), key
    counts = [v for k, v in results[1][-2].items() if k.endswith('num_batches_tracked')]
    assert counts
    assert {int(value) for value in counts} == {2}


def test_one_detector_at_a_time_is_the_same_training():
    results = []
    for sequential in (False, True):
        students = dict(a=tiny_det.gfl(), b=tiny_det.fcos())
        for cfg in students.values():
            cfg['backbone'].update(norm_eval=False)
        model = distiller(students, sequential_backward=sequential)
        data = model.data_preprocessor(tiny_det.raw(), True)
        losses = model(**data, mode='loss')
        found = gradients(model, losses)
        results.append({**found, **dict(model.named_buffers()), **model.parse_losses(losses)[1]})
    plain, sequential = results
    for key, value in plain.items():
        if torch.is_tensor(value):
            assert torch.equal(value, sequential[key]), key
        else:
            assert value == sequential[key], key


@pytest.mark.parametrize('sequential', [False, True])
def test_activations_are_in_memory_for_one_network_at_a_time(sequential):
    model = distiller(sequential_backward=sequential)
    seen = []
    for network in model.students.values():
        network.backbone.layer1[0].bn1.register_forward_hook(
            lambda module, args, output: seen.append(weakref.ref(args[0]))
        )
    losses = model(*for_all(model, *seg_batch(torch.float32)), mode='loss')
    gc.collect()
    assert [x() is None for x in seen] == [sequential] * 2
    gradients(model, losses)
    assert len(seen) == 2 + 2 * sequential


# -- the model


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
    cfg = dict(type='CollaborativeDistiller', students=segmenters(), second=MIN_LOSS)
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
    model.watched = True
    model(*arguments, mode='loss')


# -- segmentation: predictions


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


# -- detection


def detectors(names):
    made = {}
    for place, name in enumerate(names.split()):
        made[f'n{place}'] = cfg = tiny_det.FAMILIES[name](8 if place else 12)
        cfg['test_cfg'].update(max_per_img=50)
    return made


def flat(maps, channels):
    """``(B, A * C, H, W)`` of each level -> ``(B, C, units)`` as mmdet counts them."""
    return torch.cat(
        [m.permute(0, 2, 3, 1).reshape(len(m), -1, channels) for m in maps], 1
    ).transpose(1, 2)


def labels_of(name, targets):
    """Labels of the units, -1 where the network learns nothing, ``(B, units)``."""
    if name.startswith('fcos'):
        return torch.cat([labels.view(3, -1) for labels in targets[0]], 1)
    first = 0 if name == 'retina' else 1
    labels, weights = (torch.cat(targets[place], 1) for place in (first, first + 1))
    return labels.where(weights > 0, -1)


@pytest.mark.parametrize('boxes', [True, False])
@pytest.mark.parametrize(
    'names',
    ['retina retina', 'atss gfl', 'fcos atss', 'fcos_norm gfl', 'gfl fcos atss', 'rtmdet fcos'],
)
def test_losses_of_detectors_equal_those_of_the_networks_run_alone(names, boxes):
    model = distiller(detectors(names), second_weight=0.5, kl=dict(weight=0.3, temperature=2.0))
    networks = alone(model)
    data = model.data_preprocessor(tiny_det.raw(boxes), True)
    losses = model(**copy.deepcopy(data), mode='loss')
    logits, expected = [], {}
    for place, (key, network) in enumerate(networks.items()):
        paths = dict(scores='bbox_head.loss_by_feat', targets='bbox_head.get_targets')
        with Taps(network, paths) as taps:
            own = network(data['inputs'][key], data['data_samples'][key], mode='loss')
        expected |= {f'{key}/{name}': value for name, value in own.items()}
        logits.append(flat(taps['scores'].args[0], 3))
        if place == 0:
            target = labels_of(names.split()[0], taps['targets'].output)
    logits = torch.stack(logits)
    options = dict(difference='bce', ignore_index=-1, background=True)
    mixture = min_loss(logits, target, **options)
    valid = target != -1
    positive = max(int((valid & (target < 3)).sum()), 1)
    assert (positive > 1) == boxes
    second = unit_difference(mixture, target, 'bce', -1, True)[valid].sum()
    expected['ensemble/loss'] = 0.5 * second / positive
    for key, own in zip(networks, logits, strict=True):
        pull = unit_distillation(own, mixture.detach(), 'bce', 2.0)[valid].sum()
        expected[f'{key}/loss_kl'] = 0.3 * pull / positive
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-5)
    found = gradients(model, losses)
    total = sum(sum(v) if isinstance(v, list) else v for k, v in expected.items() if 'loss' in k)
    total.backward()
    for key, network in networks.items():
        for name, parameter in network.named_parameters():
            own, other = found[f'students.{key}.{name}'], parameter.grad
            assert (own is None) == (other is None), name
            if own is not None:
                torch.testing.assert_close(own, other, rtol=1e-3, atol=2e-4)


def giou(first, second):
    """Of aligned boxes, by its definition."""
    inner = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    outer = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    inner, outer = inner.clamp(min=0).prod(1), outer.prod(1)
    union = sum((x[:, 2:] - x[:, :2]).prod(1) for x in (first, second)) - inner
    return inner / union, inner / union - (outer - union) / outer


@pytest.mark.parametrize('second', [MIN_LOSS, WEIGHTED], ids=lambda x: x['type'])
@pytest.mark.parametrize('distance', ['iou', 'l1'])
def test_boxes_have_a_second_prediction_too(distance, second, monkeypatch):
    students = dict(a=tiny_det.atss(), b=tiny_det.atss(12), c=tiny_det.fcos())
    box = dict(weight=2.0, distance=distance)
    model = distiller(students, second=second, second_weight=0.5, kl=dict(weight=0.3), box=box)
    model.watched = True
    model.weights.copy_(WEIGHTS)
    data = model.data_preprocessor(tiny_det.raw(), True)
    units = []
    build_units = type(model.joint).__call__

    def spy(*args):
        units.append(build_units(*args))
        return units[0]

    monkeypatch.setattr(type(model.joint), '__call__', spy)
    losses = model(**data, mode='loss')
    boxes = units[0].boxes
    stack = torch.stack(boxes.networks)
    if second is MIN_LOSS:
        best = torch.stack([giou(own, boxes.target)[0] for own in stack]).argmax(0)
        mixture = torch.stack([stack[n, i] for i, n in enumerate(best.tolist())])
        assert len(set(best.tolist())) > 1
    else:
        mixture = (WEIGHTS[:, None, None] * stack).sum(0)
    loss = (1 - giou(mixture, boxes.target)[1]).mean()
    torch.testing.assert_close(losses['ensemble/loss_box'], 0.5 * 2.0 * loss)
    wide = (mixture[:, 2:] - mixture[:, :2] >= 1).all(1)
    for name, own in zip('abc', stack, strict=True):
        if distance == 'iou':
            pull = (1 - giou(own, mixture)[1]).where(wide, 0)
        else:
            pull = (own - mixture).abs().mean(1) / boxes.scale
        torch.testing.assert_close(losses[f'{name}/loss_kl_box'], 0.3 * 2.0 * pull.mean())
    assert all(g.isfinite().all() for g in gradients(model, losses).values() if g is not None)


def test_boxes_without_an_object_cost_nothing():
    model = distiller(detectors('atss gfl'), box=dict(distance='iou'))
    losses = model(**model.data_preprocessor(tiny_det.raw(boxes=False), True), mode='loss')
    keys = 'ensemble/loss_box', 'n0/loss_kl_box', 'n1/loss_kl_box'
    assert [losses[key].item() for key in keys] == [0, 0, 0]
    assert all(g.isfinite().all() for g in gradients(model, losses).values() if g is not None)


@pytest.mark.parametrize(
    ('box', 'message'),
    [
        (dict(distance='l2'), "`box.distance` should be one of iou, l1.*'l2'"),
        (dict(distance='distribution'), '`box.distance` should be one of iou, l1'),
        (dict(weight=-1.0), '`box.weight` should be a finite number >= 0'),
        (dict(wieght=1.0), '`box`.*wieght'),
    ],
)
def test_boxes_that_are_impossible(box, message):
    with pytest.raises(ValueError, match=message):
        CollaborativeDistiller(detectors('atss gfl'), MIN_LOSS, box=box)


def test_segmenters_have_no_boxes():
    with pytest.raises(ValueError, match='`box` is for detectors'):
        CollaborativeDistiller(segmenters(), MIN_LOSS, box=dict(distance='iou'))


@pytest.mark.parametrize(
    'second',
    [
        dict(type='Linear'),
        dict(type='Linear', per='image'),
        dict(type='MinLoss', per='image'),
        dict(type='MinLogit', shift=False),
        WEIGHTED,
        dict(type='General'),
    ],
    ids=str,
)
def test_every_second_prediction_trains_detectors(second):
    model = distiller(detectors('atss gfl fcos'), second=second)
    model.watched = True
    found = {}
    for boxes in (True, False):
        losses = model(**model.data_preprocessor(tiny_det.raw(boxes), True), mode='loss')
        assert 0 < losses['ensemble/loss'] < math.inf
        for value in gradients(model, losses).values():
            assert value is None or value.isfinite().all()
        found[boxes] = losses
    if second['type'] == 'Linear' and len(second) == 1:
        best = distiller(detectors('atss gfl fcos'))
        other = best(**best.data_preprocessor(tiny_det.raw(), True), mode='loss')
        assert found[True]['ensemble/loss'] < other['ensemble/loss']


def test_softmax_detectors_have_a_channel_for_background():
    students = {name: tiny_det.retina(softmax=True) for name in 'ab'}
    model = distiller(students, second=dict(type='MinLogit'))
    networks = alone(model)
    data = model.data_preprocessor(tiny_det.raw(), True)
    losses = model(**copy.deepcopy(data), mode='loss')
    logits = []
    for key, network in networks.items():
        paths = dict(scores='bbox_head.loss_by_feat', targets='bbox_head.get_targets')
        with Taps(network, paths) as taps:
            network(data['inputs'][key], data['data_samples'][key], mode='loss')
        logits.append(flat(taps['scores'].args[0], 4))
        if key == 'a':
            target = labels_of('retina', taps['targets'].output)
    mixture = min_logit(torch.stack(logits), target, ignore_index=-1)
    loss = F.cross_entropy(mixture, target, ignore_index=-1, reduction='sum')
    positive = ((target >= 0) & (target < 3)).sum()
    torch.testing.assert_close(losses['ensemble/loss'], loss / positive)


@pytest.mark.parametrize('boxes', [True, False])
def test_detectors_predict_by_fused_boxes(boxes):
    model = distiller(detectors('atss gfl')).eval()
    for network in model.students.values():
        network.bbox_head.test_cfg.score_thr = 0.3 if boxes else 2.0
    data = tiny_det.raw()
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(0.5, 0.5)))
    expected = {
        name: network.test_step(copy.deepcopy(data)) for name, network in model.students.items()
    }
    for step in (model.val_step, model.test_step):
        found = step(copy.deepcopy(data))
        assert len(found) == 3
        for place, sample in enumerate(found):
            assert list(sample.networks) == model.names
            for name, own in sample.networks.items():
                other = expected[name][place].pred_instances
                assert len(own.pred_instances) == len(other)
                for key in ('bboxes', 'scores', 'labels'):
                    assert torch.equal(own.pred_instances[key], other[key])
                assert len(own.gt_instances) == len(data['data_samples'][place].gt_instances)
            both = [expected[name][place].pred_instances for name in model.names]
            fused = sample.pred_instances
            assert (len(fused) > 0) == boxes
            assert len(fused) <= sum(map(len, both))
            assert fused.bboxes.shape == (len(fused), 4)
            assert fused.labels.dtype == torch.int64
            if boxes:
                joined = torch.cat([x.bboxes for x in both])
                assert (fused.bboxes >= joined.amin(0) - 1e-3).all()
                assert (fused.bboxes <= joined.amax(0) + 1e-3).all()
                assert fused.scores.max() <= torch.cat([x.scores for x in both]).max() + 1e-6
                assert set(fused.labels.tolist()) == set(
                    torch.cat([x.labels for x in both]).tolist()
                )


def test_the_evaluators_see_the_ensemble_and_the_networks():
    """A metric gets dicts of what the data samples hold."""
    model = distiller(detectors('atss gfl')).eval()
    sample = model.val_step(tiny_det.raw())[0].to_dict()
    assert {'pred_instances', 'gt_instances', 'networks'} <= sample.keys()
    assert isinstance(sample['networks'], dict)
    assert isinstance(sample['networks']['n1'].pred_instances, InstanceData)


# -- correlation of errors


def test_errors_of_segmenters_correlate_as_those_of_the_networks_alone():
    model = distiller(segmenters(3)).eval()
    torch.manual_seed(0)
    data = dict(
        inputs=[torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8) for _ in range(2)],
        data_samples=seg_batch()[1],
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = model.error_correlation(copy.deepcopy(data))
    assert not found.requires_grad
    assert found.dtype == torch.float64
    inputs = model.data_preprocessor(copy.deepcopy(data), False)['inputs']
    target = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])
    with torch.no_grad():
        logits = torch.stack(
            [
                F.interpolate(
                    network(inputs[name], mode='tensor'),
                    (32, 40),
                    mode='bilinear',
                    align_corners=network.decode_head.align_corners,
                )
                for name, network in model.students.items()
            ]
        )
    expected, _ = error_correlation(logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('names', ['atss gfl', 'retina retina', 'fcos_norm atss'])
@pytest.mark.parametrize('boxes', [True, False])
def test_errors_of_detectors_correlate_as_those_of_the_networks_alone(names, boxes):
    model = distiller(detectors(names)).eval()
    found = model.error_correlation(tiny_det.raw(boxes))
    inputs = model.data_preprocessor(tiny_det.raw(boxes), False)
    logits = []
    for place, (key, network) in enumerate(model.students.items()):
        paths = dict(scores='bbox_head.loss_by_feat', targets='bbox_head.get_targets')
        with Taps(network, paths) as taps:
            network(inputs['inputs'][key], inputs['data_samples'][key], mode='loss')
        logits.append(flat(taps['scores'].args[0], 3))
        if place == 0:
            target = labels_of(names.split()[0], taps['targets'].output)
    options = dict(difference='bce', ignore_index=-1, background=True)
    expected, _ = error_correlation(torch.stack(logits), target, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.linalg.eigvalsh(found).min() > 0


# -- errors


def faster_rcnn():
    from tests.distillers.test_dense_distillation import faster_rcnn as made

    return made()


def sigmoid_segmenter():
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    return segmenter(loss_decode=loss)


def change(cfg, **head):
    cfg['decode_head' if 'decode_head' in cfg else 'bbox_head'].update(head)
    return cfg


@pytest.mark.parametrize(
    ('students', 'message'),
    [
        (dict(a=segmenter()), '`students` should be a dict of two networks or more.*Found'),
        ({}, '`students` should be a dict of two networks or more.*Found .none'),
        ([segmenter(), segmenter()], '`students` should be a dict of two networks or more'),
        *(
            ({name: segmenter(), 'b': segmenter()}, f'names that are identifiers.*Found {name!r}')
            for name in ('ensemble', 'a.b', 'keys', 'my_loss', '', '1a', 'a/b', 'forward', 3)
        ),
        (
            dict(a=segmenter(), b=change(segmenter(), num_classes=4)),
            "same `num_classes`. Found 3 in 'a', 4 in 'b'",
        ),
        (
            dict(a=segmenter(), b=change(segmenter(), ignore_index=254)),
            "same `ignore_index`. Found 255 in 'a', 254 in 'b'",
        ),
        (
            dict(a=segmenter(), b=sigmoid_segmenter()),
            "same `use_sigmoid`. Found False in 'a', True in 'b'",
        ),
        (dict(a=segmenter(), b=tiny_det.atss()), 'all be segmentors.*or all single-stage'),
        (dict(a=tiny_det.atss(), b=faster_rcnn()), r'or all single-stage.*b.*FasterRCNN'),
        (dict(a=tiny_det.retina(), b=tiny_det.atss()), r'as many priors per location.*students.b'),
        (
            dict(a=tiny_det.atss(), b=change(tiny_det.gfl(), num_classes=4)),
            '`num_classes`.*students.b',
        ),
        (
            dict(a=tiny_det.retina(), b=tiny_det.retina(softmax=True)),
            'both sigmoid or both softmax.*students.b',
        ),
        (dict(a=segmenter(), b=dict(type='Nothing')), r'`students.b.type`.*Nothing'),
        (dict(a=segmenter(), b=dict()), r'`students.b` should have a `type`'),
    ],
    ids=str,
)
def test_networks_that_cannot_learn_together(students, message):
    with pytest.raises(ValueError, match=message):
        CollaborativeDistiller(students, MIN_LOSS)


@pytest.mark.parametrize('name', ['training', '_modules', 'T_destination', 'call_super_init'])
def test_names_that_belong_to_pytorch(name):
    with pytest.raises(ValueError, match='`students` should have names'):
        CollaborativeDistiller({name: segmenter(), 'b': segmenter()}, MIN_LOSS)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(second=dict(type='Nothing')), '`second`.*Nothing'),
        (dict(second=dict(per='unit')), '`second`.*type'),
        (dict(second='MinLoss'), '`second`'),
        (dict(second=None), '`second`'),
        (dict(second=dict(type='MinLoss', pre='unit')), '`second`.*pre'),
        (dict(second=dict(type='MinLoss', per='pixel')), "`second.per`.*'pixel'"),
        (dict(second=dict(type='ValidationWeighted')), '`second`.*metric'),
        (dict(kl=dict(wieght=1.0)), '`kl`.*wieght'),
        (dict(kl=dict(key='a')), '`kl`'),
        (dict(kl=dict(weight=-1.0)), '`kl.weight` should be >= 0. Found -1.0'),
        (dict(kl=dict(begin=3, stop=3)), '`kl.stop` should come after'),
        (dict(kl=dict(temperature=0.0)), '`kl.temperature` should be a finite number > 0'),
        (dict(kl=dict(temperature='2')), '`kl.temperature` should be a finite number > 0'),
        (dict(second_weight=-0.5), '`second_weight` should be a finite number >= 0. Found .*-0.5'),
        (
            dict(second_weight=math.nan),
            '`second_weight` should be a finite number >= 0. Found .*nan',
        ),
    ],
    ids=str,
)
def test_values_that_are_impossible(options, message):
    with pytest.raises(ValueError, match=message):
        CollaborativeDistiller(segmenters(), **{'second': MIN_LOSS, **options})


def test_a_shift_is_refused_for_detectors():
    with pytest.raises(ValueError, match='`second.shift` should be False for sigmoid heads'):
        CollaborativeDistiller(detectors('atss gfl'), dict(type='MinLogit'))


def test_images_padded_to_different_sizes_are_refused():
    students = segmenters()
    students['b']['data_preprocessor']['size'] = (64, 64)
    model = distiller(students)
    data = dict(
        inputs=[torch.zeros(3, 32, 40, dtype=torch.uint8) for _ in range(2)],
        data_samples=seg_batch()[1],
    )
    message = r"one size.*Found labels \(2, 32, 40\) for 'a', \(2, 64, 64\) for 'b'"
    with pytest.raises(ValueError, match=message):
        model(**model.data_preprocessor(data, True), mode='loss')
