"""Says in which part of a config an error arose that names none."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.registry import build_from_cfg

from mmdistill_ext.arguments import join

NOT_OF_THE_CONFIG = (ImportError, OSError, MemoryError, torch.cuda.OutOfMemoryError)
"""What a config is not to blame for, and what says itself which file or package is missing."""


@contextmanager
def errors_of_part(key: str) -> Iterator[None]:
    """Name a config key in every error that names none.

    Raises:
        ValueError: In place of the error; what :data:`NOT_OF_THE_CONFIG` holds stays as it is.
    """
    try:
        yield
    except Exception as error:
        if is_named(error):
            raise
        raise ValueError(f'`{key}`: {said(error)}') from error


@contextmanager
def errors_of_parts(cfg: Any, key: str = '') -> Iterator[None]:
    """Name the part of a config that an error came from while mmengine built that part.

    Args:
        cfg: What is built, a dict with dicts in it.
        key: The config key of ``cfg``; ``''`` for a whole config.

    Raises:
        ValueError: In place of an error that names no key and arose in a part that has one.
    """
    try:
        yield
    except Exception as error:
        cfg = getattr(cfg, '_cfg_dict', cfg)  # of mmengine's Config, which is no Mapping
        path = None if is_named(error) else failing_part(error, cfg)
        if path is None or not join(key, *path):
            raise
        raise ValueError(f'`{join(key, *path)}`: {said(error)}') from error


@contextmanager
def errors_of_modules(modules: Mapping[str, object]) -> Iterator[None]:
    """Name the config key of the module in whose methods an error arose.

    Args:
        modules: Config key -> module.

    Raises:
        ValueError: In place of an error that names no key and arose in one of them.
    """
    try:
        yield
    except Exception as error:
        running = [
            frame.f_locals.get('self') for frame, _ in traceback.walk_tb(error.__traceback__)
        ]
        for key, module in modules.items():
            if not is_named(error) and any(one is module for one in running):
                raise ValueError(f'`{key}`: {said(error)}') from error
        raise


def is_named(error: Exception) -> bool:
    """Whether an error begins with a config key, or is none that a config is to blame for."""
    if isinstance(error, NOT_OF_THE_CONFIG):
        return True
    # Some errors of the frameworks begin with a name in backticks too, of types that ours have not.
    ours = isinstance(error, ValueError) or _raised_in(error).startswith('mmdistill_ext.')
    return ours and _text(error).startswith('`')


def said(error: Exception) -> str:
    """Type and message of an error; without a message, the line of code that raised it."""
    text = _text(error)
    frames = traceback.extract_tb(error.__traceback__)
    if not text and frames:
        text = frames[-1].line or ''
    return text if isinstance(error, ValueError) and text else f'{type(error).__name__}: {text}'


def _raised_in(error: Exception) -> str:
    """Name of the module that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get('__name__')) if frames else ''


def _text(error: Exception) -> str:
    first = error.args[0] if error.args else ''
    return first if isinstance(first, str) else str(error)


def failing_part(error: Exception, cfg: Any) -> list[str] | None:
    """Path in a config of the innermost part that was being built; None when none of it was."""
    path: list[str] | None = None
    part = cfg
    for node in _built(error):
        below = _find(part, node)
        if below is not None:
            path = [*(path or ()), *below]
        else:  # a loop builds what stands elsewhere in the config
            below = _find(cfg, node) if isinstance(node, Mapping) else None
            if below is None:
                continue
            path = below
        part = node
    return path


def _built(error: Exception) -> Iterator[Any]:
    """The configs that were being built when an error arose, from the outermost one inwards."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is build_from_cfg.__code__:
            yield frame.f_locals.get('cfg')


def _find(cfg: Any, node: Any) -> list[str] | None:
    """Path of a node in a config: itself, or one that is equal, or else of the same type."""
    nodes = list(_walk(cfg, ()))
    for same in (_is, _equals, _has_type):
        found = [path for path, other in nodes if same(other, node)]
        if found and (isinstance(node, Mapping) or len(found) == 1):
            return [str(key) for key in found[0]]
    return None


def _is(one: Any, other: Any) -> bool:
    return one is other and isinstance(other, Mapping)


def _equals(one: Any, other: Any) -> bool:
    try:
        alike = type(one) is type(other) or (
            isinstance(one, Mapping) and isinstance(other, Mapping)
        )
        return alike and bool(one == other)
    except (ValueError, RuntimeError):  # arrays have no one answer
        return False


def _has_type(one: Any, other: Any) -> bool:
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)) or 'type' not in other:
        return False
    return 'type' in one and one['type'] == other['type']


def _walk(node: Any, path: tuple) -> Iterator[tuple[tuple, Any]]:
    yield path, node
    items: Any = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    for key, value in items:
        yield from _walk(value, (*path, key))
