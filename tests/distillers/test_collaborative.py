import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.functional import (
    linear,
    min_logit,
    min_loss,
    mix,
    unit_difference,
    unit_distillation,
)
from mmdistill_ext.taps import Taps
from tests import tiny_det
from tests.tiny_networks import (
    MIN_LOSS,
    WEIGHTED,
    WEIGHTS,
    alone,
    detectors,
    distiller,
    for_all,
    gradients,
    seg_batch,
    segmenter,
    segmenters,
)

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


@pytest.mark.parametrize('count', [2, 3])
@pytest.mark.parametrize('name', SECONDS)
def test_losses_of_segmenters_equal_those_of_the_networks_run_alone(name, count):
    second, combine = SECONDS[name]
    model = distiller(
        segmenters(count), second=second, second_weight=0.5, kl=dict(weight=0.3, temperature=2.0)
    ).double()
    model.has_hook = True
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
