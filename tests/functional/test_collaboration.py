import math

import pytest
import torch
import torch.nn.functional as F

from mmdistill_ext.functional import (
    BlockReader,
    Labels,
    Side,
    collaborate,
    error_correlation,
    linear,
    min_logit,
    min_loss,
    mix,
    networks_correlation,
    simplex_weights,
    unit_difference,
    unit_distillation,
)
from mmdistill_ext.functional.blocks.reader import CHUNK

NAN = float('nan')
SIZE = (6, 10)
MAPS = {
    'full': ([SIZE], [False]),
    'coarse': ([(3, 4), (2, 5)], [False, False]),
    'aligned': ([(3, 4), (2, 3)], [True, True]),
    'all kinds': ([(3, 5), SIZE, (13, 17)], [True, False, False]),
    'finer': ([(12, 20), (7, 9), (1, 1)], [False, True, False]),
}
LEVELS = [12, 6, 1]  # locations
WEIGHTS = torch.tensor([0.7, -0.4, 0.7])  # of any sign, of no given sum
COMBINE = {
    'min_loss': lambda x, y, **kind: min_loss(x, y, **kind),
    'linear': lambda x, y, **kind: linear(x, y, **kind),
    'min_logit': lambda x, y, **kind: min_logit(x, ignore_index=kind['ignore_index']),
    'mix': lambda x, y, **kind: mix(x, WEIGHTS[: len(x)]),
    'written': lambda x, y, **kind: x.softmax(0).square().mul(x).sum(0),  # by nobody but a user
}
SOFTMAX = dict(difference='ce', background=False)
DETECTOR = dict(difference='bce', background=True)


def read(logits, target, corners=None, ignore_index=255, background=False, block_bytes=None):
    """A reader of several networks."""
    corners = corners or [False] * len(logits)
    sides = [Side(x, corner) for x, corner in zip(logits, corners, strict=True)]
    return BlockReader(sides, Labels(target, ignore_index, background), block_bytes)


def random_labels(shape, count, ignored, generator):
    labels = torch.randint(0, count, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2] = ignored
    return labels


def make_maps(layout, count=2, channels=4, dtype=torch.float64, seed=0, images=2):
    """Logits of so many networks, labels, and each head's ``align_corners``."""
    sizes, corners = MAPS[layout]
    generator = torch.Generator().manual_seed(seed)
    chosen = [i % len(sizes) for i in range(count)]
    logits = [
        (2 * torch.randn(images, channels, *sizes[i], generator=generator)).to(dtype)
        for i in chosen
    ]
    target = random_labels((images, *SIZE), max(channels, 2), 255, generator)
    leaves = [x.requires_grad_() for x in logits]
    return leaves, target, [corners[i] for i in chosen]


def make_levels(count=2, channels=3, priors=2, dtype=torch.float64, background=True, images=3):
    generator = torch.Generator().manual_seed(1)
    logits = [
        [
            (2 * torch.randn(images, priors, channels, n, generator=generator))
            .to(dtype)
            .requires_grad_()
            for n in LEVELS
        ]
        for _ in range(count)
    ]
    units = (images, priors * sum(LEVELS))
    return logits, random_labels(units, channels + background, -1, generator)


def upsampled(logits, size, corners):
    """Every network's map at the labels' size, ``(N, B, C, H, W)``."""
    return torch.stack(
        [
            x
            if x.shape[2:] == size
            else F.interpolate(x, size, mode='bilinear', align_corners=corner)
            for x, corner in zip(logits, corners, strict=True)
        ]
    )


def flattened(logits):
    """Every network's levels in the order of the labels, ``(N, B, C, units)``."""
    return torch.stack(
        [torch.cat([x.permute(0, 2, 3, 1).flatten(2) for x in levels], 2) for levels in logits]
    )


