"""Stacks of extensions: the plain model is found whatever stands around it, however it is named."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook

from mmdistill_ext import distillers
from mmdistill_ext.distillers import CollaborativeDistiller, build_teacher_student
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.extension import INNER_MODELS, register_extension
from mmdistill_ext.hooks import CollaborationHook
from mmdistill_ext.package_types import is_of_this_package, registered_name
from mmdistill_ext.plain_config import network_names, plain_config
from mmdistill_ext.registry import HOOKS, MODELS
from tests import tiny_seg

NAMED = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'


@pytest.fixture(autouse=True)
def noisy():
    """An extension of the user's own: a function, which has another name than its type."""

    @register_extension('Noisy', inner='model')
    def build_noisy(model, level=0.1, data_preprocessor=None):
        if data_preprocessor is not None:
            model.setdefault('data_preprocessor', data_preprocessor)
        return build_model(model, 'model')

    yield build_noisy
    MODELS.module_dict.pop('Noisy')
    INNER_MODELS.pop('Noisy')


@pytest.fixture
def distilled(tmp_path: Path) -> Config:
    plain = tiny_seg.config(tmp_path / 'data', tmp_path / 'work')
    return tiny_seg.distil(plain, str(tmp_path / 'teacher.pth'), ema=dict(type='EMAHook'))


def stacked(cfg: Config, *types: object) -> Config:
    """The same run with extensions around its model, the last one outside."""
    for kind in types:
        scope = dict(_scope_='mmdistill_ext') if kind == 'Noisy' else {}
        cfg.model = dict(type=kind, level=0.5, model=cfg.model, **scope)
    return cfg


def written(cfg: Config, path: Path) -> str:
    cfg.dump(path)
    return str(path)


@pytest.mark.parametrize('types', [['mmdistill_ext.Noisy'], ['Noisy'], ['mmdistill_ext.Noisy'] * 3])
def test_a_stack_is_peeled_down_to_the_student(distilled: Config, types: list[str]):
    expected = plain_config(distilled).to_dict()
    assert plain_config(stacked(distilled, *types)).to_dict() == expected
    assert 'mmdistill_ext' not in str(expected)


def test_an_extension_of_a_plain_model_is_peeled_too(tmp_path: Path):
    expected = tiny_seg.config(tmp_path, tmp_path).to_dict()
    cfg = stacked(tiny_seg.config(tmp_path, tmp_path), 'mmdistill_ext.Noisy')
    assert plain_config(cfg).to_dict() == expected


def test_the_type_may_be_the_object_or_its_path(distilled: Config, noisy):
    expected = plain_config(distilled).to_dict()
    for kind in (build_teacher_student, 'mmdistill_ext.distillers.build_teacher_student'):
        distilled.model.type = kind
        assert plain_config(distilled).to_dict() == expected
    assert plain_config(stacked(distilled, noisy)).to_dict() == expected


def test_an_extension_may_be_a_class(distilled: Config):
    expected = plain_config(distilled).to_dict()

    @register_extension('NoisyClass', inner='inner')
    class Anything:
        pass

    try:
        cfg = stacked(distilled, Anything)
        cfg.model['inner'] = cfg.model.pop('model')
        assert plain_config(cfg).to_dict() == expected
    finally:
        MODELS.module_dict.pop('NoisyClass')
        INNER_MODELS.pop('NoisyClass')


@pytest.mark.parametrize('student', ['dict', 'path', 'named'])
@pytest.mark.parametrize('model', ['dict', 'path'])
def test_each_layer_may_be_a_dict_or_a_config(distilled, tmp_path: Path, student: str, model: str):
    if student == 'path':
        plain = tiny_seg.config(tmp_path, tmp_path)
        distilled.model.student = written(plain, tmp_path / 'student.py')
    elif student == 'named':
        distilled.model.student = NAMED
    expected = plain_config(distilled).to_dict()
    if model == 'path':
        path = written(distilled, tmp_path / 'distilled.py')
        distilled.model = dict(type='mmdistill_ext.Noisy', model=path)
    else:
        stacked(distilled, 'mmdistill_ext.Noisy')
    found = plain_config(distilled)
    assert found.to_dict() == expected
    assert found.model.type == 'EncoderDecoder'
    assert found.model.backbone.depth == (50 if student == 'named' else 18)


def test_the_nearest_data_preprocessor_counts(distilled: Config):
    own = distilled.model.student.data_preprocessor.to_dict()
    stacked(distilled, 'mmdistill_ext.Noisy')
    other, outer, outmost = (dict(own, size=(n, n)) for n in (32, 64, 96))
    distilled.data_preprocessor = outmost
    distilled.model.data_preprocessor = outer
    distilled.model.model.data_preprocessor = other
    for layer, expected in (
        (distilled.model.model.student, own),
        (distilled.model.model, other),
        (distilled.model, outer),
        (distilled, outmost),
    ):
        assert plain_config(distilled).model.data_preprocessor.to_dict() == expected
        layer.pop('data_preprocessor')
    assert 'data_preprocessor' not in plain_config(distilled).model


