"""Logits of a detector's levels, as its convolutions left them, against one tensor of all units."""

import pytest
import torch

from tests.functional.passes import distil

C = 4
SIZES = ((3, 5), (2, 2), (1, 1))


def per_level(priors):
    return priors if isinstance(priors, tuple) else (priors,) * len(SIZES)


def levels(images, priors, seed, dtype=torch.float64, channels_last=False):
    generator = torch.Generator().manual_seed(seed)
    counts = per_level(priors)
    maps = [
        torch.randn(images, count * C, *size, generator=generator)
        for count, size in zip(counts, SIZES, strict=True)
    ]
    if channels_last:
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    return [x.to(dtype).requires_grad_(seed == 0) for x in maps]


def by_prior(maps):
    return tuple(x.unflatten(1, (-1, C)).flatten(3) for x in maps)


def in_one(maps):
    """``(B, C, N)``, counted as mmdet's heads do."""
    flat = [x.permute(0, 2, 3, 1).reshape(len(x), -1, C) for x in maps]
    return torch.cat(flat, 1).transpose(1, 2)


def setting(images=2, priors=3, **kwargs):
    student, teacher = (levels(images, priors, seed, **kwargs) for seed in (0, 1))
    count = sum(n * h * w for n, (h, w) in zip(per_level(priors), SIZES, strict=True))
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(0, C + 1, (images, count), generator=generator)
    target[torch.rand(images, count, generator=generator) < 0.2] = -1
    extras = torch.rand(2, images, count, generator=generator)
    simple = torch.rand(images, count, generator=generator) < 0.5
    options = dict(
        difference='bce',
        distance='bce',
        background=True,
        ignore_index=-1,
        keep_wins=True,
        student_extra=extras[0],
        teacher_extra=extras[1],
        split='unit',
        simple=simple,
        hard_weight=1.7,
    )
    return student, teacher, target, options


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(('images', 'priors'), [(1, 1), (2, 1), (1, 3), (3, 2), (2, (2, 3, 1))])
@pytest.mark.parametrize('units', [1, 2, 7, 16, 31, 10**6])
def test_levels_give_what_one_tensor_gives(images, priors, units, channels_last):
    student, teacher, target, options = setting(images, priors, channels_last=channels_last)
    found = distil(
        by_prior(student), by_prior(teacher), target, block_bytes=units * C * 8, **options
    )
    expected = distil(in_one(student), in_one(teacher), target, **options)
    assert torch.equal(found.wins, expected.wins)
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.simple_counts, expected.simple_counts)
    for name in ('distill_sum', 'distill_weight', 'distill_parts'):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    gradients = torch.autograd.grad(found.distill_sum * 3, student)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.distill_sum * 3, student))
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_selection_sees_every_unit_once():
    student, teacher, target, options = setting()
    seen = []
    options.update(selection=lambda block: seen.append(block.labels.target) or block.labels.valid)
    distil(by_prior(student), by_prior(teacher), target, block_bytes=200, **options)
    assert len(seen) > 5
    assert torch.equal(torch.cat(seen, 1).sort()[0], target.flatten()[None].sort()[0])


def test_half_precision_gives_gradients_of_its_type():
    student, teacher, target, options = setting(dtype=torch.bfloat16)
    distil(by_prior(student), by_prior(teacher), target, **options).distill_sum.backward()
    doubles = [x.detach().double().requires_grad_() for x in student]
    distil(
        by_prior(doubles), by_prior([x.double() for x in teacher]), target, **options
    ).distill_sum.backward()
    for half, double in zip(student, doubles, strict=True):
        assert half.grad.dtype == torch.bfloat16
        torch.testing.assert_close(half.grad.double(), double.grad, rtol=1e-2, atol=1e-2)


def test_a_level_without_gradient_gets_none():
    student, teacher, target, options = setting()
    student[1].requires_grad_(False)
    distil(by_prior(student), by_prior(teacher), target, **options).distill_sum.backward()
    assert student[1].grad is None
    assert student[0].grad.abs().sum() > 0


def test_a_second_backward_works_when_the_graph_is_kept():
    student, teacher, target, options = setting()
    total = distil(by_prior(student), by_prior(teacher), target, **options)
    first = torch.autograd.grad(total.distill_sum, student, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total.distill_sum, student), first)


def test_nothing_valid_gives_exact_zeros():
    student, teacher, target, options = setting()
    student[0].data.fill_(torch.nan)
    found = distil(by_prior(student), by_prior(teacher), torch.full_like(target, -1), **options)
    found.distill_sum.backward()
    assert found.distill_sum == 0
    assert all(level.grad.abs().sum() == 0 for level in student)


def break_shape(student, teacher, target):
    return student, teacher, target[:, 1:]


def break_type(student, teacher, target):
    return student, teacher, target.double()


def break_rank(student, teacher, target):
    return [x.flatten(1, 2) for x in student], teacher, target


def break_channels(student, teacher, target):
    return [student[0][:, :, 1:], *student[1:]], teacher, target


def break_levels(student, teacher, target):
    return student, teacher[1:], target


def break_floats(student, teacher, target):
    return [x.long() for x in student], teacher, target


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (break_shape, '`target` should hold integer class indices of shape'),
        (break_type, '`target` should hold integer class indices of shape'),
        (break_rank, 'Levels should be floating point logits'),
        (break_channels, 'Levels should be floating point logits'),
        (break_floats, 'Levels should be floating point logits'),
        (break_levels, 'should have the same levels'),
    ],
)
def test_what_does_not_fit_is_refused(spoil, message):
    student, teacher, target, options = setting()
    with pytest.raises(ValueError, match=message):
        distil(*spoil(by_prior(student), by_prior(teacher), target), **options)


def test_a_map_beside_levels_is_refused():
    student, _, target, options = setting()
    image = torch.zeros(len(target), C, target.shape[1])
    with pytest.raises(ValueError, match='`teacher` should be maps .* as `student` is. Found lev'):
        distil(image, by_prior(student), target, **options)


def test_a_split_by_the_logits_alone_is_refused():
    student, teacher, target, options = setting()
    options.update(simple=None, difference='ce', distance='kl', background=False)
    with pytest.raises(ValueError, match='needs `simple`'):
        distil(by_prior(student), by_prior(teacher), target % C, **options)
