"""A function in two processes that form a group over gloo, as in distributed training."""

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.multiprocessing.spawn import ProcessContext, ProcessException

from tests.devices import on_device

TIMEOUT = 240.0
FAILURE = 'failure.txt'


def in_two_ranks(
    function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """Call ``function(rank, *arguments)`` in ranks 0 and 1; return what each rank returned.

    Args:
        function: One that a new process can import, so of a module's top level.
        arguments: Are pickled; the same for both ranks.
        timeout: Seconds for both, with the start of the processes.

    Raises:
        RuntimeError: With the rank and the traceback of the first failure: the other rank mostly
            fails too, of a lost connection. Both are ended.
        TimeoutError: Names the ranks that still run. Both are ended.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        job = (function, arguments, folder, torch.get_default_device())
        context = multiprocessing.spawn(_rank, job, nprocs=2, join=False)
        try:
            _join(context, timeout, function.__name__)
        except ProcessException as error:
            if not (folder / FAILURE).exists():  # died without an exception of Python
                raise
            raise RuntimeError((folder / FAILURE).read_text()) from error
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(2)]


def _join(context: ProcessContext, timeout: float, name: str) -> None:
    deadline = time.monotonic() + timeout
    while not context.join(max(deadline - time.monotonic(), 0)):  # returns when one has ended
        running = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
        if running and time.monotonic() >= deadline:
            raise TimeoutError(f'`{name}` still runs in ranks {running} after {timeout} seconds')


def _rank(
    rank: int, function: Callable, arguments: tuple, folder: Path, device: torch.device
) -> None:
    torch.set_num_threads(1)
    meeting = f'file://{folder}/meeting'  # takes no port that another test could take
    distributed.init_process_group('gloo', init_method=meeting, rank=rank, world_size=2)
    try:
        with on_device(device):
            torch.save(function(rank, *arguments), folder / f'{rank}.pt')
    except Exception:
        with suppress(FileExistsError), (folder / FAILURE).open('x') as file:
            file.write(f'`{function.__name__}` failed in rank {rank}:\n{traceback.format_exc()}')
        raise
    finally:
        distributed.destroy_process_group()
