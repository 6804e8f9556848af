import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdistill_ext.functional import (
    ensemble,
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

# difference, background, channels
HEADS = [('ce', False, 5), ('bce', False, 5), ('bce', False, 1), ('bce', True, 5), ('bce', True, 1)]
PER = ['unit', 'image']
NAN = float('nan')


def make(count=3, head=HEADS[0], size=(7,), images=2, seed=0, dtype=torch.float64, scale=2.0):
    _, background, channels = head
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, images, channels, *size, generator=generator, dtype=torch.float64)
    labels = channels + 1 if background else max(channels, 2)
    target = torch.randint(0, labels, (images, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return (scale * logits).to(dtype), target


def options(head):
    return dict(difference=head[0], background=head[1])


def plain_loss(x, y, head):
    """One unit in probabilities: ``x`` (C,), ``y`` a class."""
    difference, background, channels = head
    if difference == 'ce':
        return -(x.exp() / x.exp().sum())[y].log().item()
    p = 1 / (1 + (-x).exp())
    if channels == 1 and not background:
        return -(p if y == 1 else 1 - p).log().item()
    return -sum((p[c] if c == y else 1 - p[c]).log().item() for c in range(channels))


# -- mix


def test_mix_equals_a_loop():
    logits, _ = make(3, size=(4, 3))
    generator = torch.Generator().manual_seed(1)
    for shape in ((3,), (3, 2), (3, 2, 4, 3)):
        weights = torch.randn(shape, generator=generator)  # of any sign, of no given sum
        found = mix(logits, weights)
        expected = torch.zeros(2, 5, 4, 3, dtype=torch.float64)
        for n in range(3):
            for b in range(2):
                for i in range(4):
                    for j in range(3):
                        place = (n, b, i, j)[: len(shape)]
                        expected[b, :, i, j] += weights[place].double() * logits[n, b, :, i, j]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mix_in_full_precision(dtype):
    logits, _ = make(dtype=dtype)
    found = mix(logits, torch.tensor([1.5, -2.0, 1.5]))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = mix(logits.double(), torch.tensor([1.5, -2, 1.5]))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_mix_of_one_image_and_equal_lengths_is_not_ambiguous():
    logits = torch.randn(2, 2, 2, 2)  # N = B = C = units
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # (N, B): the first image from the first
    assert torch.equal(mix(logits, weights), torch.stack((logits[0, 0], logits[1, 1])))


def test_mix_passes_gradients_to_the_logits_alone():
    logits, _ = make()
    logits.requires_grad_()
    weights = torch.rand(3, 2, 7, dtype=torch.float64, requires_grad=True)
    mix(logits, weights).sum().backward()
    torch.testing.assert_close(logits.grad, weights.detach().unsqueeze(2).expand_as(logits))
    assert weights.grad is None


@pytest.mark.parametrize('shape', [(), (2,), (4,), (3, 7), (3, 2, 1), (3, 2, 5, 7), (1, 3)])
def test_mix_weights_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r'`weights` should be \(N,\), \(N, B\) or'):
        mix(torch.zeros(3, 2, 5, 7), torch.zeros(shape))


# -- min_loss


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('head', HEADS)
def test_min_loss_equals_a_loop(head, per):
    logits, target = make(4, head)
    found = min_loss(logits, target, per=per, **options(head))
    for b in range(2):
        valid = [u for u in range(7) if target[b, u] != 255]
        losses = torch.tensor(
            [[plain_loss(logits[n, b, :, u], target[b, u], head) for u in valid] for n in range(4)]
        )
        for place, u in enumerate(valid):
            scores = losses[:, place] if per == 'unit' else losses.sum(1)
            assert torch.equal(found[b, :, u], logits[scores.argmin(), b, :, u])


@pytest.mark.parametrize('head', HEADS)
def test_min_loss_has_the_least_of_the_losses(head):
    logits, target = make(4, head, size=(6, 5))
    losses = torch.stack([unit_difference(x, target, head[0], 255, head[1]) for x in logits])
    second = unit_difference(
        min_loss(logits, target, **options(head)), target, head[0], 255, head[1]
    )
    assert torch.equal(second, losses.amin(0))
    second = unit_difference(
        min_loss(logits, target, per='image', **options(head)), target, head[0], 255, head[1]
    )
    torch.testing.assert_close(second.sum((1, 2)), losses.sum((2, 3)).amin(0))


@pytest.mark.parametrize('per', PER)
def test_ties_go_to_the_first(per):
    base, _ = make(1, size=(50,), images=3)
    target = torch.zeros(3, 50, dtype=torch.long)
    worse = base - 10 * (torch.arange(5) == 0).double().view(1, 1, 5, 1)
    logits = torch.cat((worse, base, base, base)).requires_grad_()
    min_loss(logits, target, per=per).sum().backward()
    expected = torch.tensor([0.0, 1, 0, 0], dtype=torch.float64)
    assert torch.equal(logits.grad, expected.view(4, 1, 1, 1).expand_as(logits))


def test_equal_logits_are_taken_from_the_first():
    base, _ = make(1, size=(50,))
    logits = torch.cat((base + 1, base, base)).requires_grad_()
    min_logit(logits).sum().backward()
    expected = torch.tensor([0.0, 1, 0], dtype=torch.float64)
    assert torch.equal(logits.grad, expected.view(3, 1, 1, 1).expand_as(logits))


@pytest.mark.parametrize('count', [1, 2, 5])
def test_choices_are_those_of_argmin_whatever_the_values(count):
    generator = torch.Generator().manual_seed(count)
    logits = torch.randint(-2, 3, (count, 2, 5, 200), generator=generator).double()
    for value in (NAN, math.inf, -math.inf):  # many ties, and ties of these too
        logits[torch.rand(logits.shape, generator=generator) < 0.1] = value
    leaf = logits.clone().requires_grad_()
    found = min_logit(leaf)
    place = logits.argmin(0, keepdim=True)
    expected = logits.gather(0, place).squeeze(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    upstream = torch.randn(found.shape, generator=generator).double()
    found.backward(upstream)
    assert torch.equal(leaf.grad, torch.zeros_like(logits).scatter(0, place, upstream.unsqueeze(0)))


@pytest.mark.parametrize('per', PER)
def test_units_without_label_take_the_first(per):
    logits, target = make(3)
    target[:] = 255
    assert torch.equal(min_loss(logits, target, per=per), logits[0])


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('name', ['min_loss', 'linear'])
def test_values_on_ignored_units_choose_nothing(name, per):
    logits, target = make(3)
    ignored = (target == 255).unsqueeze(1)
    spoilt = logits.masked_fill(ignored, NAN)
    valid = (~ignored).expand(2, 5, 7)
    function = getattr(ensemble, name)
    found, expected = (function(x, target, per=per) for x in (spoilt, logits))
    assert torch.equal(found[valid], expected[valid])


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('name', ['min_loss', 'linear'])
def test_a_bad_value_spoils_its_own_unit_or_image_alone(name, per):
    logits, target = make(3, images=3)
    target[target == 255] = 0
    function = getattr(ensemble, name)
    expected = function(logits, target, per=per)
    logits[2, 1, 0, 4] = NAN
    found = function(logits, target, per=per)
    own = torch.zeros(3, 5, 7, dtype=torch.bool)
    own[1, :, 4 if per == 'unit' else slice(None)] = True
    torch.testing.assert_close(found[~own], expected[~own])
    assert found[1, :, 4].isnan().any()  # seen, not hidden


# -- linear


@pytest.mark.parametrize('scale', [0.3, 3.0, 30.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('head', HEADS)
def test_linear_is_no_worse_than_any_network(head, dtype, scale):
    logits, target = make(4, head, size=(20, 20), scale=scale, dtype=dtype)
    kind = (head[0], 255, head[1])
    losses = torch.stack([unit_difference(x.double(), target, *kind) for x in logits])
    for per in PER:
        second = unit_difference(
            linear(logits, target, per=per, **options(head)).double(), target, *kind
        )
        excess = second - losses.amin(0)
        if per == 'image':
            valid = (target != 255).sum((1, 2))
            excess = (second.sum((1, 2)) - losses.sum((2, 3)).amin(0)) / valid
        assert excess.max() <= 1e-5 * scale
        if head[2] > 1 or per == 'image':  # one logit's best is a network's own
            assert excess.min() < -0.001 * scale  # often better


@pytest.mark.parametrize('per', PER)
def test_linear_is_the_mixture_of_the_simplex_weights(per):
    logits, target = make(3, size=(4, 3))
    weights = simplex_weights(logits, target, per=per).weights
    assert torch.equal(linear(logits, target, per=per), mix(logits, weights))


def test_one_network_is_itself():
    logits, target = make(1)
    for per in PER:
        assert torch.equal(min_loss(logits, target, per=per), logits[0])
        torch.testing.assert_close(linear(logits, target, per=per), logits[0])
    assert torch.equal(min_logit(logits), logits[0])


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('name', ['min_loss', 'linear'])
def test_gradients_flow_through_the_predictions_and_not_the_choice(name, per):
    logits, target = make(3, size=(3,))
    function = getattr(ensemble, name)
    expected = function(logits, target, per=per)
    if name == 'min_loss':  # away from ties the choice is locally constant
        assert torch.autograd.gradcheck(
            lambda x: min_loss(x, target, per=per), logits.clone().requires_grad_()
        )
    leaf = logits.clone().requires_grad_()
    function(leaf, target, per=per).square().sum().backward()
    if name == 'linear':
        weights = simplex_weights(logits, target, per=per).weights
        weights = weights.reshape(3, 2, 1, -1)
    else:
        weights = (logits == expected).all(2, keepdim=True)
    torch.testing.assert_close(leaf.grad, weights * 2 * expected)


def test_second_loss_of_linear_has_the_slope_of_its_minimum():
    # the derivative by the weights is 0 at the minimum, or they stay at a corner: that of the
    # second loss by the predictions is the same with the choice and without
    logits, target = make(3, size=(3,), images=1)

    def second_loss(x):
        return unit_difference(linear(x, target), target)

    assert torch.autograd.gradcheck(second_loss, logits.requires_grad_(), atol=1e-4)


# -- min_logit


def test_min_logit_equals_a_loop():
    logits, target = make(3)
    plain, shifted = min_logit(logits), min_logit(logits, target)
    for b in range(2):
        for u in range(7):
            y = int(target[b, u])
            for c in range(5):
                assert plain[b, c, u] == min(logits[n, b, c, u] for n in range(3))
                shift = [0 if y == 255 else logits[n, b, y, u] for n in range(3)]
                assert shifted[b, c, u] == min(logits[n, b, c, u] - shift[n] for n in range(3))


def test_shift_leaves_each_networks_softmax_and_sets_the_label_to_0():
    logits, target = make(4)
    for x in logits:
        shifted = min_logit(x.unsqueeze(0), target)
        torch.testing.assert_close(shifted.softmax(1), x.softmax(1))
    shifted = min_logit(logits, target)
    valid = target != 255
    at_label = shifted.gather(1, target.where(valid, 0).unsqueeze(1)).squeeze(1)
    assert (at_label[valid] == 0).all()
    assert torch.equal(
        shifted[:, :, :].where(~valid.unsqueeze(1), 0),
        min_logit(logits).where(~valid.unsqueeze(1), 0),
    )


def test_shifted_minimum_is_no_worse_than_any_network():
    logits, target = make(4, size=(30,))
    second = unit_difference(min_logit(logits, target), target)
    losses = torch.stack([unit_difference(x, target) for x in logits])
    assert (second <= losses.amin(0) + 1e-12).all()


def test_min_logit_passes_gradients():
    logits, target = make(3, size=(3,))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(min_logit, logits)
    assert torch.autograd.gradcheck(lambda x: min_logit(x, target), logits)


def test_min_logit_keeps_bad_values_of_ignored_units_to_themselves():
    logits, target = make(3)
    ignored = (target == 255).unsqueeze(1).expand(2, 5, 7)
    spoilt = logits.clone()
    spoilt[1][ignored] = NAN
    leaf = spoilt.requires_grad_()
    found = min_logit(leaf, target)
    assert torch.equal(found[~ignored], min_logit(logits, target)[~ignored])
    found.masked_fill(ignored, 0).sum().backward()
    assert leaf.grad.isfinite().all()


# -- what they share


@pytest.mark.parametrize('name', ['min_loss', 'linear', 'min_logit'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_strides_and_other_ignore_index(name, dtype):
    function = getattr(ensemble, name)
    logits, target = make(3, size=(4, 3), dtype=dtype)
    expected = function(logits.float(), target)
    assert expected.dtype == torch.float32
    strided = logits.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert not strided.is_contiguous()
    assert torch.equal(function(logits, target), expected)
    assert torch.equal(function(strided, target), expected)
    moved = target.where(target != 255, -1)
    assert torch.equal(function(logits, moved, ignore_index=-1), expected)


@pytest.mark.parametrize('size', [(), (5,), (3, 5), (0,), (3, 0)])
@pytest.mark.parametrize('images', [0, 1, 2])
def test_shapes(images, size):
    logits = torch.randn(3, images, 4, *size)
    target = torch.zeros(images, *size, dtype=torch.long)
    shape = (images, 4, *size)
    for per in PER:
        assert min_loss(logits, target, per=per).shape == shape
        assert linear(logits, target, per=per).shape == shape
    assert min_logit(logits).shape == min_logit(logits, target).shape == shape
    sums, number = error_correlation(logits, target)
    assert sums.shape == (3, 3)
    assert number == target.numel()


@pytest.mark.parametrize('name', ['min_loss', 'linear', 'min_logit', 'error_correlation'])
def test_errors(name):
    function = getattr(ensemble, name)
    labels = torch.zeros(3, 5, dtype=torch.long)
    for shape, message in (
        ((3, 5), r'\(N, B, C, \.\.\.\).*\(3, 5\)'),
        ((0, 3, 4, 5), r'N >= 1.*\(0, 3, 4, 5\)'),
        ((2, 3, 4, 6), r'one label per unit.*\(3, 5\)'),
        ((2, 4, 4, 5), r'`target` should have the shape'),
        ((2, 3, 1, 5), r'one channel'),
    ):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(shape), labels)
    with pytest.raises(ValueError, match='integer class indices'):
        function(torch.zeros(2, 3, 4, 5), labels.float())
    if name in ('min_loss', 'linear'):
        with pytest.raises(ValueError, match='`per` should be one of unit, image'):
            function(torch.zeros(2, 3, 4, 5), labels, per='pixel')
        with pytest.raises(ValueError, match='`difference` should be one of'):
            function(torch.zeros(2, 3, 4, 5), labels, difference='kl')


# -- validation_weights


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.sampled_from([0.01, 0.1, 1.0, 100.0]),
)
def test_validation_weights_are_the_formula_and_monotone(scores, temperature):
    weights = validation_weights(scores, temperature)
    assert weights.dtype == torch.float32
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1)
    powers = [math.exp((score - max(scores)) / temperature) for score in scores]
    assert weights.tolist() == pytest.approx([p / sum(powers) for p in powers], rel=1e-5, abs=1e-30)
    for a, x in zip(scores, weights, strict=True):
        for b, y in zip(scores, weights, strict=True):
            assert a != b or x == y
            assert a <= b or x >= y


def test_validation_weights_grow_with_the_score_and_sharpen():
    mild, sharp = (validation_weights([0.3, 0.5, 0.4], t) for t in (0.1, 0.01))
    assert mild[1] > mild[2] > mild[0] > 0
    assert sharp[1] > mild[1]
    assert validation_weights([1.0, 0.0], 1e-6).tolist() == [1, 0]


@pytest.mark.parametrize('scores', [[], [NAN], [0.5, math.inf]])
def test_validation_scores_that_do_not_fit(scores):
    with pytest.raises(ValueError, match='`scores` should be finite numbers'):
        validation_weights(scores)


@pytest.mark.parametrize('temperature', [0, -1.0, NAN, math.inf])
def test_validation_temperatures_that_do_not_fit(temperature):
    with pytest.raises(ValueError, match='`temperature` should be a finite number > 0'):
        validation_weights([0.5, 0.6], temperature)


# -- error_correlation and general_weights


def test_error_correlation_equals_a_loop():
    logits, target = make(3)
    sums, number = error_correlation(logits, target)
    assert sums.dtype == number.dtype == torch.float64
    expected, valid = torch.zeros(3, 3, dtype=torch.float64), 0
    for b in range(2):
        for u in range(7):
            y = int(target[b, u])
            if y == 255:
                continue
            valid += 1
            error = [x[b, :, u].exp() / x[b, :, u].exp().sum() for x in logits]
            for e in error:
                e[y] -= 1
            for i in range(3):
                for j in range(3):
                    expected[i, j] += (error[i] * error[j]).sum()
    torch.testing.assert_close(sums, expected)
    assert number.item() == valid > 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_error_correlation_adds_up_over_batches(dtype):
    logits, target = make(3, images=5, size=(6, 4), dtype=dtype)
    sums, number = error_correlation(logits.requires_grad_(), target)
    assert not sums.requires_grad
    parts = [error_correlation(logits[:, b : b + 1], target[b : b + 1]) for b in range(5)]
    torch.testing.assert_close(sum(part[0] for part in parts), sums)
    assert sum(part[1] for part in parts) == number


def test_error_correlation_is_symmetric_semidefinite_and_0_for_the_truth():
    logits, target = make(4, size=(40,))
    sums, _ = error_correlation(logits, target)
    assert torch.equal(sums, sums.T)
    assert torch.linalg.eigvalsh(sums).min() > -1e-12
    truth = 100 * torch.nn.functional.one_hot(target.where(target != 255, 0), 5).movedim(-1, 1)
    sums, _ = error_correlation(truth.double().unsqueeze(0), target)
    assert sums.item() < 1e-30


def test_error_correlation_does_not_see_ignored_units():
    logits, target = make(3)
    spoilt = logits.masked_fill((target == 255).unsqueeze(1), NAN)
    torch.testing.assert_close(error_correlation(spoilt, target), error_correlation(logits, target))
    target[:] = 255
    sums, number = error_correlation(spoilt, target)
    assert (sums == 0).all()
    assert number == 0


@pytest.mark.parametrize('head', HEADS[1:])
def test_error_correlation_of_sigmoids_equals_a_loop(head):
    _, background, channels = head
    logits, target = make(3, head)
    sums, number = error_correlation(logits, target, **options(head))
    expected, valid = torch.zeros(3, 3, dtype=torch.float64), 0
    for b in range(2):
        for u in range(7):
            y = int(target[b, u])
            if y == 255:
                continue
            valid += 1
            truth = torch.zeros(channels, dtype=torch.float64)
            if channels == 1 and not background:
                truth[0] = y
            elif y < channels:  # the background of a detector has no channel
                truth[y] = 1
            error = [1 / (1 + (-x[b, :, u]).exp()) - truth for x in logits]
            for i in range(3):
                for j in range(3):
                    expected[i, j] += (error[i] * error[j]).sum()
    torch.testing.assert_close(sums, expected)
    assert number.item() == valid > 0


@pytest.mark.parametrize('head', HEADS)
def test_errors_of_a_head_are_the_slope_of_its_loss(head):
    """Which ties the correlation to the loss that it is to lower."""
    logits, target = make(2, head)
    logits.requires_grad_()
    loss = sum(unit_difference(x, target, head[0], 255, head[1]).sum() for x in logits)
    errors = torch.autograd.grad(loss, logits)[0].flatten(1)
    sums, _ = error_correlation(logits, target, **options(head))
    torch.testing.assert_close(sums, errors @ errors.T)


@pytest.mark.parametrize('head', HEADS[1:])
def test_error_correlation_of_sigmoids_does_not_see_ignored_units(head):
    logits, target = make(3, head)
    target[target == 255] = -1
    arguments = dict(options(head), ignore_index=-1)
    spoilt = logits.masked_fill((target == -1).unsqueeze(1), NAN)
    expected = error_correlation(logits, target, **arguments)
    torch.testing.assert_close(error_correlation(spoilt, target, **arguments), expected)
    assert expected[1] == (target != -1).sum()
    target[:] = -1
    sums, number = error_correlation(spoilt, target, **arguments)
    assert (sums == 0).all()
    assert number == 0


@pytest.mark.parametrize(
    ('channels', 'arguments', 'message'),
    [
        (5, dict(difference='l2'), '`difference` should be one of ce, bce'),
        (5, dict(background=True), "`background=True` needs difference='bce'"),
        (1, dict(), 'on logits with one channel'),
    ],
)
def test_errors_of_heads_that_do_not_exist(channels, arguments, message):
    logits, target = make(2, ('ce', False, channels))
    with pytest.raises(ValueError, match=message):
        error_correlation(logits, target, **arguments)


def random_correlation(count, seed=0, rows=50):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.randn(count, rows, generator=generator, dtype=torch.float64)
    return errors @ errors.T


@pytest.mark.parametrize('count', [1, 2, 3, 8])
def test_general_weights_equal_the_inverse(count):
    for seed in range(5):
        matrix = random_correlation(count, seed)
        weights, condition = general_weights(matrix, ridge=0.0)
        inverse = torch.linalg.inv(matrix)
        torch.testing.assert_close(weights.double(), inverse.sum(1) / inverse.sum())
        assert condition == pytest.approx(torch.linalg.cond(matrix).item(), rel=1e-6)
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_general_weights_have_the_least_expected_error():
    matrix = random_correlation(4)
    weights = general_weights(matrix)[0].double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        move = torch.randn(4, generator=generator, dtype=torch.float64) * 0.1
        other = weights + move - move.mean()  # sums to 1 too
        assert other @ matrix @ other > weights @ matrix @ weights


def test_general_weights_do_not_depend_on_the_scale_or_on_the_type():
    matrix = random_correlation(4)
    expected, condition = general_weights(matrix)
    for scale in (1e-12, 1e-3, 1e9):
        found, other = general_weights(scale * matrix)
        torch.testing.assert_close(found, expected)
        assert other == pytest.approx(condition, rel=1e-6)
    torch.testing.assert_close(general_weights(matrix.float())[0], expected, atol=1e-4, rtol=1e-4)


def test_correlated_errors_give_negative_weights():
    # (c - ab) / ... by hand: the inverse of [[1, 1.5], [1.5, 4]] is [[4, -1.5], [-1.5, 1]] / 1.75
    weights, _ = general_weights(torch.tensor([[1.0, 1.5], [1.5, 4.0]]), ridge=0.0)
    torch.testing.assert_close(weights, torch.tensor([1.25, -0.25]))


@pytest.mark.parametrize('count', [2, 3, 8])
def test_identical_networks_get_equal_weights_and_are_told(count):
    logits, target = make(1)
    sums, _ = error_correlation(logits.expand(count, -1, -1, -1), target)
    weights, condition = general_weights(sums)
    torch.testing.assert_close(weights, torch.full((count,), 1 / count))
    assert condition > 1e12
    assert general_weights(random_correlation(count))[1] < 1e3


def test_a_copy_shares_its_networks_weight():
    logits, target = make(2, size=(60,))
    pair = general_weights(error_correlation(logits, target)[0])[0]
    three, condition = general_weights(error_correlation(logits[[0, 1, 1]], target)[0])
    expected = torch.stack((pair[0], pair[1] / 2, pair[1] / 2))
    torch.testing.assert_close(three, expected, atol=1e-4, rtol=0)
    assert condition > 1e12


@pytest.mark.parametrize('rounding', [1e-16, 1e-12, 1e-9])
def test_general_weights_of_a_matrix_indefinite_by_rounding(rounding):
    common = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    for seed in range(20):
        noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
        matrix = torch.outer(common, common) + rounding * noise  # not even symmetric
        weights, condition = general_weights(matrix)
        torch.testing.assert_close(weights, torch.full((3,), 1 / 3), atol=0.02, rtol=0)
        assert condition > 1e8


def test_general_weights_take_the_symmetric_part():
    matrix = random_correlation(3)
    skew = torch.tensor([[0.0, 5, -3], [-5, 0, 2], [3, -2, 0]], dtype=torch.float64)
    torch.testing.assert_close(general_weights(matrix + skew), general_weights(matrix))


def test_a_ridge_draws_to_equal_weights():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    shares = [general_weights(matrix, ridge)[0][0].item() for ridge in (0.0, 0.1, 1.0, 1e6)]
    assert shares[0] == pytest.approx(0.75)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    'matrix',
    [
        torch.zeros(2, 2),
        torch.tensor([[1.0, NAN], [NAN, 1.0]]),
        torch.tensor([[math.inf, 0.0], [0.0, 1.0]]),
        -torch.eye(2),
    ],
)
def test_correlations_that_are_no_correlations(matrix):
    with pytest.raises(ValueError, match='`correlation` should be finite and its diagonal above 0'):
        general_weights(matrix)


@pytest.mark.parametrize('shape', [(), (2,), (2, 3), (0, 0), (2, 2, 2)])
def test_correlations_that_are_not_square(shape):
    with pytest.raises(ValueError, match=r'`correlation` should be \(N, N\)'):
        general_weights(torch.ones(shape))


@pytest.mark.parametrize('ridge', [-1e-9, NAN, math.inf])
def test_ridges_that_do_not_fit(ridge):
    with pytest.raises(ValueError, match='`ridge` should be a finite number >= 0'):
        general_weights(torch.eye(2), ridge)


def test_examples_in_the_docstrings():
    result = doctest.testmod(ensemble)
    assert result.attempted > 0
    assert result.failed == 0
