"""Which nodes of a config are built by this package, in every way that a ``type`` can be given."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mmengine.registry import Registry

from mmdistill_ext.registry import EVALUATOR, HOOKS, MODELS, SCOPE


def registered_name(kind: Any, registry: Registry) -> str | None:
    """The name under which something is registered in a registry of this package.

    Args:
        kind: The ``type`` of a config: a name with or without the scope, a class or function (of a
            lazy config), or its path, ``'package.module.name'`` (of a lazy config as text). Nothing
            is imported.
        registry: One of :mod:`mmdistill_ext.registry`.

    Returns:
        The name; None if there is no such thing in the registry.
    """
    if isinstance(kind, str):
        name = kind.removeprefix(f'{SCOPE}.')
        if name in registry.module_dict:
            return name
        module, _, attribute = kind.rpartition('.')
        kind = getattr(sys.modules.get(module), attribute, None)
    return next((name for name, built in registry.module_dict.items() if built is kind), None)


def is_of_this_package(node: Any) -> bool:
    """Whether a config node with a ``type`` is a model, hook or evaluator of this package."""
    if not isinstance(node, Mapping) or 'type' not in node:
        return False
    kind = node['type']
    path = kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__qualname__}'
    return (
        path.startswith(f'{SCOPE}.')
        or node.get('_scope_') == SCOPE
        or any(registered_name(kind, registry) for registry in (MODELS, HOOKS, EVALUATOR))
    )
