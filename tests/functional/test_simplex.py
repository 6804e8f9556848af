import doctest
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmdistill_ext.functional import simplex, simplex_weights

# difference, background, channels
HEADS = [
    ('ce', False, 2),
    ('ce', False, 7),
    ('ce', False, 30),
    ('bce', False, 1),
    ('bce', False, 6),
    ('bce', True, 1),
    ('bce', True, 6),
]
FEW = [HEADS[1], HEADS[3], HEADS[6]]  # one of each kind
PER = ['unit', 'image']


def make(count, head, scale=1.0, images=2, units=9, seed=0, dtype=torch.float64, ignored=0.2):
    """Networks that agree in part, as trained ones do."""
    _, background, channels = head
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(images, channels, units, generator=generator, dtype=torch.float64)
    own = torch.randn(count, *common.shape, generator=generator, dtype=torch.float64)
    labels = channels + 1 if background else max(channels, 2)
    target = torch.randint(0, labels, (images, units), generator=generator)
    target[torch.rand(images, units, generator=generator) < ignored] = 255
    return ((common + own) * scale).to(dtype), target


def solve(logits, target, head, **kwargs):
    """As the function, but weights always (N, B, U or 1) and the gap (B, U or 1)."""
    found = simplex_weights(logits, target, difference=head[0], background=head[1], **kwargs)
    if kwargs.get('per') == 'image':
        return found.weights.unsqueeze(-1), found.gap.unsqueeze(-1)
    return found


def plain_loss(logits, target, head):
    """Minus the logarithm of the label's probability: (B, C, U) to (B, U)."""
    difference, background, channels = head
    binary = channels == 1 and not background
    classes = torch.arange(channels).view(-1, 1) + binary
    at_class = target.unsqueeze(1) == classes
    if difference == 'ce':
        loss = logits.logsumexp(1) - logits.where(at_class, 0).sum(1)
    else:
        loss = torch.logaddexp(logits.where(~at_class, -logits), torch.zeros(())).sum(1)
    return loss.where(target != 255, 0)


def objective(weights, logits, target, head, per):
    """What is minimised, in float64: (B, U) or (B, 1)."""
    mixture = (weights.double().unsqueeze(2) * logits.double()).sum(0)
    loss = plain_loss(mixture, target, head)
    if per == 'unit':
        return loss
    return loss.sum(1, keepdim=True) / (target != 255).sum(1, keepdim=True).clamp(min=1)


def autograd_gap(weights, logits, target, head, per):
    """Frank-Wolfe gap by autograd in float64: at least the excess of a convex loss."""
    weights = weights.double().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(weights, logits, target, head, per).sum(), weights)
    return ((weights * gradient).sum(0) - gradient.amin(0)).detach()


def search_edge(logits, target, head, per):
    """Least loss of two networks: golden section of a convex function, all units at once."""
    ratio = (5**0.5 - 1) / 2
    units = logits.shape[-1] if per == 'unit' else 1
    low = torch.zeros(logits.shape[1], units, dtype=torch.float64)
    high = torch.ones_like(low)

    def at(share):
        return objective(torch.stack((share, 1 - share)), logits, target, head, per)

    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        lower = at(left) < at(right)
        low, high = low.where(lower, left), right.where(lower, high)
    ends = torch.stack([at(x) for x in ((low + high) / 2, torch.zeros_like(low), low * 0 + 1)])
    return ends.amin(0)


def project(point):
    """Nearest point of the simplex along the first axis, by sorting."""
    ordered = point.sort(0, descending=True).values
    rank = torch.arange(1, len(point) + 1).view(-1, 1, 1)
    level = (ordered.cumsum(0) - 1) / rank
    count = (ordered > level).sum(0, keepdim=True)
    return (point - level.gather(0, count - 1)).clamp(min=0)


