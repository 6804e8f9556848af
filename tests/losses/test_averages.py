import pytest
import torch

from mmdistill_ext.losses.averages import weighted_mean
from tests.two_ranks import in_two_ranks


def values(images=4):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(images, 1, 2, 3, generator=generator), torch.ones(images, 1, 2, 3)


def test_weights_count_as_shares():
    numbers, weight = values()
    weight[0] = 0
    weight[1] = 2.5
    expected = (numbers * weight).sum() / weight.sum()
    torch.testing.assert_close(weighted_mean(numbers, weight), expected)
    torch.testing.assert_close(weighted_mean(numbers, None), numbers.mean())


@pytest.mark.parametrize('bad', [1.0, torch.nan])
def test_no_weight_is_exactly_zero(bad):
    numbers, weight = values()
    assert weighted_mean(numbers * bad, 0 * weight) == 0


def of_rank(rank):
    """Rank 0 has no padding, so no weights; rank 1 has."""
    numbers, weight = values()
    weight[2:, ..., 2] = 0
    mine = slice(2 * rank, 2 * rank + 2)
    return weighted_mean(numbers[mine], None if rank == 0 else weight[mine])


def test_ranks_with_and_without_padding_are_one():
    numbers, weight = values()
    weight[2:, ..., 2] = 0
    expected = weighted_mean(numbers, weight)
    torch.testing.assert_close(sum(in_two_ranks(of_rank)) / 2, expected)