def plain(units, target, combine, temperature, distance, kind):
    """The sums, composed of whole tensors."""
    mixture = combine(units, target, **kind)
    valid = target != kind['ignore_index']
    second = unit_difference(
        mixture, target, kind['difference'], kind['ignore_index'], kind['background']
    )
    pulls = [
        unit_distillation(x, mixture.detach(), distance, temperature)[valid].sum() for x in units
    ]
    return second[valid].sum(), pulls


def passed(networks, combine, kind, temperature=1.0, distance='kl', **options):
    """The same by the pass over blocks."""
    difference = kind['difference']
    found = collaborate(
        networks,
        lambda x, y, weights: combine(x, y, **kind),
        difference=difference,
        distance=distance,
        temperature=temperature,
        **options,
    )
    return found.second_sum, list(found.pull_sums), found.counts


def leaves_of(logits):
    return [x for group in logits for x in ([group] if torch.is_tensor(group) else group)]


def gradients(sums, logits):
    """Of each sum, with respect to each leaf; None where there is none."""
    leaves = leaves_of(logits)
    return [torch.autograd.grad(s, leaves, retain_graph=True, allow_unused=True) for s in sums]


def assert_same(found, expected, logits):
    """Sums and gradients of the second loss and of each pull."""
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)
    pairs = zip(gradients(found, logits), gradients(expected, logits), strict=True)
    for place, (own, other) in enumerate(pairs):
        for mine, its in zip(own, other, strict=True):
            if its is None or not its.any():  # a network that the sum does not depend on
                assert place == 0 or mine is None or not mine.any()
                continue
            assert mine.dtype == its.dtype
            torch.testing.assert_close(mine, its)


@pytest.mark.parametrize('block_bytes', [1, 5000, 2**30])
@pytest.mark.parametrize('layout', MAPS)
@pytest.mark.parametrize('combine', COMBINE)
def test_maps_equal_the_plain_composition(combine, layout, block_bytes):
    kind = dict(SOFTMAX, ignore_index=255)
    for count in (2, 3):
        logits, target, corners = make_maps(layout, count)
        networks = read(logits, target, corners, block_bytes=block_bytes)
        second, pulls, counts = passed(networks, COMBINE[combine], kind, temperature=3.0)
        units = upsampled(logits, SIZE, corners)
        expected = plain(units, target, COMBINE[combine], 3.0, 'kl', kind)
        assert_same([second, *pulls], [expected[0], *expected[1]], logits)
        assert counts.tolist() == target[target != 255].bincount(minlength=4).tolist()


@pytest.mark.parametrize('block_bytes', [1, 700, 2**30])
@pytest.mark.parametrize('head', ['bce', 'ce'])
@pytest.mark.parametrize('combine', COMBINE)
def test_levels_equal_the_plain_composition(combine, head, block_bytes):
    kind = dict(DETECTOR if head == 'bce' else SOFTMAX, ignore_index=-1)
    distance = 'bce' if head == 'bce' else 'kl'
    for count in (2, 3):
        logits, target = make_levels(count, background=kind['background'])
        networks = read(
            logits,
            target,
            ignore_index=-1,
            background=kind['background'],
            block_bytes=block_bytes,
        )
        second, pulls, counts = passed(networks, COMBINE[combine], kind, 2.0, distance)
        expected = plain(flattened(logits), target, COMBINE[combine], 2.0, distance, kind)
        assert_same([second, *pulls], [expected[0], *expected[1]], logits)
        labels = 3 + kind['background']
        assert counts.tolist() == target[target != -1].bincount(minlength=labels).tolist()


@pytest.mark.parametrize('combine', COMBINE)
def test_a_binary_head_has_one_channel(combine):
    kind = dict(difference='bce', background=False, ignore_index=255)
    logits, target, corners = make_maps('all kinds', 3, channels=1)
    networks = read(logits, target, corners, block_bytes=500)
    second, pulls, counts = passed(networks, COMBINE[combine], kind, distance='bce')
    units = upsampled(logits, SIZE, corners)
    expected = plain(units, target, COMBINE[combine], 1.0, 'bce', kind)
    assert_same([second, *pulls], [expected[0], *expected[1]], logits)
    assert counts.tolist() == target[target != 255].bincount(minlength=2).tolist()


