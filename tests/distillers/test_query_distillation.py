import math
from functools import partial

import pytest

from mmdistill_ext.taps import Taps
from tests import tiny_zoo
from tests.tiny_zoo import plain

KD = dict(type='KDLoss', average='positive', box=dict(distance='iou', weight=0.5))
SEL = dict(KD, type='SelectiveLoss')
LOSSES = dict(kd=KD, sel=SEL, joint=dict(SEL, together=True, weight=2.0))
NAMES = tiny_zoo.QUERY
fit = partial(tiny_zoo.set_fit, iou=0.05, score=0.99)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Name -> student and teacher; ``same``: equal to each other."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def get(name, same=False):
        key = name, same
        if key not in made:
            seeds = (1, 1) if same else (2, 1)
            made[key] = tiny_zoo.distil(folder, name, LOSSES, seeds=seeds)
        made[key].distillation.fit = None
        return made[key]

    return get


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', NAMES)
def test_nothing_is_matched_or_run_twice(name, by, models):
    model = models(name)
    teacher = model.distillation.teacher.model
    paths = dict(match='bbox_head.assigner.assign', features='backbone')
    data = tiny_zoo.crowd(model)
    student = plain(model)
    with Taps(student, paths) as taps:
        tiny_zoo.step(student, data)
        expected = {key: len(taps.all(key)) for key in paths}
    fit(model, by, 0.5)
    with Taps(model, paths) as taps, Taps(teacher, paths) as others:
        tiny_zoo.step(model, data)
        assert {key: len(taps.all(key)) for key in paths} == expected
        assert {key: len(others.all(key)) for key in paths} == dict(match=3, features=1)


@pytest.mark.parametrize(('name', 'teacher'), [('deformable', 'dino'), ('dino', 'two_stage')])
def test_another_family_teaches(name, teacher, tmp_path):
    model = tiny_zoo.distil(tmp_path, name, LOSSES, teacher, seeds=(2, 1))
    found = tiny_zoo.step(fit(model, 'unit', 0.5), tiny_zoo.crowd(model))
    assert all(math.isfinite(value) for value in found.logged.values())
    assert found.logged['bbox.loss_kd'] > 0 < found.logged['bbox.loss_kd_box']


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', ['detr', 'dino'])
def test_fewer_queries_than_objects(name, by, tmp_path):
    """Two of five objects have a query; the rest has no part in the distillation."""
    model = tiny_zoo.distil(tmp_path, name, dict(kd=KD), name, seeds=(2, 1), num_queries=2)
    fit(model, by, 0.5)
    found = tiny_zoo.step(model, tiny_zoo.crowd(model))
    units = found.units[0]
    assert (units.labels != -1).sum(1).tolist() == [2, 0, 2]
    expected = tiny_zoo.reference(units, False)
    if by is None:
        assert found.logged['bbox.loss_kd'] == pytest.approx(expected['classes'] / 4, rel=1e-3)
        assert found.logged['bbox.loss_kd_box'] == pytest.approx(expected['boxes'] / 8, rel=1e-3)
    assert all(g.isfinite().all() for g in found.gradients.values() if g is not None)
