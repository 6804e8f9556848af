import random

import numpy as np
import torch

from mmdistill_ext.isolation import isolated_rng


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