@pytest.mark.parametrize('distance', ['kl', 'reverse_kl', 'mse'])
def test_units_without_a_shape_equal_the_plain_composition(distance):
    """(N, C) logits, as RoIs have them."""
    torch.manual_seed(0)
    logits = [torch.randn(30, 4).double().requires_grad_() for _ in range(2)]
    target = torch.randint(0, 4, (30,))
    target[:5] = 255
    kind = dict(SOFTMAX, ignore_index=255)
    for block_bytes in (1, 300, 2**20):
        networks = read(logits, target, block_bytes=block_bytes)
        second, pulls, _ = passed(networks, min_loss, kind, distance=distance)
        expected = plain(torch.stack(logits), target, min_loss, 1.0, distance, kind)
        assert_same([second, *pulls], [expected[0], *expected[1]], logits)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('levels', [False, True])
def test_gradients_have_the_type_of_their_logits(dtype, levels):
    kind = dict(DETECTOR, ignore_index=-1) if levels else dict(SOFTMAX, ignore_index=255)
    distance = 'bce' if levels else 'kl'
    if levels:
        logits, target = make_levels(dtype=dtype)
        corners, units = None, flattened([[x.float() for x in group] for group in logits])
    else:
        logits, target, corners = make_maps('coarse', dtype=dtype)
        units = upsampled([x.float() for x in logits], SIZE, corners)
    networks = read(
        logits, target, corners, kind['ignore_index'], kind['background'], block_bytes=999
    )
    second, pulls, _ = passed(networks, min_loss, kind, distance=distance)
    assert {x.dtype for x in (second, *pulls)} == {torch.float32}
    expected = plain(units, target, min_loss, 1.0, distance, kind)
    tolerance = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, expected[0], **tolerance)
    torch.testing.assert_close(pulls, expected[1], **tolerance)
    (found,), (other,) = gradients([second], logits), gradients([expected[0]], logits)
    assert {x.dtype for x in found} == {dtype}
    coarsest = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}[dtype]
    for own, its in zip(found, other, strict=True):
        torch.testing.assert_close(own, its, rtol=coarsest, atol=coarsest)


def test_networks_of_different_types_are_compared_in_the_wider():
    logits, target, corners = make_maps('coarse')
    logits = [logits[0].detach().float().requires_grad_(), logits[1]]
    second, pulls, _ = passed(
        read(logits, target, corners), min_loss, dict(SOFTMAX, ignore_index=255)
    )
    assert {x.dtype for x in (second, *pulls)} == {torch.float64}
    (found,) = gradients([second], logits)
    assert [x.dtype for x in found] == [torch.float32, torch.float64]


