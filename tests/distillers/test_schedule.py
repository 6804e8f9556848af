import pytest

from mmdistill_ext.distillers.schedule import Schedule, build_schedule
from tests import tiny_collaboration, tiny_seg
from tests.runs import plain_config, train


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


@pytest.mark.parametrize(
    ('values', 'iterations', 'message'),
    [
        (dict(begin=10), 10, '`losses.sel.begin` should come before the end of the run.*Found 10'),
        (dict(begin=9), 10, None),
        (dict(warmup=1000), 10, None),
        (dict(warmup=1001), 10, '`losses.sel.warmup` should end within the run.*Found 1001'),
        (dict(warmup=1001, stop=10), 10**6, '`losses.sel.warmup` should end .*stop=10'),
        (dict(begin=5, warmup=1000, stop=15), 10**6, None),
        (dict(begin=5, warmup=1000, stop=14), 10**6, '`losses.sel.warmup` should end'),
        (dict(begin=20, stop=30), 10, '`losses.sel.begin` should come before'),
    ],
)
def test_a_term_that_never_counts_in_a_run_is_refused(values, iterations, message):
    schedule = Schedule(**values, key='losses.sel')
    if message is None:
        schedule.check_run(iterations)
        return
    with pytest.raises(ValueError, match=message):
        schedule.check_run(iterations)


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(begin='1'), '`kl.begin` should be an integer'),
        (dict(warmup=None), '`kl.warmup` should be an integer'),
        (dict(weight=True), '`kl.weight` should be a number'),
        (dict(weight=1e8), r'`kl.weight` .*at most 1e\+06'),
        (dict(end=3), '`kl.end` should be an argument of Schedule: weight, begin, warmup, stop.'),
    ],
)
def test_a_config_is_checked(cfg, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(cfg, 'kl')


def test_a_run_is_checked_in_its_first_step(root, tmp_path):
    teacher = tiny_seg.save_weights(tmp_path / 't.pth', tiny_seg.model(16), seed=1)
    cfg = tiny_seg.distil(plain_config(root, tmp_path / 'a'), teacher)
    cfg.model.losses.sel.begin = 4
    with pytest.raises(ValueError, match='`losses.sel.begin` should come before.*4 iterations'):
        train(cfg)
    cfg = tiny_collaboration.config(root, tmp_path / 'b', dict(type='MinLoss'))
    cfg.model.kl.begin = 4
    with pytest.raises(ValueError, match='`kl.begin` should come before.*4 iterations'):
        train(cfg)
