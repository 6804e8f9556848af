"""A run's folder: one run at a time, what killed runs left, and where to go on from."""

from __future__ import annotations

import logging
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.logging import print_log

from mmdistill_ext.checkpoint import TEMPORARY

if sys.platform != 'win32':
    import fcntl

LOCK = '.mmdistill.lock'
LATEST = 'last_checkpoint'
"""mmengine's file with the path of the checkpoint written last."""


@contextmanager
def locked(work_dir: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of the folder, and sweep it of what killed runs left half written.

    The system lifts the lock when the process ends, however it ends. Where the file system has no
    locks, a warning is all there is. Of a distributed run, the first process is to call it.

    Raises:
        ValueError: Another run works in the folder.
    """
    folder = Path(work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open('a+') as file:
        _lock(file.fileno(), folder)
        for left in folder.rglob(f'{TEMPORARY}*'):
            left.unlink(missing_ok=True)
        yield


def _lock(descriptor: int, folder: Path) -> None:
    if sys.platform == 'win32':
        return
    try:  # of the process: the loaders' processes that outlive it for a moment do not hold it
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"`work_dir` should be a folder that no other run works in. In '{folder}' one does: "
            'name another with --work-dir, or let them share it with --share-work-dir.'
        ) from None
    except OSError as error:
        print_log(f"'{folder}' cannot be locked: {error}.", 'current', logging.WARNING)


def latest_checkpoint(work_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint of the runs in a folder that can be read.

    It is the one that mmengine's ``last_checkpoint`` names. A run that was killed while it wrote
    may leave that file empty, or the checkpoint cut; then it is the newest one beside it that is
    whole, and a warning says so.

    Returns:
        Its path; None if there is none.
    """
    folder = Path(work_dir)
    note = folder / LATEST
    named = note.read_text().strip() if note.is_file() else None
    if named and ((os.path.exists(named) and _is_whole(named)) or '://' in named):
        return named
    for path in sorted(folder.glob('*.pth'), key=_iteration, reverse=True):
        if _iteration(path) >= 0 and _is_whole(path):
            problem = f'names {named!r}, which cannot be read' if named else 'names no checkpoint'
            print_log(
                f"'{note}' {problem}: goes on from the newest one that can be, {path}.",
                'current',
                logging.WARNING,
            )
            return str(path)
    return None


def _iteration(path: Path) -> int:
    """The iteration or epoch in the name of a checkpoint written at regular intervals; else -1."""
    match = None if path.name.startswith('best_') else re.search(r'(\d+)\.pth$', path.name)
    return int(match[1]) if match else -1


def _is_whole(path: str | os.PathLike) -> bool:
    """Whether the file was written to its end, where archives of PyTorch have their directory."""
    return zipfile.is_zipfile(path)
