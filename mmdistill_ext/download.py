"""Downloads checkpoints: whole or not at all, each URL to a place of its own."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import torch
from mmengine.logging import print_log

if sys.platform != 'win32':
    import fcntl

URL_SCHEMES = ('http://', 'https://')
TIMEOUT = 60  # seconds without an answer
CHUNK = 1 << 20
# `resnet50-0676ba61.pth`, `..._20200605_112030-abcdef12.pth`; eight digits after a dash may be a
# date: `model-20200605.pth`
_DIGEST = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$')


def is_url(source: str) -> bool:
    """Whether a checkpoint is to be downloaded."""
    return source.startswith(URL_SCHEMES)


def download(url: str, key: str = 'checkpoint', check_hash: bool = True) -> Path:
    """Return the local copy of a checkpoint, downloaded when there is none.

    It is kept in torch's hub folder, below a folder named after the whole URL: the ``latest.pth``
    of another host is another file. A name that ends in the hash of the content, as model zoos
    write them, is held to that; then a copy that mmengine or torch downloaded serves too.

    Args:
        url: ``http(s)://...``.
        key: The config key to name in errors.
        check_hash: Hold the file to the hash in its name.

    Raises:
        ValueError: The file cannot be downloaded whole, or its content is not what its name says.
    """
    name = Path(unquote(urlparse(url).path)).name or 'checkpoint.pth'
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    named = _DIGEST.search(name) if check_hash else None
    digest = named[1] if named else ''
    shared = folder / name
    if digest and shared.is_file() and _sha256(shared).startswith(digest):
        return shared
    path = folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_process(path.parent):
            if not path.is_file():
                _fetch(url, path, digest)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(
            f"`{key}` cannot be downloaded from '{url}' to '{path}': "
            f'{type(error).__name__}: {error}. Download it by other means and name the file.'
        ) from None
    return path


def _fetch(url: str, path: Path, digest: str) -> None:
    """Download beside the path, check, then rename."""
    handle, part = tempfile.mkstemp(dir=path.parent, suffix='.part')
    try:
        with (
            os.fdopen(handle, 'wb') as file,
            urlopen(Request(url, headers={'User-Agent': 'mmdistill_ext'}), timeout=TIMEOUT) as got,
        ):
            length = got.headers.get('Content-Length')
            size = f'{int(length) / 1e6:.1f} MB' if length else 'size unknown'
            print_log(f"Downloading '{url}' to '{path}', {size}", logger='current')
            sha256, written = hashlib.sha256(), 0
            while chunk := got.read(CHUNK):
                file.write(chunk)
                sha256.update(chunk)
                written += len(chunk)
        if length and written != int(length):
            raise ValueError(f'it was cut after {written} of {length} bytes')
        if not sha256.hexdigest().startswith(digest):
            raise ValueError(
                f'its content has the SHA-256 {sha256.hexdigest()[: len(digest)]}..., its name '
                f'says {digest} (`--trust {url}` takes it all the same)'
            )
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Let one process of this machine download; the others wait and find the file."""
    with open(folder / '.lock', 'w') as lock:
        if sys.platform != 'win32':
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()
