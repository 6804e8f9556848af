import math

import pytest

from mmdistill_ext.hooks.fit_state import FitState


def test_means_run_over_the_window_and_are_weighted():
    state = FitState(window=3)
    state.add_steps([[100.0, 1.0, 0.0, 10.0], [6.0, 2.0, 5.0, 10.0]])
    state.add_steps([[4.0, 2.0, 5.0, 10.0], [2.0, 6.0, 8.0, 10.0]])  # the first one is out
    state.add_measured('val', 10, [90.0, 1.0])
    state.add_measured('val', 12, [8.0, 1.0])
    state.add_measured('val', 14, [7.0, 4.0])  # that of iteration 10 is out
    found = state.update()
    assert found == dict(
        train_gt_loss=12 / 10, simple_share=18 / 30, val_gt_loss=15 / 5, error=1.2 - 3.0
    )
    assert state.error == 1.2 - 3.0


def test_eval_mode_on_training_data_is_preferred():
    state = FitState(window=5)
    state.add_steps([[5.0, 1.0, 1.0, 1.0]])
    state.add_measured('train', 1, [2.0, 1.0])
    state.add_measured('val', 1, [3.0, 1.0])
    found = state.update()
    assert found['error'] == 2.0 - 3.0
    assert found['train_gt_loss'] == 5.0
    assert found['train_gt_loss_eval'] == 2.0


@pytest.mark.parametrize(
    ('train', 'val'),
    [([], [3.0, 1.0]), ([[5.0, 1.0, 1.0, 1.0]], [0.0, 0.0]), ([[0.0, 0.0, 0.0, 0.0]], [3.0, 1.0])],
)
def test_without_samples_the_error_stays(train, val):
    state = FitState(window=5)
    state.error = -0.25
    state.add_steps(train)
    state.add_measured('val', 1, val)
    assert 'error' not in state.update()
    assert state.error == -0.25


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_loss_that_is_not_finite_is_refused(bad):
    state = FitState(window=5)
    state.add_steps([[1.0, 1.0, 1.0, 1.0]])
    state.add_measured('val', 1, [bad, 1.0])
    with pytest.raises(ValueError, match=f'`val_gt_loss` should be finite. Found {bad}'):
        state.update()


def test_state_goes_on_after_a_round_trip():
    first, second = FitState(window=2), FitState(window=2)
    first.add_steps([[1.0, 2.0, 3.0, 4.0]])
    first.add_measured('val', 1, [3.0, 1.0])
    first.update()
    second.load_state_dict(first.state_dict())
    for state in (first, second):
        state.add_steps([[5.0, 6.0, 7.0, 8.0], [0.5, 1.0, 1.0, 1.0]])
        state.add_measured('val', 2, [1.0, 3.0])
    assert first.update() == second.update()
    assert first.state_dict() == second.state_dict()
