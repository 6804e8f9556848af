"""Random mutants of valid configs: a value, a type or a name is changed, and the run is tried.

``python -m tests.mutants --count 600`` tries so many, each in a forked process, and prints what
came of them: it trained, it was refused at the start by its key, it was refused without the key, or
it failed late, after the first iteration.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from os import devnull
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from mmdistill_ext import cli
from tests import tiny_seg
from tests.mutant_configs import CONFIGS, Folder

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1.5, 1e10, 1e30),
    *(float('nan'), float('inf'), 'no', '', 'nothing', [], [0, 0, 0], [1], {}, dict(a=1)),
)
OUTCOMES = ('trains', 'by key', 'without key', 'late')
FORK = get_context('fork')
TIMEOUT = 120
Path_ = tuple[object, ...]
Owner = Any
Key = Any
Changed = tuple[tuple, str]


@dataclass(frozen=True)
class Mutant:
    """A config with one change.

    Args:
        source: Name of the valid config.
        path: Where it was changed, down to the key.
        change: What was done there.
        cfg: The changed config.
    """

    source: str
    path: Path_
    change: str
    cfg: Config

    def __str__(self) -> str:
        return f'{self.source}: {".".join(map(str, self.path))} {self.change}'


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant.

    Args:
        name: One of ``OUTCOMES``.
        error: Type and message of the error; empty if it trains.
    """

    name: str
    error: str = ''


def roots(cfg: Config) -> list[Path_]:
    """The parts of a config that are this package's."""
    found: list[Path_] = [('model',)]
    found += [('custom_hooks', place) for place in range(len(cfg.get('custom_hooks', ())))]
    found += [('default_hooks', 'checkpoint', 'save_best')]
    if 'constructor' in cfg.optim_wrapper:
        found += [('optim_wrapper',), ('val_evaluator',)]
    for place, step in enumerate(cfg.train_dataloader.dataset.get('pipeline', ())):
        if 'MakeViews' in str(step.type):
            found.append(('train_dataloader', 'dataset', 'pipeline', place))
    return found


def places(node: object, path: Path_) -> Iterator[Path_]:
    """Paths of everything under a node that has a key."""
    items = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(node: Any, path: Path_) -> Any:
    for key in path:
        node = node[key]
    return node


def of_a_model(path: Path_) -> bool:
    """Whether this is inside of a student's or teacher's own model."""
    inner = path[1:]
    return inner[:1] == ('student',) or inner[:2] == ('teacher', 'model') or 'students' in inner[:1]


def mutant(cfg: Config, source: str, draw: random.Random) -> Mutant:
    """Change one thing; what is inside of a student or teacher is drawn less often."""
    cfg = copy.deepcopy(cfg)
    root = draw.choice(roots(cfg))
    found = [path for path in (root, *places(at(cfg, root), root)) if len(path) > 1]
    weights = [0.15 if of_a_model(path) and len(path) > 4 else 1.0 for path in found]
    (path,) = draw.choices(found, weights)
    owner, value = at(cfg, path[:-1]), at(cfg, path)
    ways: list[Callable] = [other_value] * 4
    if isinstance(owner, dict):
        ways += [drop, rename]
    if isinstance(value, dict):
        ways += [add, add, in_a_list]
    if isinstance(value, str) or callable(value):
        ways += [misspell] * 3
    key, change = draw.choice(ways)(owner, path[-1], draw)
    return Mutant(source, (*path[:-1], *key), change, cfg)


def other_value(owner: Owner, key: Key, draw: random.Random) -> Changed:
    value = copy.deepcopy(draw.choice([x for x in VALUES if x is not owner[key]]))
    owner[key] = value
    return (key,), f'= {value!r}'


def misspell(owner: Owner, key: Key, draw: random.Random) -> Changed:
    value = owner[key]
    owner[key] = misspelt(value if isinstance(value, str) else value.__name__, draw)
    return (key,), f'= {owner[key]!r}'


def in_a_list(owner: Owner, key: Key, draw: random.Random) -> Changed:
    owner[key] = [owner[key]]
    return (key,), 'is in a list'


def drop(owner: Owner, key: Key, draw: random.Random) -> Changed:
    del owner[key]
    return (key,), 'is dropped'


def rename(owner: Owner, key: Key, draw: random.Random) -> Changed:
    name = misspelt(key, draw)
    owner[name] = owner.pop(key)
    return (name,), f'was {key}'


def add(owner: Owner, key: Key, draw: random.Random) -> Changed:
    name = misspelt('weight', draw)
    owner[key][name] = 1
    return (key, name), 'is added'