def test_nothing_is_narrowed_by_autocast():
    kind = dict(SOFTMAX, ignore_index=255)
    logits, target, corners = make_maps('coarse', dtype=torch.float32)
    networks = read(logits, target, corners)
    expected = passed(networks, min_loss, kind)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found = passed(networks, min_loss, kind)
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1], expected[1]))
    others = gradients([expected[0], *expected[1]], logits)
    for own, other in zip(gradients([found[0], *found[1]], logits), others, strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_a_pull_moves_its_own_network_alone():
    logits, target, corners = make_maps('all kinds', 3)
    networks = read(logits, target, corners, block_bytes=700)
    _, pulls, _ = passed(networks, COMBINE['mix'], dict(SOFTMAX, ignore_index=255))
    for place, found in enumerate(gradients(pulls, logits)):
        assert [x is not None and bool(x.any()) for x in found] == [i == place for i in range(3)]


def test_the_second_loss_differentiates_the_mixture_and_not_its_weights():
    """Were the weights differentiated, the gradient of a constant mixture would not be so."""
    logits, target, corners = make_maps('full', 2)
    kind = dict(SOFTMAX, ignore_index=255)
    second, _, _ = passed(read(logits, target, corners), linear, kind)
    (found,) = gradients([second], logits)
    units = torch.stack(logits)
    weights = simplex_weights(units, target).weights
    mixture = (units.detach() * weights.unsqueeze(2)).sum(0).requires_grad_()
    loss = F.cross_entropy(mixture, target, reduction='sum', ignore_index=255)
    (upstream,) = torch.autograd.grad(loss, mixture)
    for own, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(own, upstream * weight.unsqueeze(1))


def test_gradients_by_finite_differences():
    """Of weights that do not depend on the logits all is smooth."""
    logits, target, corners = make_maps('coarse', 2, images=1)
    kind = dict(SOFTMAX, ignore_index=255)

    def sums(*leaves):
        networks = read(leaves, target, corners, block_bytes=600)
        return passed(networks, COMBINE['mix'], kind)[0]

    assert torch.autograd.gradcheck(sums, logits)


@pytest.mark.parametrize('levels', [False, True])
@pytest.mark.parametrize('combine', COMBINE)
def test_bad_values_of_void_units_touch_nothing(combine, levels):
    kind = dict(DETECTOR, ignore_index=-1) if levels else dict(SOFTMAX, ignore_index=255)
    distance, corners = ('bce', None) if levels else ('kl', [False] * 2)
    for bad in (NAN, math.inf, -math.inf):
        logits, target = make_levels() if levels else make_maps('full')[:2]
        spoilt = []
        if levels:  # void units of each level, and the same without void units
            void = (target == -1).split([2 * n for n in LEVELS], 1)
            for group in logits:
                masks = [v.view(3, -1, 2).transpose(1, 2).unsqueeze(2) for v in void]
                pairs = zip(group, masks, strict=True)
                spoilt.append([x.detach().masked_fill(m, bad).requires_grad_() for x, m in pairs])
        else:
            void = (target == 255).unsqueeze(1)
            spoilt = [x.detach().masked_fill(void, bad).requires_grad_() for x in logits]
        arguments = target, corners, kind['ignore_index'], kind['background'], 700
        found = passed(read(spoilt, *arguments), COMBINE[combine], kind, distance=distance)
        expected = passed(read(logits, *arguments), COMBINE[combine], kind, distance=distance)
        torch.testing.assert_close(found[:2], expected[:2])
        assert torch.equal(found[2], expected[2])
        own = gradients([found[0], *found[1]], spoilt)
        for mine, its in zip(own, gradients([expected[0], *expected[1]], logits), strict=True):
            torch.testing.assert_close(mine, its)


@pytest.mark.parametrize('bad', [1.0, NAN])
@pytest.mark.parametrize('combine', COMBINE)
def test_without_a_valid_unit_all_is_exactly_0(combine, bad):
    kind = dict(SOFTMAX, ignore_index=255)
    logits, target, corners = make_maps('all kinds', 3)
    logits = [(x * bad).detach().requires_grad_() for x in logits]
    networks = read(logits, torch.full_like(target, 255), corners, block_bytes=400)
    second, pulls, counts = passed(networks, COMBINE[combine], kind)
    assert [x.item() for x in (second, *pulls)] == [0.0] * 4
    assert not counts.any()
    for found in gradients([second, *pulls], logits):
        assert all(x is None or not x.any() for x in found)


def test_a_bad_value_of_a_valid_unit_is_not_hidden():
    logits, target, corners = make_maps('full')
    target[0, 0, 0] = 1
    with torch.no_grad():
        logits[0][0, :, 0, 0] = NAN
    second, pulls, _ = passed(
        read(logits, target, corners), COMBINE['mix'], dict(SOFTMAX, ignore_index=255)
    )
    assert second.isnan()
    found = gradients([second, *pulls], logits)
    for gradient in (found[0][0], found[0][1], found[1][0]):
        assert gradient[0, :, 0, 0].isnan().all()
        assert gradient.isnan().sum() == gradient.shape[1]


def test_equal_networks_have_nothing_to_pull():
    logits, target, _ = make_maps('coarse', 1)
    logits = [logits[0], logits[0].detach().clone().requires_grad_()]
    second, pulls, _ = passed(read(logits, target), linear, dict(SOFTMAX, ignore_index=255))
    units = upsampled(logits[:1], SIZE, [False])[0]
    loss = F.cross_entropy(units, target, ignore_index=255, reduction='sum')
    torch.testing.assert_close(second, loss)
    torch.testing.assert_close(torch.stack(pulls), torch.zeros(2).double(), atol=1e-9, rtol=0)
    for found in gradients(pulls, logits):
        assert all(x is None or x.abs().max() < 1e-9 for x in found)


@pytest.mark.parametrize(('second', 'pull'), [(False, True), (True, False), (False, False)])
def test_what_is_not_wanted_costs_nothing(second, pull):
    logits, target, corners = make_maps('coarse')
    networks = read(logits, target, corners, block_bytes=700)
    kind = dict(SOFTMAX, ignore_index=255)
    everything = passed(networks, linear, kind)
    found = passed(networks, linear, kind, second=second, pull=pull)
    torch.testing.assert_close(found[0], everything[0])  # the value is formed all the same
    assert torch.equal(found[2], everything[2])
    both = zip(found[1], everything[1], strict=True)
    assert all(own == (other if pull else 0) for own, other in both)
    own = gradients([found[0], *found[1]], logits)
    expected = gradients([everything[0], *everything[1]], logits)
    wanted = [second, pull, pull]
    for mine, its, want in zip(own, expected, wanted, strict=True):
        for a, b in zip(mine, its, strict=True):
            if want and b is not None:
                torch.testing.assert_close(a, b)
            else:
                assert a is None or not a.any()


@pytest.mark.parametrize('layout', ['full', 'coarse'])
def test_memory_order_of_the_logits_does_not_matter(layout):
    kind = dict(SOFTMAX, ignore_index=255)
    logits, target, corners = make_maps(layout)
    other = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in logits]
    strided = []
    for x in logits:
        room = torch.full((*x.shape[:3], 2 * x.shape[3]), NAN).double()
        room[..., ::2] = x.detach()
        strided.append(room[..., ::2].requires_grad_())
    expected = passed(read(logits, target, corners, block_bytes=700), linear, kind)
    transposed = target.transpose(1, 2).contiguous().transpose(1, 2)
    for same in (other, strided):
        assert not same[0].is_contiguous()
        found = passed(read(same, transposed, corners, block_bytes=700), linear, kind)
        torch.testing.assert_close(found[:2], expected[:2])
        own = gradients([found[0], *found[1]], same)
        for mine, its in zip(own, gradients([expected[0], *expected[1]], logits), strict=True):
            torch.testing.assert_close(mine, its)


