"""The scores of several networks over a run: written by the validations, read to export (COL-7)."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

from mmengine.logging import print_log

from mmdistill_ext.checkpoint import load_weights, write_atomic

SCORES = 'networks.json'
"""File of a collaborative run's folder with every validation's scores."""


def record_scores(
    folder: str | os.PathLike, iteration: int, entry: Mapping[str, object]
) -> dict[int, dict]:
    """Add a validation to the file and drop those recorded at the same or a later iteration.

    A run that was resumed from an earlier checkpoint never reached the later ones.

    Args:
        folder: The run's folder.
        iteration: Iteration at which the networks were validated.
        entry: ``metric``, ``scores`` and ``weights`` by network, and the name of the ``best``.

    Returns:
        Iteration -> entry, all that the file holds.
    """
    path = Path(folder, SCORES)
    history = _read_or_put_aside(path) if path.is_file() else {}
    history = {at: known for at, known in history.items() if at < iteration}
    history[iteration] = dict(entry)
    text = json.dumps(history, indent=2)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))
    return history


def best_network(checkpoint: str | os.PathLike) -> str:
    """The best network at the last validation up to the time a checkpoint was written.

    Args:
        checkpoint: The path of a checkpoint, in the folder of its run.

    Raises:
        FileNotFoundError: There is no ``networks.json`` beside the checkpoint.
        ValueError: There was no validation until then, or a file is damaged.
    """
    path = Path(checkpoint).parent / SCORES
    if not path.is_file():
        raise FileNotFoundError(
            f"`network`='best' needs the run's {SCORES} beside the checkpoint, which "
            f"`CollaborationHook` writes. There is no '{path}': name a network."
        )
    history = _read(path)
    until = load_weights(checkpoint)['meta'].get('iter', math.inf)
    known = [at for at, entry in history.items() if at <= until and entry['best']]
    if not known:
        raise ValueError(
            f"`network`='best' needs a validation before the checkpoint's iteration {until}. "
            f"'{path}' has those of the iterations {[str(at) for at in history]}: name a network."
        )
    return history[max(known)]['best']


def _read_or_put_aside(path: Path) -> dict[int, dict]:
    """What a file holds; a damaged one is renamed, because a run should not end for it."""
    try:
        return _read(path)
    except ValueError as error:
        aside = path.with_name(f'{path.name}.damaged')
        path.replace(aside)
        print_log(f"{error} It is kept as '{aside}'.", 'current', logging.WARNING)
        return {}


def _read(path: Path) -> dict[int, dict]:
    """Iteration -> entry.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        history = {int(iteration): dict(entry) for iteration, entry in content.items()}
        best = [entry['best'] for entry in history.values()]
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # no JSON, or no such dict
        raise ValueError(
            f"'{path}' should hold the scores of validations, iteration -> entry. It is damaged "
            f'({type(error).__name__}: {error}): name a network, or delete the file.'
        ) from None
    if not all(name is None or isinstance(name, str) for name in best):
        raise ValueError(f"'{path}' should name the `best` network of a validation. Found {best}.")
    return history