def descend(logits, target, head, per, steps=400):
    """Least loss by accelerated projected gradient with the Hessian's bound as step, float64."""
    count, images, _, units = logits.shape
    away = (logits - logits.mean(0)).square().sum((0, 2))
    bound = (
        away
        if per == 'unit'
        else away.sum(1, keepdim=True) / (target != 255).sum(1, keepdim=True).clamp(min=1)
    )
    weights = logits.new_full((count, images, units if per == 'unit' else 1), 1 / count)
    ahead, momentum = weights, 1.0
    least = objective(weights, logits, target, head, per)
    for _ in range(steps):
        point = ahead.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(point, logits, target, head, per).sum(), point)
        moved = project(ahead - gradient / bound.clamp(min=1e-12))
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = moved + (momentum - 1) / following * (moved - weights)
        weights, momentum = moved, following
        least = torch.minimum(least, objective(weights, logits, target, head, per))
    return least


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('scale', [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize('head', HEADS)
def test_two_networks_equal_a_search(head, scale, per):
    logits, target = make(2, head, scale, units=40)
    weights, gap = solve(logits, target, head, per=per)
    excess = objective(weights, logits, target, head, per) - search_edge(logits, target, head, per)
    rounding = 1e-11 * scale
    assert (excess <= gap + rounding).all()
    assert (excess.abs() <= 1e-6 * scale).all()


def bisect(logits, target, head, per, steps=80):
    """The first network's weight where the loss's slope changes sign, by autograd in float64."""
    low = torch.zeros(logits.shape[1], logits.shape[-1] if per == 'unit' else 1).double()
    high = torch.ones_like(low)
    for step in range(steps + 2):  # the ends first: the slope's sign may not change
        share = torch.full_like(low, step) if step < 2 else (low + high) / 2
        share.requires_grad_()
        loss = objective(torch.stack((share, 1 - share)), logits, target, head, per)
        (slope,) = torch.autograd.grad(loss.sum(), share)
        share = share.detach()
        if step < 2:
            at_end = slope >= 0 if step == 0 else slope <= 0
            low, high = (x.where(~at_end, share) for x in (low, high))
        else:
            low, high = share.where(slope < 0, low), share.where(slope >= 0, high)
    return (low + high) / 2


@settings(max_examples=60)
@given(
    head=st.sampled_from(HEADS),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 5.0, 30.0, 300.0]),
    per=st.sampled_from(PER),
    seed=st.integers(0, 999),
)
def test_two_networks_equal_a_bisection(head, scale, per, seed):
    logits, target = make(2, head, scale, units=60, seed=seed)
    weights, gap = solve(logits, target, head, per=per)
    share = bisect(logits, target, head, per)
    least = objective(torch.stack((share, 1 - share)), logits, target, head, per)
    excess = objective(weights, logits, target, head, per) - least
    assert (gap >= 0).all()
    assert gap.max() <= 1e-6 * scale
    assert (excess <= gap + 1e-11 * scale).all()
    assert (excess >= -1e-11 * scale).all()  # nor is the reference the worse one
    corner = ((share == 0) | (share == 1)) & (gap == 0)
    off_middle = corner & (weights[0] != 0.5)  # where no other is better by more than rounding
    assert torch.equal(weights[0][off_middle], share[off_middle])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('scale', [0.1, 3.0, 30.0, 300.0])
@pytest.mark.parametrize('head', HEADS)
def test_two_networks_are_no_worse_than_a_dense_grid(head, scale, dtype):
    logits, target = make(2, head, scale, units=50, dtype=dtype)
    for iterations in (10, 20):
        weights, _ = solve(logits, target, head, iterations=iterations)
        found = objective(weights, logits, target, head, 'unit')
        for share in torch.linspace(0, 1, 301, dtype=torch.float64):
            mixed = torch.stack((share, 1 - share)).view(2, 1, 1).expand_as(weights)
            other = objective(mixed, logits, target, head, 'unit')
            rounding = 20 * torch.finfo(dtype).eps * logits.abs().max()
            assert (found <= other + max(rounding, 1e-9 * scale)).all()