def test_the_graph_can_be_kept_and_only_then_be_used_again():
    logits, target, corners = make_maps('coarse')
    second, pulls, _ = passed(
        read(logits, target, corners), min_loss, dict(SOFTMAX, ignore_index=255)
    )
    total = 2 * second + 3 * pulls[0] + 5 * pulls[1]
    first = torch.autograd.grad(total, logits, retain_graph=True)
    again = torch.autograd.grad(total, logits)
    assert all(map(torch.equal, first, again))
    parts = passed(read(logits, target, corners), min_loss, dict(SOFTMAX, ignore_index=255))
    parts = gradients([parts[0], *parts[1]], logits)
    for place, found in enumerate(first):
        expected = 2 * parts[0][place] + (3, 5)[place] * parts[1 + place][place]
        torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match='retain_graph=True'):
        torch.autograd.grad(total, logits)


def test_sums_can_be_normalised_in_place():
    kind = dict(SOFTMAX, ignore_index=255)
    logits, target, corners = make_maps('coarse')
    second, pulls, counts = passed(read(logits, target, corners), min_loss, kind)
    (expected,) = gradients([second], logits)
    second /= counts.sum()
    pulls[0] *= 0
    (found,) = gradients([second + pulls[0]], logits)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other / counts.sum())


def test_no_gradients_where_none_are_wanted():
    kind = dict(SOFTMAX, ignore_index=255)
    logits, target, corners = make_maps('coarse')
    expected = passed(read(logits, target, corners), linear, kind)
    with torch.no_grad():
        found = passed(read(logits, target, corners), linear, kind)
    constant = passed(read([x.detach() for x in logits], target, corners), linear, kind)
    for other in (found, constant):
        assert not any(x.requires_grad for x in (other[0], *other[1]))
        torch.testing.assert_close(other[:2], expected[:2])


