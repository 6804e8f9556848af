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
    LabelSpec,
    Linear,
    MinLogit,
    MinLoss,
    SecondPrediction,
    ValidationWeighted,
    build_second_prediction,
    general,
    validation_weighted,
)
from mmdistill_ext.registry import SECOND_PREDICTIONS

LABEL_SPECS = {
    'softmax': (LabelSpec('ce', 255, False), 4, 4),
    'sigmoid': (LabelSpec('bce', 255, False), 4, 4),
    'binary': (LabelSpec('bce', 255, False), 1, 2),
    'detector': (LabelSpec('bce', -1, True), 3, 4),
}
POLICIES = {'MinLoss': (MinLoss, min_loss), 'Linear': (Linear, linear)}


def make(name, count=3, units=40, images=1, seed=0):
    spec, channels, labels = LABEL_SPECS[name]
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, images, channels, units, generator=generator).double()
    target = torch.randint(0, labels, (images, units), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = spec.ignore_index
    return logits, target, spec


class Measured:
    """What a validation found."""

    def __init__(self, scores=None, correlation=None):
        self.known, self.correlation = scores, correlation

    def scores(self, metric):
        return self.known[metric]

    def error_correlation(self):
        return self.correlation


@pytest.fixture
def said(monkeypatch):
    """What the policies warn of."""
    found = []
    for module in (general, validation_weighted):
        monkeypatch.setattr(module, 'warn', found.append)
    return found


def build(**cfg):
    return SECOND_PREDICTIONS.build(cfg)


def steps(made):
    """What the policy hands on besides what the labels mean."""
    return dict(iterations=made.iterations) if isinstance(made, Linear) else {}


@pytest.mark.parametrize('name', LABEL_SPECS)
@pytest.mark.parametrize('policy', POLICIES)
def test_each_unit_is_chosen_for_as_the_function_does(policy, name):
    cls, function = POLICIES[policy]
    logits, target, spec = make(name)
    made = build(type=policy).bind(spec)
    assert isinstance(made, cls)
    assert made.per == 'unit'
    found = made.combine(logits, target, None)
    assert torch.equal(found, function(logits, target, **spec._asdict(), **steps(made)))


@pytest.mark.parametrize('name', LABEL_SPECS)
@pytest.mark.parametrize('policy', POLICIES)
def test_each_image_is_chosen_for_as_the_function_does(policy, name):
    function = POLICIES[policy][1]
    logits, target, spec = make(name, images=4)
    made = build(type=policy, per='image').bind(spec)
    assert made.per == 'image'
    arguments = dict(spec._asdict(), per='image', **steps(made))
    expected = function(logits, target, **arguments)
    chosen = []
    for image in range(4):
        one, labels = logits[:, image : image + 1], target[image : image + 1]
        weights = made.weigh_image(one, labels)
        assert weights.shape == (3,)
        assert weights.sum().item() == pytest.approx(1)
        assert not weights.requires_grad
        each = weights[:, None, None].expand(3, 1, 40)
        found = made.combine(one, labels, each)
        torch.testing.assert_close(found, expected[image : image + 1])
        chosen.append(weights)
    if policy == 'MinLoss':
        assert all(weights.sort().values.tolist() == [0, 0, 1] for weights in chosen)
    else:
        weights = simplex_weights(logits, target, **arguments).weights
        torch.testing.assert_close(torch.stack(chosen, 1), weights)


@pytest.mark.parametrize('per', ['unit', 'image'])
def test_more_steps_find_a_better_mixture(per):
    logits, target, spec = make('softmax', units=200)
    losses = []
    for iterations in (1, 3, 20):
        made = build(type='Linear', per=per, iterations=iterations).bind(spec)
        weights = None
        if per == 'image':
            weights = made.weigh_image(logits, target)[:, None, None].expand(3, 1, 200)
        found = made.combine(logits, target, weights)
        losses.append(unit_difference(found, target, *spec).sum().item())
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize('policy', POLICIES)
def test_an_image_without_label_and_its_bad_values_choose_a_network(policy):
    logits, target, spec = make('softmax')
    target[:] = 255
    made = build(type=policy, per='image').bind(spec)
    weights = made.weigh_image(logits * float('nan'), target)
    expected = [1, 0, 0] if policy == 'MinLoss' else [1 / 3] * 3
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize('name', LABEL_SPECS)
@pytest.mark.parametrize('shift', [False, True])
def test_the_smallest_logit_is_that_of_the_function(name, shift):
    logits, target, spec = make(name)
    made = build(type='MinLogit', shift=shift)
    assert spec.sigmoid == (spec.difference == 'bce')
    if shift and spec.sigmoid:
        with pytest.raises(ValueError, match='`second.shift` should be False for sigmoid.*True'):
            made.bind(spec)
        return
    found = made.bind(spec).combine(logits, target, None)
    labels = target if shift else None
    assert torch.equal(found, min_logit(logits, labels, ignore_index=spec.ignore_index))


def test_logits_are_shifted_unless_told_otherwise():
    assert MinLogit().shift
    assert build(type='MinLogit') == MinLogit(shift=True)


def test_weights_of_the_validation_grow_with_the_metric():
    made = build(type='ValidationWeighted', metric='mIoU', temperature=2.0)
    assert (made.metric, made.weights_from, made.per) == ('mIoU', 'metric', 'unit')
    scores = [50.0, 52.0, 51.0]
    weights = made.find_weights(Measured(scores=dict(mIoU=scores)))
    assert torch.equal(weights, validation_weights(scores, 2.0))
    assert (weights[1] / weights[0]).item() == pytest.approx(2.718281828, rel=1e-5)


def test_weights_stay_until_every_network_has_the_metric(said):
    made = ValidationWeighted('mIoU', 2.0)
    assert made.find_weights(Measured(scores=dict(mIoU=[50.0, None]))) is None
    assert said == ['Not every network has a mIoU yet: the weights stay.']


def test_weights_of_the_least_error():
    logits, target, _ = make('softmax', units=500)
    made = build(type='General')
    assert (made.weights_from, made.per) == ('errors', 'unit')
    correlation, _ = error_correlation(logits, target)
    measured = Measured(correlation=correlation)
    assert torch.equal(made.find_weights(measured), general_weights(correlation, made.ridge)[0])
    assert torch.equal(
        build(type='General', ridge=0.0).find_weights(measured),
        general_weights(correlation, 0.0)[0],
    )


def test_networks_that_err_alike_are_said_with_their_condition_number(said):
    correlation = torch.ones(2, 2, dtype=torch.float64)
    _, condition = general_weights(correlation, 1e-3)
    assert condition > general.ILL_CONDITIONED
    weights = General().find_weights(Measured(correlation=correlation))
    assert weights.tolist() == pytest.approx([0.5, 0.5])
    assert said == [
        f'The networks err nearly alike (condition number {condition:.1e}): '
        'second.ridge=0.001 decides.'
    ]


@pytest.mark.parametrize('value', [0.0, float('nan'), float('inf')])
def test_weights_stay_without_errors_that_can_be_compared(value, said):
    correlation = torch.full((2, 2), value, dtype=torch.float64)
    assert General().find_weights(Measured(correlation=correlation)) is None
    assert said == ['The errors on held-out images are not finite, or none: the weights stay.']


@pytest.mark.parametrize(
    'made',
    [ValidationWeighted('mIoU', 1.0), General(), MinLoss(per='image')],
    ids=repr,
)
def test_given_weights_mix(made):
    logits, target, spec = make('detector')
    of_networks = torch.tensor([0.5, -0.25, 0.75])
    of_units = torch.rand(3, 1, 40)
    for weights in (of_networks, of_units):
        found = made.bind(spec).combine(logits, target, weights)
        assert torch.equal(found, mix(logits, weights))


def test_only_those_of_the_validation_measure_and_only_images_are_weighed():
    for made in (MinLoss(), Linear(), MinLogit()):
        assert made.weights_from is None
        assert made.find_weights(Measured()) is None
    with pytest.raises(NotImplementedError):
        General().weigh_image(*make('softmax')[:2])


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(type='MinLoss', per='pixel'), "`second.per` should be one of unit, image.*'pixel'"),
        (dict(type='Linear', per=None), '`second.per` should be a string. Found None'),
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
    made = MinLoss()
    with pytest.raises(AttributeError):
        made.per = 'image'
    spec = LABEL_SPECS['softmax'][0]
    bound = made.bind(spec)
    assert (made.label_spec, bound.label_spec) == (None, spec)
    with pytest.raises(AttributeError):
        bound.label_spec = None


POLICY_NAMES = ['MinLoss', 'Linear', 'MinLogit', 'ValidationWeighted', 'General']


@pytest.mark.parametrize('policy', POLICY_NAMES)
def test_a_policy_is_built_bound_to_the_labels(policy):
    arguments = dict(metric='mIoU', temperature=1.0) if policy == 'ValidationWeighted' else {}
    spec = LABEL_SPECS['softmax'][0]
    made = build_second_prediction(dict(type=policy, **arguments), spec)
    assert type(made).__name__ == policy
    assert made.label_spec == spec


def test_a_policy_of_ones_own_needs_only_to_combine():
    @SECOND_PREDICTIONS.register_module()
    class Mean(SecondPrediction):
        def combine(self, logits, labels, weights):
            return logits.mean(0)

    try:
        logits, target, spec = make('softmax')
        made = build_second_prediction(dict(type='Mean'), spec)
        assert torch.equal(made.combine(logits, target, None), logits.mean(0))
        assert (made.per, made.weights_from) == ('unit', None)
        assert made.find_weights(Measured()) is None
    finally:
        SECOND_PREDICTIONS.module_dict.pop('Mean')
