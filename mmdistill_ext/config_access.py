"""Reads a distiller's config as that of its student, for functions that know plain models only.

``mmdet.apis.init_detector`` looks for ``config.model.backbone``, other tools for a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from mmengine.config import ConfigDict

from mmdistill_ext.compat import mend
from mmdistill_ext.distillers.build import resolve_model_cfg
from mmdistill_ext.distillers.extension import INNER_MODELS
from mmdistill_ext.package_types import registered_name
from mmdistill_ext.registry import MODELS


def read_through() -> None:
    """Let attributes that an extension's config lacks be those of the model that it extends.

    Only attribute access (``config.model.backbone``) is changed; ``in``, ``get``, ``[]`` and what
    is printed are not. A second time changes nothing.
    """
    get = ConfigDict.__getattr__
    if hasattr(get, '__wrapped__'):
        return

    @wraps(get)
    def get_or_inner(self: ConfigDict, name: str) -> Any:
        try:
            return get(self, name)
        except AttributeError:
            inner = None if name.startswith('_') else _inner_model(self)
            if inner is None:
                raise
            return getattr(inner, name)

    ConfigDict.__getattr__ = get_or_inner


def _inner_model(node: ConfigDict) -> ConfigDict | None:
    """Config of the model that an extension's config extends; a copy of one that is in a file."""
    kind = node.get('type')
    name = registered_name(kind, MODELS) if kind is not None else None
    spec = node.get(INNER_MODELS[name]) if name in INNER_MODELS else None
    if spec is None or isinstance(spec, Mapping):
        return spec
    return resolve_model_cfg(spec, INNER_MODELS[str(name)])


mend(read_through, "reading of a distiller's config for inference")
