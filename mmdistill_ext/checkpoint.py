"""Read weights without running code, write files whole or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from mmdistill_ext.compat import allow_training_checkpoints

TEMPORARY = '.mmdistill-'
"""What the names of files that are being written begin with."""
CONNECTORS = 'connectors.'
"""Prefix of those keys of a training checkpoint that the plain student does not have: what terms
learn or remember."""


def load_weights(source: str, key: str = 'checkpoint', connectors: bool = False) -> dict:
    """Load a checkpoint's weights and meta data; nothing in it is executed.

    Args:
        source: A local file or an ``http(s)://`` URL (downloaded once, to torch's hub folder).
        key: The config key to name in errors.
        connectors: Keep what a distiller learned besides the student.

    Returns:
        ``dict(state_dict=..., meta=...)``: the keys of the plain model, without ``module.`` before
        them; ``meta`` is empty for a bare state dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, is no checkpoint, or needs code to unpickle.
    """
    path = _download(source, key) if source.startswith(('http://', 'https://')) else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"`{key}` should be an existing file or a URL. Found '{source}'.")
    allow_training_checkpoints()
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        raise ValueError(_refusal(path, key, error)) from None
    except (RuntimeError, EOFError, OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"`{key}` should be a complete PyTorch checkpoint. '{source}' cannot be read, it may "
            f'be truncated: {_first_line(error)}'
        ) from None
    state = content.get('state_dict', content) if isinstance(content, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"`{key}` should hold a state dict of tensors. '{source}' does not.")
    state = {name.removeprefix('module.'): value for name, value in state.items()}
    if not connectors:
        state = {k: v for k, v in state.items() if not k.startswith(CONNECTORS)}
    return dict(
        state_dict=state,
        meta=content.get('meta', {}) if 'state_dict' in content else {},
    )


def _download(url: str, key: str) -> Path:
    path = Path(torch.hub.get_dir()) / 'checkpoints' / url.split('?')[0].rsplit('/', 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))  # writes beside, then renames
        except OSError as error:
            raise ValueError(f"`{key}` cannot be downloaded from '{url}': {error}.") from None
    return path


def _refusal(path: Path, key: str, error: UnpicklingError) -> str:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except (AttributeError, RuntimeError, ValueError):  # PyTorch < 2.6, or no zip archive
        found = re.findall(r'[Uu]nsupported (?:global: )?(?:GLOBAL|class) (\S+)', str(error))
    if found:
        return (
            f"`{key}` should hold weights only. '{path}' needs code to unpickle and is refused; "
            f'found in it: {", ".join(sorted(set(found)))}.'
        )
    return (
        f"`{key}` should be a complete checkpoint of weights only. '{path}' is refused: "
        f'{_first_line(error)}'
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_exactly(
    model: nn.Module, state: Mapping[str, Tensor], what: str, more: bool = False
) -> None:
    """Fill a model with weights that match it exactly: every key is there, every shape is equal.

    The model may rename keys of older releases while it loads them, as FCOS's head does.
    ``num_batches_tracked`` may be missing (older checkpoints have none).

    Args:
        model: The model.
        state: The weights.
        what: What they are, for errors.
        more: Accept weights that the model does not have.

    Raises:
        ValueError: Names what differs; the model may be filled in part.
    """
    own = model.state_dict()
    shapes = [
        f'{k}: {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the model'
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    missing, unexpected = model.load_state_dict(
        {k: v for k, v in state.items() if k not in own or v.shape == own[k].shape}, strict=False
    )
    misshapen = {line.partition(':')[0] for line in shapes}
    missing = [k for k in missing if not k.endswith('num_batches_tracked') and k not in misshapen]
    problems = [
        f'{len(found)} {label} (e.g. {"; ".join(found[:3])})'
        for label, found in (
            ('missing keys', missing),
            ('unexpected keys', [] if more else unexpected),
            ('different shapes', shapes),
        )
        if found
    ]
    if problems:
        raise ValueError(f'{what} is of another model than its config: {", ".join(problems)}.')


def write_atomic(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, then rename it: all or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}')
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