def test_the_best_of_two_networks_gets_exactly_all():
    logits = torch.tensor([[0.0, 3.0], [0.0, -1.0], [0.0, 3.0]]).view(3, 1, 2, 1)
    for pair, best in ((logits[:2], [0.0, 1.0]), (logits[1:], [1.0, 0.0])):
        found = simplex_weights(pair, torch.tensor([[0]]), iterations=1)
        assert found.weights.squeeze().tolist() == best
        assert found.gap == 0


def test_ten_steps_of_two_networks_are_enough():
    for scale, tolerance in ((1.0, 1e-7), (5.0, 1e-6), (30.0, 1e-5), (100.0, 1e-4)):
        for seed, head in enumerate(HEADS):
            logits, target = make(2, head, scale, units=2000, seed=seed)
            assert solve(logits, target, head, iterations=10)[1].max() <= tolerance * scale


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('count', [3, 8])
@pytest.mark.parametrize('head', FEW)
def test_more_networks_equal_a_projected_gradient(head, count, per):
    logits, target = make(count, head, 2.0, seed=count)
    weights, gap = solve(logits, target, head, per=per)
    excess = objective(weights, logits, target, head, per) - descend(logits, target, head, per)
    assert (excess <= gap + 1e-12).all()
    assert (excess.abs() <= 1e-3).all()  # the gradient method is the less exact one
    assert (excess <= 1e-8).all()


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('scale', [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize('count', [2, 3, 5, 8])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_gap_is_that_of_autograd_and_small(dtype, count, scale, per):
    tolerance = (1e-5 if dtype == torch.float32 else 1e-6) * scale  # of the logits' unit
    for seed, head in enumerate(HEADS):
        logits, target = make(count, head, scale, units=40, seed=seed, dtype=dtype)
        weights, gap = solve(logits, target, head, per=per)
        assert weights.dtype == gap.dtype == dtype
        assert not weights.requires_grad
        assert not gap.requires_grad
        expected = autograd_gap(weights, logits, target, head, per)
        assert (gap - expected).abs().max() <= tolerance
        assert -1e-6 * scale <= expected.min()
        assert expected.max() <= tolerance
        assert weights.min() >= 0
        torch.testing.assert_close(weights.sum(0), torch.ones_like(gap))


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('scale', [1e-3, 300.0, 1000.0])
@pytest.mark.parametrize('head', FEW)
def test_extreme_logits_take_more_steps_and_say_so(head, scale, per):
    for count in (2, 5, 8):
        logits, target = make(count, head, scale, units=40)
        weights, gap = solve(logits, target, head, per=per)
        expected = autograd_gap(weights, logits, target, head, per)
        torch.testing.assert_close(gap, expected, rtol=1e-6, atol=1e-9 * scale)
        assert weights.min() >= 0
        _, gap = solve(logits, target, head, per=per, iterations=80)
        assert gap.max() <= 1e-6 * scale


@settings(max_examples=40)
@given(
    count=st.integers(1, 8),
    head=st.sampled_from(HEADS),
    scale=st.sampled_from([0.0, 1e-6, 0.1, 3.0, 1e3, 1e6]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    per=st.sampled_from(PER),
    seed=st.integers(0, 99),
)
def test_weights_stay_on_the_simplex(count, head, scale, dtype, per, seed):
    logits, target = make(count, head, min(scale, 1e3), seed=seed, dtype=dtype)
    if dtype in (torch.float32, torch.float64):
        logits = logits * (scale / max(min(scale, 1e3), 1e-30))
    weights, gap = solve(logits, target, head, per=per)
    equal = torch.full_like(weights, 1 / count)
    assert weights.isfinite().all()
    assert gap.isfinite().all()
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(0), torch.ones_like(gap))
    # the search starts from equal weights and keeps the best
    before = autograd_gap(equal, logits, target, head, per)
    after = autograd_gap(weights, logits, target, head, per)
    assert (after <= before + 1e-5 * max(1.0, logits.abs().max().item())).all()


@pytest.mark.parametrize('scale', [0.1, 1.0, 3.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_of_two_classes_the_largest_margin_gets_it_all(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(4, 1, 50, generator=generator).argsort(0)
    margin = (ranks - 1) * scale  # networks at least one scale apart
    logits = torch.stack((margin, torch.zeros_like(margin)), 2).to(dtype)
    found = simplex_weights(logits, torch.zeros(1, 50, dtype=torch.long))
    torch.testing.assert_close(found.weights, (ranks == 3).to(dtype), atol=1e-4, rtol=0)


def test_known_inner_weights():
    # margins over the two other classes (a, -a) and (-2a, 2a): w a - 2 (1 - w) a = 0 at w = 2/3
    logits = torch.tensor([[0.0, 1.5, -1.5], [0.0, -3.0, 3.0]]).view(2, 1, 3, 1)
    found = simplex_weights(logits, torch.tensor([[0]]))
    torch.testing.assert_close(found.weights.squeeze(), torch.tensor([2 / 3, 1 / 3]))
    # a sigmoid each: the second class's loss pulls the other way than the first's
    logits = torch.tensor([[4.0, 4.0], [-4.0, -4.0]]).view(2, 1, 2, 1)
    found = simplex_weights(logits, torch.tensor([[0]]), difference='bce')
    torch.testing.assert_close(found.weights.squeeze(), torch.tensor([0.5, 0.5]))


def test_binary_head_and_background_know_their_labels():
    for background, sure in ((False, 1), (True, 0)):  # the label that a high logit means
        logits = torch.tensor([3.0, -3.0]).view(2, 1, 1, 1)
        for label, best in ((sure, [1.0, 0.0]), (1 - sure, [0.0, 1.0])):
            found = simplex_weights(
                logits, torch.tensor([[label]]), difference='bce', background=background
            )
            torch.testing.assert_close(
                found.weights.squeeze(), torch.tensor(best), atol=1e-4, rtol=0
            )


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('head', HEADS)
def test_equal_networks_get_equal_weights(head, per):
    logits, target = make(1, head, 5.0, dtype=torch.float32)
    for count in (1, 2, 3, 8):
        weights, gap = solve(logits.expand(count, -1, -1, -1), target, head, per=per)
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / count))
        assert gap.abs().max() < 1e-5


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('count', [2, 4])
def test_flat_loss_has_equal_weights_and_no_gap(count, per):
    level = torch.randn(count, 2, 1, 9, generator=torch.Generator().manual_seed(0))
    logits = (100 * level).expand(count, 2, 5, 9)  # a softmax does not see them
    weights, gap = solve(logits, torch.zeros(2, 9, dtype=torch.long), ('ce', False, 5), per=per)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / count))
    assert gap.abs().max() < 1e-4


def test_levels_that_a_softmax_does_not_see_do_not_matter():
    head = ('ce', False, 7)
    logits, target = make(3, head, 3.0)
    level = torch.randn(3, 2, 1, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        solve(logits + 1000 * level, target, head), solve(logits, target, head), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize('copies', [1e-7, 1e-3])
def test_nearly_equal_networks_beside_another(copies):
    for seed, head in enumerate(HEADS):
        logits, target = make(2, head, 5.0, seed=seed, dtype=torch.float32)
        noise = torch.randn(logits[:1].shape, generator=torch.Generator().manual_seed(seed))
        logits = torch.cat((logits, logits[:1] + copies * noise, logits[:1]))
        weights, gap = solve(logits, target, head)
        assert weights.isfinite().all()
        assert gap.max() <= 1e-4
        assert autograd_gap(weights, logits, target, head, 'unit').max() <= 1e-4


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('head', FEW)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf'), 1e38])
@pytest.mark.parametrize('count', [2, 3])
def test_values_on_ignored_units_do_not_matter(count, value, head, per):
    logits, target = make(count, head, 2.0, dtype=torch.float32)
    ignored = (target == 255).unsqueeze(1)
    assert ignored.any()
    spoilt = logits.clone()
    spoilt[1] = spoilt[1].masked_fill(ignored, value)
    found, expected = (solve(x, target, head, per=per) for x in (spoilt, logits))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    if per == 'unit':
        at_ignored = expected[0].masked_select(ignored.squeeze(1))
        torch.testing.assert_close(at_ignored, torch.full_like(at_ignored, 1 / count))
        assert (expected[1][target == 255] == 0).all()


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('head', FEW)
@pytest.mark.parametrize('count', [2, 3])
def test_all_units_ignored(count, head, per):
    logits, target = make(count, head)
    target[1] = 255
    weights, gap = solve(logits, target, head, per=per)
    torch.testing.assert_close(weights[:, 1], torch.full_like(weights[:, 1], 1 / count))
    assert (gap[1] == 0).all()
    alone = solve(logits[:, :1], target[:1], head, per=per)[0]
    torch.testing.assert_close(weights[:, :1], alone)


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('head', FEW)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('count', [2, 3])
def test_a_bad_unit_gets_equal_weights_a_gap_of_nan_and_spoils_no_other(count, value, head, per):
    logits, target = make(count, head, 2.0, images=3, ignored=0, dtype=torch.float32)
    expected = solve(logits, target, head, per=per)
    logits[1, 1, 0, 4] = value
    weights, gap = solve(logits, target, head, per=per)
    bad = torch.zeros_like(gap, dtype=torch.bool)
    bad[1, 4 if per == 'unit' else 0] = True
    assert torch.equal(gap.isnan(), bad)
    torch.testing.assert_close(weights[:, bad], torch.full((count, 1), 1 / count))
    torch.testing.assert_close(weights[:, ~bad], expected[0][:, ~bad], atol=1e-6, rtol=0)


@pytest.mark.parametrize('head', FEW)
def test_image_weights_minimise_the_mean_over_valid_units(head):
    logits, target = make(3, head, 3.0)
    found = solve(logits, target, head, per='image')[0]
    valid = [target[b] != 255 for b in range(2)]
    for b in range(2):  # neither the ignored units nor how often all come counts
        alone = logits[:, b : b + 1, :, valid[b]].repeat(1, 1, 1, 3)
        labels = target[b : b + 1, valid[b]].repeat(1, 3)
        torch.testing.assert_close(
            solve(alone, labels, head, per='image')[0], found[:, b : b + 1], atol=1e-5, rtol=0
        )


def test_images_of_one_unit_are_units():
    head = ('ce', False, 7)
    logits, target = make(4, head, 3.0, images=6, units=1)
    torch.testing.assert_close(
        solve(logits, target, head, per='image')[0], solve(logits, target, head)[0]
    )


@pytest.mark.parametrize('per', PER)
def test_order_of_the_networks_does_not_matter(per):
    head, order = ('ce', False, 7), [2, 0, 3, 1]
    logits, target = make(4, head, 3.0)
    torch.testing.assert_close(
        solve(logits[order], target, head, per=per)[0],
        solve(logits, target, head, per=per)[0][order],
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize('head', FEW)
@pytest.mark.parametrize('count', [2, 3])
def test_units_do_not_see_each_other(count, head):
    logits, target = make(count, head, 3.0)
    together = solve(logits, target, head)[0]
    for unit in range(logits.shape[-1]):
        alone = solve(logits[..., unit : unit + 1], target[:, unit : unit + 1], head)[0]
        torch.testing.assert_close(together[..., unit : unit + 1], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('per', PER)
def test_half_precision_and_strides(per, dtype):
    head = ('ce', False, 7)
    logits, target = make(3, head, 3.0, dtype=dtype)
    expected = solve(logits.float(), target, head, per=per)
    assert expected[0].dtype == torch.float32
    strided = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    for variant in (logits, strided, logits.clone().requires_grad_()):
        found = solve(variant, target.T.contiguous().T, head, per=per)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32])
def test_integer_labels_of_any_type(dtype):
    head = ('ce', False, 7)
    logits, target = make(3, head)
    found, expected = solve(logits, target.to(dtype), head), solve(logits, target, head)
    assert torch.equal(found[0], expected[0])


def test_other_ignore_index():
    head = ('ce', False, 7)
    logits, target = make(3, head)
    moved = target.where(target != 255, -1)
    assert torch.equal(
        solve(logits, moved, head, ignore_index=-1)[0], solve(logits, target, head)[0]
    )


@pytest.mark.parametrize('size', [(), (5,), (3, 5), (2, 3, 5), (0,), (3, 0)])
@pytest.mark.parametrize('images', [0, 1, 2])
def test_shapes(images, size):
    logits = torch.randn(3, images, 4, *size)
    target = torch.zeros(images, *size, dtype=torch.long)
    found = simplex_weights(logits, target)
    assert found.weights.shape == (3, images, *size)
    assert found.gap.shape == (images, *size)
    found = simplex_weights(logits, target, per='image')
    assert found.weights.shape == (3, images)
    assert found.gap.shape == (images,)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('per', PER)
@pytest.mark.parametrize('head', FEW)
@pytest.mark.parametrize('networks', [2, 3])
def test_no_value_is_waited_for_and_no_unit_looped_over(networks, head, per):
    counts = []
    for units in (3, 30):
        logits, target = make(networks, head, units=units)
        with Operations() as operations:
            solve(logits, target, head, per=per, iterations=2)
        counts.append(operations.names)
    assert counts[0] == counts[1]
    waiting = ('_local_scalar_dense', 'nonzero', 'unique', 'masked_select', 'equal.default')
    assert not [name for name in counts[0] if any(word in name for word in waiting)]
    # tensors that have no values at all
    weights, gap = solve(logits.to('meta'), target.to('meta'), head, per=per, iterations=2)
    assert weights.is_meta
    assert gap.is_meta


@pytest.mark.parametrize(
    ('shape', 'size', 'kwargs', 'message'),
    [
        ((2, 3, 4), (3,), {'per': 'pixel'}, r"`per` should be one of unit, image.*'pixel'"),
        ((3, 4), (3,), {}, r'\(N, B, C, \.\.\.\).*\(3, 4\)'),
        ((0, 3, 4), (3,), {}, r'N >= 1.*\(0, 3, 4\)'),
        ((2, 3, 4, 5), (3, 6), {}, r'one label per unit.*\(3, 6\)'),
        ((2, 3, 4, 5), (2, 5), {}, r'`target` should have the shape.*\(2, 5\)'),
        ((2, 3, 0, 5), (3, 5), {}, r'C >= 1'),
        ((2, 3, 1, 5), (3, 5), {}, r'one channel'),
        ((2, 3, 4, 5), (3, 5), {'background': True}, r"needs difference='bce'"),
        ((2, 3, 4, 5), (3, 5), {'difference': 'kl'}, r"`difference` should be one of.*'kl'"),
    ],
)
def test_errors(shape, size, kwargs, message):
    with pytest.raises(ValueError, match=message):
        simplex_weights(torch.zeros(shape), torch.zeros(size, dtype=torch.long), **kwargs)


def test_types_that_do_not_fit():
    with pytest.raises(ValueError, match='floating point'):
        simplex_weights(torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match='integer class indices'):
        simplex_weights(torch.zeros(2, 3, 4), torch.zeros(3))


def test_example_in_the_docstring():
    result = doctest.testmod(simplex)
    assert result.attempted > 0
    assert result.failed == 0
