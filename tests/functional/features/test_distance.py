import pytest
import torch

from mmdistill_ext.functional.features.distance import feature_distance


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 5, 3, 4, generator=generator).to(dtype) for _ in range(2))


def plain(student, teacher, distance):
    """Location by location, from the definition."""
    out = torch.zeros(2, 1, 3, 4, dtype=torch.float64)
    for b, h, w in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        s, t = student[b, :, h, w].double(), teacher[b, :, h, w].double()
        if distance == 'mse':
            out[b, 0, h, w] = sum((a - c) ** 2 for a, c in zip(s, t, strict=True)) / 5
        else:
            out[b, 0, h, w] = 1 - (s @ t) / (s @ s).sqrt() / (t @ t).sqrt()
    return out


@pytest.mark.parametrize('distance', ['mse', 'cosine'])
def test_it_is_the_definition(distance):
    student, teacher = make()
    found = feature_distance(student, teacher, distance)
    torch.testing.assert_close(found.double(), plain(student, teacher, distance))


def test_cosine_does_not_see_the_length():
    student, _ = make()
    found = feature_distance(student, 3 * student, 'cosine')
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-6, rtol=0)


@pytest.mark.parametrize('distance', ['mse', 'cosine'])
def test_vectors_of_zeros_give_finite_gradients(distance):
    student = torch.zeros(1, 3, 2, 2, requires_grad=True)
    feature_distance(student, torch.zeros(1, 3, 2, 2), distance).sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, 3)), r'one shape.*\(1, 2.*\(1, 3'),
        ((torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)), r'\(B, C, h, w\)'),
        ((torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), 'l7'), "`distance`.*'l7'"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        feature_distance(*arguments)
