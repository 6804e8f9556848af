"""Every checkpoint is read here, and nothing in it is executed: ours and those mmengine loads.

mmengine's ``CheckpointLoader`` is what reads pretrained weights (``init_cfg``, ``pretrained``),
``load_from``, ``resume`` and what inferencers are given. Importing this package lets it read
through :func:`read`, whatever the scheme of the file is.
"""

from __future__ import annotations

import argparse
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import IO, Any

import torch

from mmdistill_ext.checkpoint_content import check_content
from mmdistill_ext.compat import allow_training_checkpoints, mend
from mmdistill_ext.download import download, is_url

_KEYS: dict[str, str] = {}
_TRUSTED: set[str] = set()
_ONE_LOAD = threading.RLock()
_unpickle = torch.load


def add_trust_argument(parser: argparse.ArgumentParser, nargs: str | None = '+') -> None:
    """Add the option ``--trust``, which names files for :func:`trust`.

    Args:
        parser: The parser.
        nargs: None for one file each time that the option is given, where it stands before
            positional arguments.
    """
    parser.add_argument(
        '--trust',
        action='extend' if nargs else 'append',
        nargs=nargs,
        default=[],
        metavar='SOURCE',
        help='checkpoints, files or URLs as the config names them, that may run any code on this '
        'machine while they are loaded: only for those whose author you trust',
    )


def trust(*sources: str | os.PathLike) -> None:
    """Let checkpoints be unpickled in full, with whatever code they bring, and unhashed.

    Args:
        *sources: Files or URLs, as configs and options name them.
    """
    _TRUSTED.update(_same(os.fspath(source)) for source in sources)


def name_sources(cfg: object, prefix: str = '') -> None:
    """Remember which key of a config names which checkpoint, for errors.

    Args:
        cfg: A config or a part of it.
        prefix: The part's key.
    """
    _KEYS.update((source, key) for key, source in _strings(cfg, prefix))


def key_of(source: str) -> str:
    """The config key that names a checkpoint, ``'checkpoint'`` for one that no config names."""
    return _KEYS.get(source, 'checkpoint')


def locate(source: str | os.PathLike, key: str = 'checkpoint') -> Path:
    """The local file of a checkpoint; a URL is downloaded.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The URL cannot be downloaded.
    """
    source = os.fspath(source)
    if is_url(source):
        return download(source, key, check_hash=_same(source) not in _TRUSTED)
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"`{key}` should be an existing file or a URL. Found '{source}'.")
    return path


def read(
    file: Path | str | IO[bytes], key: str, source: str, map_location: Any = 'cpu'
) -> Any:  # what a checkpoint may hold
    """Unpickle a file; only tensors and plain data come out of it, unless it is trusted.

    Args:
        file: What to read.
        key: The config key to name in errors.
        source: What that key names: the same file or a URL.
        map_location: As for ``torch.load``.

    Raises:
        ValueError: The file is damaged, or needs code to unpickle.
    """
    is_trusted = _same(source) in _TRUSTED
    allow_training_checkpoints()
    try:
        return _unpickle(file, map_location=map_location, weights_only=not is_trusted)
    except UnpicklingError as error:
        found = _code_in(file, error)
        if found:
            raise ValueError(
                f"`{key}` should hold weights only. '{source}' needs code to unpickle and is "
                f'refused; found in it: {", ".join(found)}. If you trust its author with this '
                f'machine: `--trust {source}`.'
            ) from None
        raise _damaged(file, key, source, error) from None
    except Exception as error:  # damaged pickles raise anything
        raise _damaged(file, key, source, error) from None


def guard_mmengine() -> None:
    """Let mmengine's ``CheckpointLoader`` read through this module; a second time does nothing."""
    from mmengine.runner import checkpoint as module

    load = module.CheckpointLoader.load_checkpoint.__func__
    if hasattr(load, '__wrapped__'):
        return

    @wraps(load)
    def load_safely(
        cls: type, filename: str, map_location: Any = None, logger: Any = 'current'
    ) -> Any:
        filename = os.fspath(filename)
        key = key_of(filename)
        if '://' not in filename:
            locate(filename, key)
        with _ONE_LOAD, _reading_for(module, key, filename):
            content = load(cls, filename, map_location, logger)
        if str(map_location) != 'meta':  # then values are not wanted
            check_content(content, key, filename)
        return content

    module.CheckpointLoader.load_checkpoint = classmethod(load_safely)


@contextmanager
def _reading_for(module: ModuleType, key: str, source: str) -> Iterator[None]:
    """Put :func:`read` in the place of what the loaders of all schemes call in the end."""

    def load(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return read(file, key, source, map_location)

    def load_url(
        url: str, model_dir: str | None = None, map_location: Any = None, **kwargs: Any
    ) -> Any:
        path = download(url, key, check_hash=_same(source) not in _TRUSTED)
        return read(path, key, source, map_location)

    changed = ((torch, 'load', load), (module, 'load_url', load_url))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    try:
        for owner, name, function in changed:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def _same(source: str) -> str:
    """One name for a file, however it is written; schemes are left alone."""
    return source if '://' in source else os.path.realpath(os.path.expanduser(source))


def _strings(node: object, key: str) -> Iterator[tuple[str, str]]:
    """Key and value of all strings in a config."""
    if isinstance(node, (str, os.PathLike)):
        yield key, os.fspath(node)
        return
    items: Iterable = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    for name, value in items:
        yield from _strings(value, f'{key}.{name}' if key else str(name))


def _code_in(file: Any, error: UnpicklingError) -> list[str]:
    """What a refused file wants to call or to build."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(file))
    except Exception:  # PyTorch < 2.6, no zip archive, no path, or damaged
        found = re.findall(r'[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)', str(error))
    return sorted(set(found))


def _damaged(file: Any, key: str, source: str, error: Exception) -> ValueError:
    first = (str(error).splitlines() or [''])[0]
    place = f"'{source}'"
    advice = 'Copy or save it again.'
    if isinstance(file, (str, os.PathLike)) and os.fspath(file) != source:
        place += f" (kept as '{file}')"
        advice = 'Delete the copy to download it again.' if '://' in source else advice
    return ValueError(
        f'`{key}` should be a complete PyTorch checkpoint. {place} cannot be read, it is '
        f'truncated, damaged, or something else. {type(error).__name__}: {first} {advice}'
    )


mend(guard_mmengine, 'safe loading of checkpoints by mmengine')
