"""Mutants of valid configs: none is refused without its key, none fails after an iteration.

``python -m tests.mutants`` tries many more.
"""

import pytest

from tests.mutant_configs import Folder
from tests.mutants import OUTCOMES, in_a_fork, mutants, names_key

COUNT, PROCESSES = 98, 7


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp('mutants'))


@pytest.mark.parametrize('part', range(PROCESSES))
def test_mutants_are_refused_by_their_key_or_train(folder, tmp_path, part):
    """Each is built and takes one step."""
    wrong = []
    for place, made in enumerate(mutants(folder, COUNT, seed=1)):
        if place % PROCESSES == part:
            outcome = in_a_fork(made, tmp_path / str(place), stop_after=1)
            if outcome.name in OUTCOMES[2:]:
                wrong.append(f'{outcome.name}: {made}: {outcome.error}')
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize(
    ('path', 'message', 'named'),
    [
        ('model losses kd temperature', '`losses.kd.temperature` should be > 0.', True),
        ('model losses kd temperature', '`losses.kd`: the temperature is wrong.', True),
        ('model losses kd temperature', 'the temperature is wrong', False),
        ('model losses kd temperature', "KeyError: 'kd'", False),
        ('model student backbone depth', '`student.backbone`: KeyError: 19', True),
        ('model student backbone depth', 'KeyError: 19', False),
        ('model students a neck', '`students.a.neck`: TypeError', True),
        ('model students a neck', '`students.b.neck`: TypeError', False),
        ('custom_hooks 0 interval', '`FitHook.interval` should be an integer.', True),
        ('custom_hooks 0 interval', "unsupported operand '<' of str", False),
    ],
)
def test_what_counts_as_named(path, message, named):
    assert names_key(message, tuple(path.split())) is named