def test_a_constant_network_takes_part_without_gradient():
    logits, target, corners = make_maps('coarse')
    half = [logits[0], logits[1].detach()]
    second, pulls, _ = passed(read(half, target, corners), linear, dict(SOFTMAX, ignore_index=255))
    expected = passed(read(logits, target, corners), linear, dict(SOFTMAX, ignore_index=255))
    own = torch.autograd.grad(second + sum(pulls), logits[0])
    other = torch.autograd.grad(expected[0] + sum(expected[1]), logits)
    torch.testing.assert_close(own[0], other[0])


def test_the_second_loss_of_linear_is_below_every_networks_own():
    logits, target, corners = make_maps('coarse', 2)
    own = [
        F.cross_entropy(x, target, ignore_index=255, reduction='sum')
        for x in upsampled(logits, SIZE, corners)
    ]
    second, _, _ = passed(read(logits, target, corners), linear, dict(SOFTMAX, ignore_index=255))
    best, _, _ = passed(read(logits, target, corners), min_loss, dict(SOFTMAX, ignore_index=255))
    assert second < best < min(own)


# -- weights of whole images


def image_pass(networks, weigh, **options):
    return collaborate(networks, lambda x, y, w: mix(x, w), weigh_image=weigh, **options)


@pytest.mark.parametrize('block_bytes', [1, 700, 2**30])
def test_images_of_maps_are_weighed_once_each(block_bytes):
    logits, target, corners = make_maps('all kinds', 3)
    units = upsampled(logits, SIZE, corners)
    seen, given = [], torch.tensor([[0.2, 0.9], [-1.0, 0.5], [0.3, 0.1]]).double()

    def weigh(x, y):
        seen.append((x, y))
        return given[:, len(seen) - 1]

    networks = read(logits, target, corners, block_bytes=block_bytes)
    found = image_pass(networks, weigh)
    assert len(seen) == 2
    for image, (x, y) in enumerate(seen):
        assert not x.requires_grad
        torch.testing.assert_close(x, units[:, image : image + 1].detach().flatten(3))
        assert torch.equal(y, target[image : image + 1].flatten(1))
    kind = dict(SOFTMAX, ignore_index=255)
    expected = plain(units, target, lambda x, y, **_: mix(x, given), 1.0, 'kl', kind)
    sums = [found.second_sum, *found.pull_sums], [expected[0], *expected[1]]
    assert_same(*sums, logits)


@pytest.mark.parametrize('block_bytes', [1, 300, 2**30])
def test_images_of_levels_are_weighed_once_each(block_bytes):
    logits, target = make_levels(2)
    units, images = flattened(logits), 3
    order = [  # by level, prior, location
        start + location * 2 + prior
        for n, start in zip(LEVELS, (0, 24, 36), strict=True)
        for prior in range(2)
        for location in range(n)
    ]
    seen, given = [], torch.tensor([[0.2, 0.9, 2.0], [-1.0, 0.5, 0.0]]).double()

    def weigh(x, y):
        seen.append((x, y))
        return given[:, len(seen) - 1]

    networks = read(logits, target, None, -1, True, block_bytes)
    found = image_pass(networks, weigh, difference='bce', distance='bce')
    assert len(seen) == images
    for image, (x, y) in enumerate(seen):
        torch.testing.assert_close(x[:, 0], units[:, image][..., order].detach())
        assert torch.equal(y[0], target[image][order])
    kind = dict(DETECTOR, ignore_index=-1)
    expected = plain(units, target, lambda x, y, **_: mix(x, given), 1.0, 'bce', kind)
    sums = [found.second_sum, *found.pull_sums], [expected[0], *expected[1]]
    assert_same(*sums, logits)


