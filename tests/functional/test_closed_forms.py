import pytest
import torch

from mmdistill_ext.functional import KL, MSE, Labels, ReverseKL
from mmdistill_ext.functional.blocks.closed_forms import (
    Prediction,
    difference_with_gradient,
    distance_with_gradient,
)
from mmdistill_ext.functional.blocks.weighted_sum import gradient_of_units
from mmdistill_ext.functional.logits.differences import DIFFERENCES

NAN = float('nan')
DISTANCES = [KL(), KL(3.0), KL(2.0, standardize=True), ReverseKL(2.0), MSE()]


def make(bad, channels=5, units=40):
    """Logits of two networks and labels; the first of some units, ignored or not, are bad."""
    generator = torch.Generator().manual_seed(0)
    first, second = 3 * torch.randn(2, 1, channels, units, generator=generator).double()
    target = torch.randint(0, channels, (1, units), generator=generator)
    target[0, :8] = 255
    first[0, 1, 4:12] = bad
    return first, second, Labels(target)


def assert_equals_autograd(found, loss, logits, labels):
    """Units that count and the gradient of all units; NaN at the same places."""
    units, gradient = found
    counted = labels.valid.double()
    leaf = logits.clone().requires_grad_()
    expected = loss(leaf)
    torch.testing.assert_close(units[labels.valid], expected[labels.valid].detach(), equal_nan=True)
    torch.testing.assert_close(gradient, gradient_of_units(expected, leaf, counted), equal_nan=True)
    assert not gradient[..., :8].any()  # whatever is in ignored units


@pytest.mark.parametrize('bad', [0.0, NAN, float('inf'), 1e30])
@pytest.mark.parametrize('name', DIFFERENCES)
def test_differences_equal_autograd(name, bad):
    first, _, labels = make(bad)
    loss = DIFFERENCES[name]
    counted = labels.valid.double()
    found = difference_with_gradient(loss, Prediction(first), labels, counted)
    assert_equals_autograd(found, lambda x: loss(x, labels), first, labels)
    assert (found[0][:, :8] == 0).all()
    units, gradient = difference_with_gradient(loss, Prediction(first), labels, None)
    assert gradient is None
    torch.testing.assert_close(units, found[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('bad', [0.0, NAN, float('inf'), 1e30])
@pytest.mark.parametrize('distance', DISTANCES, ids=repr)
def test_distances_equal_autograd(distance, bad):
    first, second, labels = make(bad)
    counted = labels.valid.double()
    for student, teacher in ((first, second), (second, first)):
        prediction = Prediction(teacher)
        found = distance_with_gradient(distance, student, prediction, labels, counted)
        assert_equals_autograd(found, lambda x, t=teacher: distance(x, t, labels), student, labels)
        units, gradient = distance_with_gradient(distance, student, prediction, labels, None)
        assert gradient is None
        torch.testing.assert_close(units, found[0], rtol=0, atol=0, equal_nan=True)


def test_a_softmax_is_formed_once_for_each_temperature():
    prediction = Prediction(torch.randn(1, 3, 4))
    assert prediction.soften(1.0) is prediction
    assert prediction.soften(2.0) is prediction.soften(2.0)
    assert prediction.probabilities is prediction.probabilities
    torch.testing.assert_close(prediction.soften(2.0).logits, prediction.logits / 2)
