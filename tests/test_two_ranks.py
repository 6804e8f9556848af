"""Two processes for tests: they meet, fail with a name, and never hang."""

import time

import pytest
import torch
from torch import distributed

from tests.two_ranks import in_two_ranks


def add_up(rank, offset):
    summed = torch.tensor([rank + offset])
    distributed.all_reduce(summed)
    return rank, summed


def fail_in_one(rank):
    if rank == 1:
        raise KeyError('the second has no label')
    distributed.barrier()


def hang_in_one(rank):
    if rank == 1:
        time.sleep(600)


def test_each_rank_returns_its_result():
    first, second = in_two_ranks(add_up, 10)
    assert first == (0, torch.tensor([21]))
    assert second == (1, torch.tensor([21]))


def test_a_rank_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r'(?s)`fail_in_one` failed in rank 1:.*has no label'):
        in_two_ranks(fail_in_one)


def test_a_rank_that_hangs_is_named():
    with pytest.raises(TimeoutError, match=r'`hang_in_one` still runs in ranks \[1\] after 8'):
        in_two_ranks(hang_in_one, timeout=8)