def test_units_without_images_are_one_image():
    torch.manual_seed(0)
    logits = [torch.randn(30, 4).double().requires_grad_() for _ in range(2)]
    target = torch.randint(0, 4, (30,))
    seen = []

    def weigh(x, y):
        seen.append((x.shape, y.shape))
        return torch.tensor([0.25, 0.75])

    found = image_pass(read(logits, target, block_bytes=300), weigh)
    assert seen == [((2, 1, 4, 30), (1, 30))]
    kind = dict(SOFTMAX, ignore_index=255)
    mean = torch.tensor([0.25, 0.75])
    expected = plain(torch.stack(logits), target, lambda x, y, **_: mix(x, mean), 1.0, 'kl', kind)
    assert_same([found.second_sum, *found.pull_sums], [expected[0], *expected[1]], logits)


def numbered(shape):
    """Logits of one class that are the units' numbers."""
    return torch.arange(math.prod(shape)).view(shape).double()


@pytest.mark.parametrize('limit', [512, 1000, 4096])
@pytest.mark.parametrize('shape', [(64, 256), (96, 512), (33, 1000), (5000,), (128, 128)])
def test_the_units_of_a_large_image_are_spread_over_it(shape, limit):
    labels = numbered(shape).long()[None]
    networks = read([numbered(shape)[None, None].expand(1, 2, *shape)] * 2, labels)
    x, y = networks.read_image(0, limit)
    assert torch.equal(x[1, 0, 0], y[0].double())
    assert y.unique().numel() == y.numel() <= limit + CHUNK
    total = math.prod(shape)
    assert y.numel() > min(limit, total) / 3
    # No stretch of the image, nor part of its width, is left out.
    fifths = (y[0] * 5 // total).bincount(minlength=5)
    assert fifths.max() - fifths.min() <= 2 * CHUNK
    if len(shape) == 2 and y.numel() > 4 * shape[1]:
        columns = (y[0] % shape[1] * 4 // shape[1]).bincount(minlength=4)
        assert columns.min() > 0.1 * columns.sum()


def test_a_large_image_of_coarse_maps_is_read_by_whole_rows():
    torch.manual_seed(0)
    size = (100, 70)
    logits = [torch.randn(2, 3, 9, 11).double(), torch.randn(2, 3, *size).double()]
    labels = numbered((2, *size)).long()
    networks = read(logits, labels, [True, False])
    x, y = networks.read_image(1, 1500)
    full = upsampled(logits, size, [True, False])[:, 1].flatten(2)
    places = y[0] - 7000
    assert 700 <= len(places) <= 1500
    torch.testing.assert_close(x[:, 0], full[..., places])
    rows = places.view(-1, 70) // 70
    assert (rows == rows[:, :1]).all()
    assert rows.min() < 20
    assert rows.max() >= 80
    everything, _ = networks.read_image(1, 7000)
    torch.testing.assert_close(everything[:, 0], full)


def test_large_levels_give_units_of_every_level_of_their_image():
    images, priors, sizes = 2, 3, (3000, 700, 100, 4)
    logits = [[torch.zeros(images, priors, 1, n) for n in sizes]] * 2
    units = priors * sum(sizes)
    labels = numbered((images, units)).long()
    networks = read(logits, labels, ignore_index=-1, background=True)
    _, y = networks.read_image(1, 2048)
    found = y[0] - units
    assert found.min() >= 0
    assert found.unique().numel() == found.numel() <= 2048 + len(sizes) * CHUNK
    bounds = torch.tensor([priors * n for n in sizes]).cumsum(0)
    level = torch.bucketize(found, bounds, right=True).bincount(minlength=4)
    assert (level > 0).all()
    assert level[0] >= 3 * level[1] >= 3 * level[3]


def test_weights_of_a_large_image_are_near_those_of_all_its_units():
    """The policy sees a part; the loss is of the whole."""
    torch.manual_seed(0)
    target = torch.randint(0, 3, (1, 200, 256))
    better = F.one_hot(target, 3).movedim(-1, 1).double()
    logits = [torch.randn(1, 3, 200, 256).double() + scale * better for scale in (0.5, 1.5)]
    networks = read(logits, target)
    x, y = networks.read_image(0)
    assert x.shape[-1] < 200 * 256
    some = simplex_weights(x, y, per='image').weights
    every = simplex_weights(torch.stack(logits), target, per='image').weights
    torch.testing.assert_close(some, every, atol=0.03, rtol=0)


# -- correlation


@pytest.mark.parametrize('block_bytes', [1, 700, 2**30])
def test_correlation_equals_that_of_everything(block_bytes):
    logits, target, corners = make_maps('all kinds', 3)
    networks = read(logits, target, corners, block_bytes=block_bytes)
    found = networks_correlation(networks)
    expected = error_correlation(upsampled(logits, SIZE, corners), target)
    torch.testing.assert_close(found, expected)
    assert not found[0].requires_grad
    logits, target = make_levels(3)
    networks = read(logits, target, None, -1, True, block_bytes)
    found = networks_correlation(networks, 'bce')
    kind = dict(difference='bce', background=True, ignore_index=-1)
    torch.testing.assert_close(found, error_correlation(flattened(logits), target, **kind))


# -- errors


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(difference='l2'), "`difference` should be one of ce, bce. Found difference='l2'"),
        (dict(distance='l2'), '`distance` should be one of kl'),
        (dict(temperature=0.0), '`temperature` should be a finite number > 0'),
    ],
)
def test_kinds_that_do_not_exist(change, message):
    logits, target, corners = make_maps('coarse')
    with pytest.raises(ValueError, match=message):
        image_pass(read(logits, target, corners), lambda x, y: x.new_ones(2), **change)


