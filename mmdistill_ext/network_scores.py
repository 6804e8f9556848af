"""The scores of several networks over a run: written by the validations, read to export (COL-7)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

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
    history = _read(path) if path.is_file() else {}
    history = {at: known for at, known in history.items() if at < iteration}
    history[iteration] = dict(entry)
    text = json.dumps(history, indent=2)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))
    return history


def best_network(checkpoint: str) -> str:
    """The best network at the last validation up to the time a checkpoint was written.

    Args:
        checkpoint: The path of a checkpoint, in the folder of its run.

    Raises:
        FileNotFoundError: There is no ``networks.json`` beside the checkpoint.
        ValueError: There was no validation until then.
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


def _read(path: Path) -> dict[int, dict]:
    """Iteration -> entry."""
    content = json.loads(path.read_text(encoding='utf-8'))
    return {int(iteration): entry for iteration, entry in content.items()}
