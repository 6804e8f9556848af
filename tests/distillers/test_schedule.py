import pytest

from mmdistill_ext.distillers.schedule import Schedule


def test_constant_weight_by_default():
    assert [Schedule(weight=2).at(i) for i in (0, 1, 10**6)] == [2, 2, 2]


def test_begin_warmup_and_stop():
    schedule = Schedule(weight=1.0, begin=2, warmup=4, stop=8)
    expected = [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 0, 0]
    assert [schedule.at(i) for i in range(10)] == expected


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (dict(weight=-0.1), r'`losses.sel.weight` should be a finite number >= 0.*=-0.1'),
        (dict(weight=float('nan')), r'`losses.sel.weight` should be a finite number >= 0.*=nan'),
        (dict(begin=-1), r'`losses.sel.begin` should be >= 0. Found -1'),
        (dict(warmup=-1), r'`losses.sel.warmup`'),
        (dict(begin=5, stop=5), r'`losses.sel.stop` should come after `begin`=5. Found 5'),
    ],
)
def test_impossible_values_name_the_key(values, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**values, key='losses.sel')
