import pytest
import torch

from mmdistill_ext.units.pixel.activation import Activation, conversion, log_odds, mask_logits


def probabilities(logits, activation):
    """Of the classes; one sigmoid is for two."""
    if not activation.sigmoid:
        return logits.softmax(1)
    p = logits.sigmoid()
    return torch.cat((1 - p, p), 1) if activation.channels == 1 else p


@pytest.mark.parametrize(
    ('source', 'target'),
    [
        ((False, 3), (False, 3)),
        ((True, 3), (True, 3)),
        ((False, 3), (True, 3)),
        ((False, 2), (True, 2)),
        ((False, 2), (True, 1)),
        ((True, 1), (False, 2)),
        ((True, 1), (True, 2)),
    ],
)
def test_converted_logits_give_the_same_probabilities(source, target):
    source, target = Activation(*source), Activation(*target)
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, source.channels, 4, 5, dtype=torch.float64)
    converted = conversion(source, target)(logits)
    assert converted.shape == (2, target.channels, 4, 5)
    torch.testing.assert_close(
        probabilities(converted, target), probabilities(logits, source), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ('source', 'target'),
    [
        ((True, 3), (False, 3)),
        ((True, 2), (False, 2)),
        ((True, 2), (True, 1)),
        ((False, 3), (True, 1)),
    ],
)
def test_there_is_none_where_sigmoids_are_no_distribution(source, target):
    assert conversion(Activation(*source), Activation(*target)) is None


@pytest.mark.parametrize('scale', [1, 30, 300])
def test_log_odds_of_certain_classes_are_finite_and_right(scale):
    torch.manual_seed(0)
    logits = scale * torch.randn(2, 4, 50, dtype=torch.float64)
    others = torch.stack(
        [logits[:, [j for j in range(4) if j != i]].logsumexp(1) for i in range(4)], 1
    )
    for dtype, accuracy in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = log_odds(logits.to(dtype))
        torch.testing.assert_close(found.double(), logits - others, rtol=accuracy, atol=accuracy)


def test_log_odds_of_halves_are_in_single_precision():
    assert log_odds(torch.randn(1, 3, 2).half()).dtype == torch.float32


def test_the_softmax_of_mask_logits_is_the_normalised_score():
    torch.manual_seed(0)
    classes, masks = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 6, 7).double()
    scores = torch.zeros(2, 3, 6, 7).double()
    for query in range(5):
        p = classes[:, query].softmax(1)[:, :3, None, None]
        scores += p * masks[:, query, None].sigmoid()
    logits = mask_logits(classes, masks)
    torch.testing.assert_close(logits.softmax(1), scores / scores.sum(1, keepdim=True))
    torch.testing.assert_close(logits.exp(), scores)


def test_mask_logits_are_finite_where_no_query_sees_anything():
    classes = torch.tensor([[[-300.0, -300.0, 300.0]]], requires_grad=True)
    masks = torch.full((1, 1, 2, 2), -300.0, requires_grad=True)
    logits = mask_logits(classes, masks)
    logits.softmax(1)[:, 0].sum().backward()
    assert logits.isfinite().all()
    assert classes.grad.isfinite().all()
    assert masks.grad.isfinite().all()