def test_losses_that_a_head_cannot_have():
    logits, target, corners = make_maps('coarse', channels=1)
    for arguments, message in [
        (dict(difference='ce'), '`difference=.ce.` is 0 everywhere'),
        (dict(difference='bce', distance='kl'), '`distance=.kl.` is 0 everywhere'),
    ]:
        with pytest.raises(ValueError, match=message):
            image_pass(read(logits, target, corners), None, **arguments)
    with pytest.raises(ValueError, match="`background=True` needs difference='bce'"):
        image_pass(read(logits, target, corners, background=True), None, difference='ce')


def test_networks_that_do_not_fit():
    logits, target, corners = make_maps('coarse')
    levels, labels = make_levels()
    fewer = [x[..., :-1] for x in levels[1]]
    for arguments, message in [
        (([], target), 'at least one network. Found none'),
        (([logits[0], logits[1][:, :2]], target), 'number of classes'),
        (([logits[0], logits[1][:1]], target), r'should have the shape \(B, ...\)'),
        ((logits, target.float()), 'integer class indices. Found torch.float32'),
        ((logits, target[0]), r'should have the shape \(B, ...\)'),
        (([x.flatten(2) for x in logits], target.flatten(1)), 'Only maps'),
        (([levels[0], fewer], labels), 'the same levels'),
        ((levels, labels[:, 1:]), 'integer class indices of shape'),
        (([levels[0], levels[1][:2]], labels), 'the same levels'),
    ]:
        with pytest.raises(ValueError, match=message):
            read(*arguments)
    with pytest.raises(ValueError, match='shorter'):
        read(logits, target, corners[:1])