def misspelt(name: str, draw: random.Random) -> str:
    """The name with two letters exchanged, one doubled, or one left out."""
    place = draw.randrange(max(1, len(name)))
    head, tail = name[:place], name[place:]
    changed = draw.choice([f'{head}{tail[:1]}{tail}', f'{head}{tail[1:]}', f'{tail}{head}'])
    return changed if changed not in (name, '') else f'{name}x'


class StopAfter(Hook):
    """Ends a run after an iteration."""

    class Done(Exception):
        pass

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 >= self.iterations:
            raise self.Done


def attempt(made: Mutant, folder: Path, stop_after: int | None = None) -> Outcome:
    """Build and start the run of a mutant; two iterations and a validation, or up to a stop."""
    runner = None
    cfg = made.cfg
    cfg.work_dir = str(folder)
    unformatted = property(lambda self: str(self._cfg_dict))  # formatting takes most of the time
    try:
        tiny_seg.forget_runs()
        with mock.patch.object(Config, 'pretty_text', unformatted):
            runner = cli.build_runner(cfg)
            if stop_after is not None:
                runner.register_hook(StopAfter(stop_after), 'VERY_LOW')
            cli.train(runner)
    except StopAfter.Done:
        pass
    except Exception as error:  # whatever it is, it is what a user sees
        message = f'{type(error).__name__}: {error}'
        done = runner is not None and (_iterations(runner) > 0)
        return Outcome('late' if done else named(message, made.path), message)
    return Outcome('trains')


def _iterations(runner: object) -> int:
    with suppress(Exception):
        return runner.iter
    return 0


def named(message: str, path: Path_) -> str:
    """Whether an error's message names the key at a path."""
    return 'by key' if names_key(message, path) else 'without key'


def names_key(message: str, path: Path_) -> bool:
    """Whether a message names the key that is wrong, as a user would look for it.

    The part that owns the key has to be named (``losses.sel``, ``StartCheckHook``), and, but for
    what is inside of a student's or teacher's model, the key itself.
    """
    top, *inner = path
    leaf = str(next((x for x in reversed(path) if isinstance(x, str)), ''))
    parts = ['.'.join(map(str, path[:end])) for end in range(2, len(path) + 1)]
    if top != 'model' and any(f'`{part}`' in message for part in parts):
        return True
    if top == 'model' and inner[0] == 'type':
        return '`model`' in message
    if top == 'custom_hooks':
        return 'Hook' in message and (leaf in message or leaf == 'custom_hooks' or len(inner) == 1)
    if top == 'default_hooks':
        return 'save_best' in message or 'default_hooks.checkpoint' in message
    if top == 'optim_wrapper':
        return 'optim_wrapper' in message
    if top == 'val_evaluator':
        return 'valuator' in message
    if top == 'train_dataloader':
        return 'MakeViews' in message
    owner = '.'.join(map(str, inner[:2])) if inner[0] in ('losses', 'students') else str(inner[0])
    if of_a_model(path) and len(inner) > 1:
        owner = owner if inner[0] == 'students' and len(inner) > 2 else str(inner[0])
        return f'`{owner}' in message or f'`model.{owner}' in message
    return owner in message and leaf in message


def in_a_fork(made: Mutant, folder: Path, stop_after: int | None = None) -> Outcome:
    """The outcome, from a forked process, so that mutants do not disturb each other."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_child, args=(there, made, folder, stop_after), daemon=True)
    process.start()
    there.close()
    try:
        outcome = here.recv() if here.poll(TIMEOUT) else Outcome('late', 'it hangs')
    except EOFError:
        outcome = Outcome('late', 'the process died')
    process.kill()
    process.join()
    return outcome


def _child(pipe: Connection, made: Mutant, folder: Path, stop_after: int | None) -> None:
    torch.set_num_threads(1)
    with open(devnull, 'w') as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        pipe.send(attempt(made, folder, stop_after))


def mutants(folder: Folder, count: int, seed: int) -> Iterator[Mutant]:
    """So many mutants, of each valid config in turn; the same ones for the same seed."""
    draw = random.Random(seed)
    valid = [(make.__name__, make(folder)) for make in CONFIGS]
    for place in range(count):
        source, cfg = valid[place % len(valid)]
        yield mutant(cfg, source, draw)


def main() -> None:
    """Try mutants and print what came of them; exit with 1 if one fails without its key or late."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=600)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name))
        gc.freeze()  # mmengine collects garbage whenever it makes a data set
        for place, made in enumerate(mutants(folder, args.count, args.seed)):
            outcome = in_a_fork(made, Path(name, 'work', str(place)))
            counts[outcome.name] += 1
            if outcome.name in OUTCOMES[2:]:
                print(f'{outcome.name}: {made}\n    {outcome.error[:600]}', flush=True)
    print({name: counts[name] for name in OUTCOMES})
    sys.exit(int(any(counts[name] for name in OUTCOMES[2:])))


if __name__ == '__main__':
    main()
