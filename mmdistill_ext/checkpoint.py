"""Read weights without running code, write files whole or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from mmdistill_ext.checkpoint_content import check_content
from mmdistill_ext.safe_loading import locate, read

TEMPORARY = '.mmdistill-'
"""What the names of files that are being written begin with."""
CONNECTORS = 'connectors.'
"""Prefix of those keys of a training checkpoint that the plain student does not have: what terms
learn or remember."""
_WRAPPERS = re.compile(r'^((module|_orig_mod)\.)+')  # of DDP and torch.compile
LEFTOVERS = {
    'the normalisation, which is in the config': r'(.+\.)?data_preprocessor\.(mean|std)',
    'averages that mmdet 2 kept beside the weights': r'ema_\w+',
    'a head that only training needs': r'(auxiliary_head|decoder\.aux_reg_branches)\..+',
    'a head of masks, which no box needs': r'roi_head\.mask_head\..+',
}
"""What a checkpoint may have besides a whole model: why it is not needed -> names."""


def load_weights(
    source: str | os.PathLike, key: str = 'checkpoint', connectors: bool = False
) -> dict:
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
    source = os.fspath(source)
    return weights_of(read(locate(source, key), key, source), source, key, connectors)


def weights_of(content: Any, source: str, key: str, connectors: bool = False) -> dict:
    """Weights and meta data of what a checkpoint holds; arguments as of :func:`load_weights`.

    Raises:
        ValueError: It is no checkpoint of a model.
    """
    check_content(content, key, source, weights=True)
    state = content.get('state_dict', content)
    state = {_WRAPPERS.sub('', name): value for name, value in state.items()}
    if not connectors:
        state = {k: v for k, v in state.items() if not k.startswith(CONNECTORS)}
    meta = content.get('meta') if 'state_dict' in content else None
    return dict(state_dict=state, meta=meta or {})


def load_exactly(
    model: nn.Module, state: Mapping[str, Tensor], what: str, more: bool = False
) -> None:
    """Fill a model with weights that match it exactly: every key is there, every shape is equal.

    The model may rename keys of older releases while it loads them, as FCOS's head does.
    ``num_batches_tracked`` may be missing (older checkpoints have none). What published
    checkpoints have besides (:data:`LEFTOVERS`) is left out, and logged.

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
    unexpected = [] if more else _without_leftovers(unexpected, what)
    problems = [
        f'{len(found)} {label} (e.g. {"; ".join(found[:3])})'
        for label, found in (
            ('missing keys', missing),
            ('unexpected keys', unexpected),
            ('different shapes', shapes),
        )
        if found
    ]
    if problems:
        raise ValueError(f'{what} is of another model than its config: {", ".join(problems)}.')


def _without_leftovers(names: list[str], what: str) -> list[str]:
    """Those of the unexpected names that nothing explains."""
    for why, pattern in LEFTOVERS.items():
        known = [name for name in names if re.fullmatch(pattern, name)]
        names = [name for name in names if name not in set(known)]
        if known:
            print_log(f'{what}: {len(known)} left out ({known[0]}, ...): {why}.', 'current')
    return names


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
