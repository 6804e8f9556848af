import pytest
import torch

from mmdistill_ext.functional import (
    error_correlation,
    general_weights,
    linear,
    min_logit,
    min_loss,
    mix,
    simplex_weights,
    unit_difference,
    validation_weights,
)
from mmdistill_ext.policies.second_predictions import (
    General,
    Kind,
    Linear,
    MinLogit,
    MinLoss,
    ValidationWeighted,
)
from mmdistill_ext.registry import SECOND_PREDICTIONS

KINDS = {
    'softmax': (Kind('ce', 255, False), 4, 4),
    'sigmoid': (Kind('bce', 255, False), 4, 4),
    'binary': (Kind('bce', 255, False), 1, 2),
    'detector': (Kind('bce', -1, True), 3, 4),
}
POLICIES = {'MinLoss': (MinLoss, min_loss), 'Linear': (Linear, linear)}


def make(name, count=3, units=40, images=1, seed=0):
    kind, channels, labels = KINDS[name]
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, images, channels, units, generator=generator).double()
    target = torch.randint(0, labels, (images, units), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = kind.ignore_index
    return logits, target, kind


def build(**cfg):
    return SECOND_PREDICTIONS.build(cfg)


def steps(made):
    """What the policy hands on besides the kind of the labels."""
    return dict(iterations=made.iterations) if isinstance(made, Linear) else {}


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('policy', POLICIES)
def test_each_unit_is_chosen_for_as_the_function_does(policy, name):
    cls, function = POLICIES[policy]
    logits, target, kind = make(name)
    made = build(type=policy)
    assert isinstance(made, cls)
    assert made.per == 'unit'
    found = made.combine(logits, target, None, kind)
    assert torch.equal(found, function(logits, target, **kind._asdict(), **steps(made)))


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('policy', POLICIES)
def test_each_image_is_chosen_for_as_the_function_does(policy, name):
    function = POLICIES[policy][1]
    logits, target, kind = make(name, images=4)
    made = build(type=policy, per='image')
    assert made.per == 'image'
    arguments = dict(kind._asdict(), per='image', **steps(made))
    expected = function(logits, target, **arguments)
    chosen = []
    for image in range(4):
        one, labels = logits[:, image : image + 1], target[image : image + 1]
        weights = made.weigh_image(one, labels, kind)
        assert weights.shape == (3,)
        assert weights.sum().item() == pytest.approx(1)
        assert not weights.requires_grad
        each = weights[:, None, None].expand(3, 1, 40)
        found = made.combine(one, labels, each, kind)
        torch.testing.assert_close(found, expected[image : image + 1])
        chosen.append(weights)
    if policy == 'MinLoss':
        assert all(weights.sort().values.tolist() == [0, 0, 1] for weights in chosen)
    else:
        weights = simplex_weights(logits, target, **arguments).weights
        torch.testing.assert_close(torch.stack(chosen, 1), weights)


@pytest.mark.parametrize('per', ['unit', 'image'])
def test_more_steps_find_a_better_mixture(per):
    logits, target, kind = make('softmax', units=200)
    losses = []
    for iterations in (1, 3, 20):
        made = build(type='Linear', per=per, iterations=iterations)
        weights = None
        if per == 'image':
            weights = made.weigh_image(logits, target, kind)[:, None, None].expand(3, 1, 200)
        found = made.combine(logits, target, weights, kind)
        losses.append(unit_difference(found, target, *kind).sum().item())
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize('policy', POLICIES)
def test_an_image_without_label_and_its_bad_values_choose_a_network(policy):
    logits, target, kind = make('softmax')
    target[:] = 255
    weights = build(type=policy, per='image').weigh_image(logits * float('nan'), target, kind)
    expected = [1, 0, 0] if policy == 'MinLoss' else [1 / 3] * 3
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('shift', [False, True])
def test_the_smallest_logit_is_that_of_the_function(name, shift):
    logits, target, kind = make(name)
    made = build(type='MinLogit', shift=shift)
    sigmoid = kind.difference == 'bce'
    if shift and sigmoid:
        with pytest.raises(ValueError, match='`second.shift` should be False for sigmoid.*True'):
            made.check(sigmoid)
        return
    made.check(sigmoid)
    found = made.combine(logits, target, None, kind)
    labels = target if shift else None
    assert torch.equal(found, min_logit(logits, labels, ignore_index=kind.ignore_index))


def test_logits_are_shifted_unless_told_otherwise():
    assert MinLogit().shift
    assert build(type='MinLogit') == MinLogit(shift=True)


def test_weights_of_the_validation_grow_with_the_metric():
    made = build(type='ValidationWeighted', metric='mIoU', temperature=2.0)
    assert (made.metric, made.weights_from, made.per) == ('mIoU', 'metric', 'unit')
    scores = [50.0, 52.0, 51.0]
    assert torch.equal(made.weights(scores), validation_weights(scores, 2.0))
    ratio = made.weights(scores)[1] / made.weights(scores)[0]
    assert ratio.item() == pytest.approx(2.718281828, rel=1e-5)


def test_weights_of_the_least_error():
    logits, target, _ = make('softmax', units=500)
    made = build(type='General')
    assert (made.weights_from, made.per) == ('errors', 'unit')
    correlation, _ = error_correlation(logits, target)
    weights, condition = made.weights(correlation)
    expected = general_weights(correlation, made.ridge)
    assert torch.equal(weights, expected[0])
    assert condition == expected[1]
    assert torch.equal(
        build(type='General', ridge=0.0).weights(correlation)[0],
        general_weights(correlation, 0.0)[0],
    )


@pytest.mark.parametrize(
    'made',
    [ValidationWeighted('mIoU', 1.0), General(), MinLoss(per='image')],
    ids=repr,
)
def test_given_weights_mix(made):
    logits, target, kind = make('detector')
    of_networks = torch.tensor([0.5, -0.25, 0.75])
    of_units = torch.rand(3, 1, 40)
    for weights in (of_networks, of_units):
        found = made.combine(logits, target, weights, kind)
        assert torch.equal(found, mix(logits, weights))


def test_only_those_of_the_validation_measure_and_only_images_are_weighed():
    for made in (MinLoss(), Linear(), MinLogit()):
        assert made.weights_from is None
    with pytest.raises(NotImplementedError):
        General().weigh_image(*make('softmax'))


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(type='MinLoss', per='pixel'), "`second.per` should be one of unit, image.*'pixel'"),
        (dict(type='Linear', per=None), '`second.per` should be one of unit, image.*None'),
        (
            dict(type='ValidationWeighted', metric='mIoU', temperature=0.0),
            '`second.temperature` should be a finite number > 0',
        ),
        (
            dict(type='ValidationWeighted', metric='mIoU', temperature=float('nan')),
            '`second.temperature` should be a finite number > 0',
        ),
        (dict(type='Linear', iterations=0), '`second.iterations` should be an integer >= 1.*0'),
        (dict(type='Linear', iterations=2.5), '`second.iterations` should be an integer.*2.5'),
        (dict(type='General', ridge=-1.0), '`second.ridge` should be a finite number >= 0'),
    ],
)
def test_impossible_values_name_the_key(cfg, message):
    with pytest.raises(ValueError, match=message):
        build(**cfg)


def test_policies_do_not_change():
    with pytest.raises(AttributeError):
        MinLoss().per = 'image'
