import subprocess
import sys
import warnings

import pytest
from mmengine.config import Config
from mmengine.hub import get_config

from mmdistill_ext import compat
from mmdistill_ext.config_scopes import mend_scopes


def test_framework_configs_are_found_under_either_distribution_name():
    cfg = get_config('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py')
    assert cfg.model.type == 'EncoderDecoder'


def test_own_configs_are_found():
    assert (
        get_config('mmdistill_ext::plain/fpn_r18-w16_600_camvid-192x256.py').model.backbone.depth
        == 18
    )


def test_own_configs_as_bases_are_built_in_the_frameworks_scope(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("_base_ = 'mmdistill_ext::plain/fpn_r18-w16_600_camvid-192x256.py'\n")
    cfg = Config.fromfile(path)
    assert cfg.default_scope == 'mmseg'
    assert '_scope_' not in cfg.visualizer
    assert '_scope_' not in cfg.model


def test_mending_twice_changes_nothing():
    before = Config._get_cfg_path
    mend_scopes()
    assert Config._get_cfg_path is before


def test_what_cannot_be_mended_warns_once_and_goes_on():
    def change() -> None:
        raise AttributeError('no such thing')

    with pytest.warns(
        UserWarning, match=r'mmengine .* not known.*: configs may not .*no such'
    ) as got:
        compat.mend(change, 'configs')
    assert len(got) == 1


@pytest.mark.parametrize(
    'gone',
    [
        'mmengine.config.Config._get_cfg_path',
        'mmengine.config.utils.MODULE2PACKAGE',
        'mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint',
        'mmengine.runner.checkpoint.CheckpointLoader',
    ],
)
def test_an_unknown_mmengine_costs_one_warning(gone: str, monkeypatch: pytest.MonkeyPatch):
    """As if this package were imported for the first time, with a private name gone."""
    from mmdistill_ext import config_access, config_scopes, safe_loading

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        patch.delattr(gone)
        compat.mend(config_scopes.mend_scopes, 'scopes')
        compat.mend(safe_loading.guard_mmengine, 'safe loading')
        compat.mend(config_access.read_through, 'inference')
    assert ['is not known to mmdistill_ext' in str(warning.message) for warning in got] == [True]


def test_missing_framework_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compat, 'find_spec', lambda name: None)
    assert not compat.has_framework('mmseg')
    with pytest.raises(ImportError, match=r'The demo needs `mmseg`.*onedl-mmsegmentation'):
        compat.require_framework('mmseg', 'The demo')
    with pytest.raises(ImportError, match=r'`mmdet`.*onedl-mmdetection'):
        compat.require_framework('mmdet', 'Detection')


def test_only_statistics_are_read_from_a_history_buffer():
    from mmengine.logging import HistoryBuffer

    assert compat._history_getattr(HistoryBuffer, 'min') is HistoryBuffer.min
    with pytest.raises(TypeError, match='may not read'):
        compat._history_getattr(HistoryBuffer, '__init__')
    with pytest.raises(TypeError, match='may not read'):
        compat._history_getattr(str, 'min')


@pytest.mark.parametrize(('missing', 'package'), [('mmseg', 'onedl-mmsegmentation'), ('mmdet', '')])
def test_package_imports_with_one_framework_and_asks_for_the_other(missing, package):
    code = f"""
import sys
sys.modules[{missing!r}] = None  # importing it fails
import mmdistill_ext
from mmdistill_ext.distillers.build import resolve_model_cfg
try:
    print(resolve_model_cfg('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py').type)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert (package or 'EncoderDecoder') in done.stdout.splitlines()[-1]
