"""Builds a model from any of the three ways to name one in a config."""

from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from torch import nn

from mmdistill_ext.compat import has_framework, require_framework
from mmdistill_ext.error_keys import errors_of_parts
from mmdistill_ext.safe_loading import name_sources

FRAMEWORKS = ('mmseg', 'mmdet')


def resolve_model_cfg(spec: dict | str, key: str = 'model') -> ConfigDict:
    """Return the model dict that ``spec`` stands for, with the ``_scope_`` that can build it.

    Args:
        spec: A model dict, the path of a config file, or ``'mmseg::pspnet/...py'``.
        key: The config key to name in errors.

    Returns:
        A copy; the input is left alone.

    Raises:
        TypeError: ``spec`` is neither a dict nor a string.
        FileNotFoundError: There is no such config.
        ValueError: The config has no model, or its ``type`` is in no known framework.
        ImportError: The framework is not installed.
    """
    if isinstance(spec, str):
        cfg = _read_config(spec, key)
        if 'model' not in cfg:
            raise ValueError(f"`{key}` should be a config with a `model`. '{spec}' has none.")
        model, scope = cfg.model, cfg.get('default_scope')
    elif isinstance(spec, dict):
        model, scope = spec, None
    else:
        raise TypeError(f'`{key}` should be a model dict or a config path. Found {type(spec)}.')
    if 'type' not in model:
        raise ValueError(f'`{key}` should have a `type`. Found the keys {sorted(model)}.')
    model = copy.deepcopy(ConfigDict(model))  # detectors change nested dicts of their config
    model.setdefault('_scope_', scope or _find_scope(model['type'], key))
    return model


def build_model(spec: dict | str, key: str = 'model') -> nn.Module:
    """Build the model that ``spec`` stands for, whatever the default scope is.

    Raises:
        ValueError: The framework refuses the model; the message names the part of ``key``.
    """
    cfg = resolve_model_cfg(spec, key)
    name_sources(cfg, key)
    with errors_of_parts(cfg, key):
        return ROOT_MODELS.build(cfg)


def _read_config(spec: str, key: str) -> Config:
    if '::' in spec:
        from mmengine.hub import get_config

        scope = spec.partition('::')[0]
        if scope in FRAMEWORKS:
            require_framework(scope, f"`{key}`='{spec}'")
        return get_config(spec)
    if not Path(spec).is_file():
        raise FileNotFoundError(f"`{key}` should be an existing config file. Found '{spec}'.")
    return Config.fromfile(spec)


def _find_scope(model_type: str | type, key: str) -> str:
    """The default scope if it knows the type, else the framework that does."""
    if not isinstance(model_type, str):
        return ROOT_MODELS.scope
    scope = model_type.partition('.')[0]
    if '.' in model_type:  # either scope.Name, or the dotted path of a class or function
        known = scope in ROOT_MODELS.children or (has_framework(scope) and scope in FRAMEWORKS)
        return scope if known else ROOT_MODELS.scope
    default = DefaultScope.get_current_instance()
    scopes = [default.scope_name] if default is not None else []
    scopes += [name for name in FRAMEWORKS if has_framework(name) and name not in scopes]
    for scope in scopes:
        with ROOT_MODELS.switch_scope_and_registry(scope) as registry:
            if registry.scope == scope and registry.get(model_type) is not None:
                return scope
    raise ValueError(
        f"`{key}.type` should be a registered model of {', '.join(scopes)}. Found '{model_type}'. "
        'A model of another package needs a `_scope_` and its `custom_imports`.'
    )
