import math

import pytest
import torch

from mmdistill_ext.functional.features.cwd import channel_distillation

NEAR = dict(rtol=1e-5, atol=1e-6)


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))


def plain(student, teacher, temperature, weight=None):
    """Channel by channel in float64; a location of weight w stands there w times."""
    out = []
    for b in range(len(student)):
        total = 0.0
        for c in range(student.shape[1]):
            s, t = (x[b, c].flatten().double() / temperature for x in (student, teacher))
            if weight is not None:
                times = weight[b].flatten().long()
                s, t = s.repeat_interleave(times), t.repeat_interleave(times)
            p, q = (x.exp() / x.exp().sum() for x in (t, s))
            total += float((p * (p / q).log()).sum()) if len(p) else 0.0
        out.append(total * temperature**2 / student.shape[1])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_it_is_the_definition(temperature):
    student, teacher = make()
    found = channel_distillation(student, teacher, temperature)
    torch.testing.assert_close(found.double(), plain(student, teacher, temperature), **NEAR)


def test_weights_count_as_if_locations_were_there_so_many_times():
    (student, teacher), weight = make(), torch.randint(0, 4, (2, 1, 4, 5))
    found = channel_distillation(student, teacher, 2.0, weight)
    torch.testing.assert_close(found.double(), plain(student, teacher, 2.0, weight), **NEAR)


def test_locations_of_weight_0_are_left_out_whatever_is_in_them():
    (student, teacher), weight = make(), torch.ones(2, 1, 4, 5)
    weight[:, :, 2:] = 0
    expected = channel_distillation(student[:, :, :2], teacher[:, :, :2])
    student[:, :, 2:] = torch.inf
    teacher[:, :, 2:] = torch.nan
    student.requires_grad_()
    found = channel_distillation(student, teacher, 4.0, weight)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert not student.grad[:, :, 2:].any()
    assert torch.isfinite(student.grad).all()


def test_an_image_without_a_location_is_exactly_0():
    (student, teacher), weight = make(), torch.ones(2, 1, 4, 5)
    weight[1] = 0
    student.requires_grad_()
    found = channel_distillation(student, teacher, 4.0, weight)
    assert found[1] == 0
    assert found[0] > 0
    found.sum().backward()
    assert not student.grad[1].any()


def test_a_shift_of_a_channel_changes_nothing():
    student, _ = make()
    found = channel_distillation(student, student + torch.randn(2, 3, 1, 1))
    torch.testing.assert_close(found, torch.zeros(2), atol=1e-5, rtol=0)


def test_it_does_not_grow_with_the_image():
    student, teacher = make()
    large = channel_distillation(student.repeat(1, 1, 3, 3), teacher.repeat(1, 1, 3, 3))
    torch.testing.assert_close(large, channel_distillation(student, teacher))


def test_golden_value_of_two_locations():
    student = torch.tensor([0.0, 0.0]).view(1, 1, 1, 2)
    teacher = torch.tensor([math.log(3.0), 0.0]).view(1, 1, 1, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = channel_distillation(student, teacher, 1.0)
    torch.testing.assert_close(found, torch.tensor([expected]))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(temperature=0), '`temperature`.*0'),
        (dict(weight=torch.ones(2, 4, 5)), r'`weight`.*\(2, 1, 4, 5\).*\(2, 4, 5\)'),
        (dict(teacher=torch.zeros(2, 3, 4, 4)), 'one shape'),
    ],
)
def test_mistakes_are_named(change, message):
    student, teacher = make()
    with pytest.raises(ValueError, match=message):
        channel_distillation(**{**dict(student=student, teacher=teacher), **change})
