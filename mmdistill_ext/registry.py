"""Child registries of mmengine's, scope ``mmdistill_ext``.

A config names a part of this package as ``type='mmdistill_ext.SelectiveLoss'`` whatever its
``default_scope`` is; between the parts themselves ``_scope_`` is filled in where it is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from mmengine import registry as _root
from mmengine.registry import Registry

from mmdistill_ext.arguments import check_arguments, check_calls, shown
from mmdistill_ext.error_keys import said

SCOPE = 'mmdistill_ext'


class CheckedRegistry(Registry):
    """A registry whose classes and functions check the arguments that a config gives them.

    What is registered is checked whoever calls it: mmengine, :meth:`build_part`, or a lazy config
    that holds the class itself.

    Args:
        name: What is registered.
        parent: The root registry; None for what only this package builds.
        key_of: From the name of a class to the config key that errors name before an argument:
            the name itself for what stands in lists; ``''`` for the model.
    """

    def __init__(
        self,
        name: str,
        parent: Registry | None = None,
        key_of: Callable[[str], str] = lambda name: '',
    ) -> None:
        super().__init__(name, parent=parent, scope=SCOPE, locations=[SCOPE])
        self.key_of = key_of

    def register_module(
        self,
        name: str | list[str] | None = None,
        force: bool = False,
        module: type | Callable | None = None,
    ) -> Any:
        """Register as mmengine's registries do, see their documentation."""

        def register(made: Any) -> Any:
            made = check_calls(made, self.key_of)
            Registry.register_module(self, name, force, made)
            return made

        return register if module is None else register(module)

    def build_part(self, cfg: Any, key: str, example: str, **filled_in: Any) -> Any:
        """Build what a config key holds.

        Args:
            cfg: What the key holds; a dict with a ``type``, if it is right.
            key: The config key, to be named in errors.
            example: A ``type``, for errors.
            **filled_in: Arguments that the config need not give.

        Raises:
            ValueError: It is no config, there is no such type, or an argument is wrong.
        """
        if not isinstance(cfg, Mapping) or 'type' not in cfg:
            raise ValueError(
                f"`{key}` should be a config such as dict(type='{example}'). Found {shown(cfg)}: "
                f'{"its type" if isinstance(cfg, Mapping) else "a dict"} is missing.'
            )
        cfg = {'_scope_': SCOPE, **filled_in, **cfg}
        check_arguments(self._find(cfg, key), _arguments(cfg), key)
        try:
            return self.build(cfg)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(_under(key, said(error), _arguments(cfg))) from error

    def _find(self, cfg: Mapping, key: str) -> Callable:
        kind = cfg['type']
        if isinstance(kind, str):
            with self.switch_scope_and_registry(cfg['_scope_']) as registry:
                kind = registry.get(kind) if kind else None
        if not callable(kind):
            near = get_close_matches(str(cfg['type']).rpartition('.')[2], self.module_dict, 1)
            raise ValueError(
                f'`{key}.type` should be a registered {self.name}: '
                f'{", ".join(sorted(self.module_dict))}, or one of a module that `custom_imports` '
                f'names. Found {shown(cfg["type"])}{f": is it {near[0]!r}?" if near else "."}'
            )
        return kind


def _under(key: str, message: str, arguments: Mapping) -> str:
    """A message of a part whose first word may be an argument, with the key of the part."""
    first = re.match(r'`([\w.]+)`', message)
    if first and first[1].startswith(f'{key}.'):
        return message
    is_argument = first and first[1].partition('.')[0] in arguments
    return f'`{key}.{message[1:]}' if is_argument else f'`{key}`: {message}'


def _arguments(cfg: Mapping) -> dict[str, Any]:
    return {name: value for name, value in cfg.items() if name not in ('type', '_scope_')}


MODELS = CheckedRegistry('model', _root.MODELS)
HOOKS = CheckedRegistry('hook', _root.HOOKS, str)
TRANSFORMS = CheckedRegistry('transform', _root.TRANSFORMS, str)
EVALUATOR = CheckedRegistry('evaluator', _root.EVALUATOR, str)
OPTIM_WRAPPER_CONSTRUCTORS = CheckedRegistry(
    'optimizer wrapper constructor', _root.OPTIM_WRAPPER_CONSTRUCTORS, str
)
CONNECTORS = CheckedRegistry('connector')
SECOND_PREDICTIONS = CheckedRegistry('second prediction', key_of=lambda name: 'second')
FIT_FUNCTIONS = CheckedRegistry('fit function', key_of=lambda name: 'fit.function')