def collaborative(tmp_path: Path) -> Config:
    cfg = tiny_seg.config(tmp_path / 'data', tmp_path / 'work')
    students = dict(a=tiny_seg.model(4), b=tiny_seg.model(8))
    kind = 'mmdistill_ext.CollaborativeDistiller'
    cfg.model = dict(type=kind, students=students, second=dict(type='MinLoss'))
    return cfg


def test_an_extension_of_several_networks_leaves_them_together(tmp_path: Path):
    cfg = collaborative(tmp_path)
    assert network_names(cfg) == ['a', 'b']
    expected = {name: plain_config(cfg, name).to_dict() for name in 'ab'}
    stacked(cfg, 'mmdistill_ext.Noisy')
    assert network_names(cfg) == ['a', 'b']
    assert plain_config(cfg) is cfg
    assert {name: plain_config(cfg, name).to_dict() for name in 'ab'} == expected
    with pytest.raises(ValueError, match=r"`network` should be one of a, b\. Found 'c'"):
        plain_config(cfg, 'c')


def test_a_network_may_be_an_extension_itself(distilled: Config, tmp_path: Path):
    cfg = collaborative(tmp_path)
    expected = plain_config(cfg, 'b').model
    cfg.model.students.b = dict(distilled.model.to_dict(), student=cfg.model.students.b.to_dict())
    assert plain_config(cfg, 'b').model == expected


def test_errors_name_the_layer(distilled: Config):
    stacked(distilled, 'mmdistill_ext.Noisy')
    distilled.model.model.student = 'none.py'
    with pytest.raises(FileNotFoundError, match=r'`model\.model\.student`.*none\.py'):
        plain_config(distilled)
    distilled.model.model = dict(level=1)
    with pytest.raises(ValueError, match=r'`model\.model` should have a `type`'):
        plain_config(distilled)


def test_without_a_model_there_is_nothing_to_peel():
    cfg = Config(dict(work_dir='x'))
    assert plain_config(cfg) is cfg
    assert network_names(cfg) == []


LAZY = """
from mmengine.config import read_base
from mmengine.hooks import EMAHook
from mmseg.models import EncoderDecoder

from mmdistill_ext.distillers import build_teacher_student
from mmdistill_ext.hooks import TeacherShareHook

default_scope = 'mmseg'
model = dict(type=build_teacher_student, student=dict(type=EncoderDecoder, backbone={backbone!r}))
custom_hooks = [dict(type=TeacherShareHook), dict(type=EMAHook)]
"""


def test_lazy_configs_hold_objects(tmp_path: Path):
    path = tmp_path / 'lazy.py'
    path.write_text(LAZY.format(backbone=dict(tiny_seg.model(8)['backbone'])))
    plain = plain_config(Config.fromfile(path))
    assert plain.model.type.rsplit('.')[-1] == 'EncoderDecoder'
    (hook,) = plain.custom_hooks
    assert hook.type.rsplit('.')[-1] == 'EMAHook'
    assert 'mmdistill_ext' not in plain.pretty_text


@pytest.mark.parametrize(
    'kind',
    [
        'CollaborativeDistiller',
        'mmdistill_ext.CollaborativeDistiller',
        'mmdistill_ext.distillers.CollaborativeDistiller',
        'mmdistill_ext.distillers.collaborative.CollaborativeDistiller',
        CollaborativeDistiller,
    ],
)
def test_a_registered_type_has_many_names(kind):
    assert registered_name(kind, MODELS) == 'CollaborativeDistiller'
    assert is_of_this_package(dict(type=kind))


@pytest.mark.parametrize(
    'kind',
    [
        'EncoderDecoder',
        'mmseg.CollaborativeDistiller',
        'mmdistill_ext.Nothing',
        'mmdistill_ext.distillers',
        'not.imported.CollaborativeDistiller',
        distillers,
        CollaborationHook,
        Hook,
        None,
        '',
    ],
)
def test_other_types_are_not_registered(kind):
    assert registered_name(kind, MODELS) is None


def test_hooks_are_those_of_the_hooks_registry():
    assert registered_name(CollaborationHook, HOOKS) == 'CollaborationHook'
    assert is_of_this_package(dict(type=CollaborationHook))
    assert not is_of_this_package(dict(type=Hook))
    assert not is_of_this_package(dict(type='EMAHook'))
    assert is_of_this_package(dict(type='Anything', _scope_='mmdistill_ext'))
    for node in (None, [], 'CollaborationHook', dict(model=1)):
        assert not is_of_this_package(node)
