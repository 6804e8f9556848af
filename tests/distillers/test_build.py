import pytest
from mmengine.registry import DefaultScope, init_default_scope

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from tests import tiny_seg

PSPNET = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'


@pytest.fixture(params=['mmseg', 'mmdet', 'mmdistill_ext', 'mmengine'])
def scope(request):
    before = DefaultScope.get_current_instance()
    try:
        init_default_scope(request.param)
    except ImportError:
        pytest.fail('the test environment has both frameworks')
    yield request.param
    if before is not None:
        init_default_scope(before.scope_name)


def test_inline_model_builds_whatever_the_default_scope_is(scope):
    assert type(build_model(tiny_seg.model(8))).__name__ == 'EncoderDecoder'


def test_three_forms_give_the_same_model(tmp_path):
    from mmengine.hub import get_config

    cfg = get_config(PSPNET)
    path = tmp_path / 'config.py'
    cfg.dump(path)
    forms = [resolve_model_cfg(spec) for spec in (cfg.model.to_dict(), str(path), PSPNET)]
    assert forms[0] == forms[1] == forms[2]
    assert forms[0]['_scope_'] == 'mmseg'


def test_input_is_left_alone():
    cfg = tiny_seg.model(8)
    resolve_model_cfg(cfg)
    assert '_scope_' not in cfg


@pytest.mark.parametrize(
    ('spec', 'error', 'message'),
    [
        ('nowhere.py', FileNotFoundError, "`student` should be an existing config.*'nowhere.py'"),
        (7, TypeError, '`student` should be a model dict or a config path.*int'),
        (dict(depth=3), ValueError, r"`student` should have a `type`. Found the keys \['depth'\]"),
        (dict(type='NoSuchNet'), ValueError, "`student.type` should be a registered.*'NoSuchNet'"),
    ],
)
def test_errors_name_key_rule_and_value(spec, error, message):
    with pytest.raises(error, match=message):
        resolve_model_cfg(spec, 'student')


def test_config_without_model(tmp_path):
    path = tmp_path / 'data.py'
    path.write_text('batch_size = 2\n')
    with pytest.raises(ValueError, match='should be a config with a `model`'):
        resolve_model_cfg(str(path), 'student')


def test_missing_framework_is_named(monkeypatch):
    monkeypatch.setattr('mmdistill_ext.compat.has_framework', lambda name: False)
    with pytest.raises(ImportError, match='needs `mmseg`, which is not installed'):
        resolve_model_cfg(PSPNET, 'teacher.model')
