import random

import numpy as np
import pytest
import torch
from torch import nn

from mmdistill_ext.isolation import eval_mode, isolated_rng


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_side_work_does_not_move_the_generators():
    def run(side_work):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        first = draw()
        if side_work:
            with isolated_rng():
                draw()
        return first, draw()

    assert run(False) == run(True)


def test_states_are_restored_after_an_error():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    try:
        with isolated_rng():
            draw()
            raise ValueError
    except ValueError:
        pass
    assert draw() == expected


def test_a_seed_decides_what_is_drawn_inside_and_nothing_outside():
    found = []
    for outer in (1, 2):
        random.seed(outer), np.random.seed(outer), torch.manual_seed(outer)
        expected = draw()
        random.seed(outer), np.random.seed(outer), torch.manual_seed(outer)
        with isolated_rng(7):
            found.append(draw())
            with isolated_rng(8):
                assert draw() != found[-1]
            found.append(draw())
        assert draw() == expected
    assert found[:2] == found[2:]
    assert found[0] != found[1]


def test_without_a_seed_the_numbers_go_on():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with isolated_rng():
        assert torch.equal(torch.rand(1), expected)


class KeepsNorm(nn.Sequential):
    """Has its own idea of training, as a backbone with ``norm_eval=True``."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize('fail', [False, True])
def test_every_module_comes_back_in_its_own_mode(fail):
    model = nn.Sequential(
        KeepsNorm(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Dropout(), nn.Linear(2, 2)
    )
    model.train()
    model[2].eval()
    before = [module.training for module in model.modules()]
    assert before.count(False) == 2
    try:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            if fail:
                raise ValueError
    except ValueError:
        pass
    assert [module.training for module in model.modules()] == before


def test_a_model_in_eval_mode_stays_there():
    model = nn.Sequential(nn.Dropout()).eval()
    with eval_mode(model):
        pass
    assert not any(module.training for module in model.modules())
