"""The blocks of code in README.md and docs/, and what of a config in them can be checked."""

import ast
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry

from mmdistill_ext import registry
from mmdistill_ext.distillers.build_terms import OF_FEATURES, OF_HEADS, SCHEDULE
from mmdistill_ext.distillers.extension import INNER_MODELS
from mmdistill_ext.units import pairing
from mmdistill_ext.units.dense.family import DENSE_FAMILIES
from mmdistill_ext.units.pixel import head_logits

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
NOT_RUN = re.compile(r'<!-- not run: (.+) -->\s*$')
REGISTRIES = {
    id(value): value
    for module in (registry, mmengine_registry)
    for value in vars(module).values()
    if isinstance(value, Registry)
}.values()
# Of the dicts under `losses`: what the distiller reads, not the loss.
TERM_KEYS = {*SCHEDULE, *OF_HEADS, *OF_FEATURES}


@dataclass(frozen=True)
class Block:
    """A fenced block: its text, language and place, and why it is not run, if it is not."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for fence in re.finditer(r'^```(\w+)\n(.*?)^```$', text, re.DOTALL | re.MULTILINE):
        before = text[: fence.start()]
        mark = NOT_RUN.search(before)
        yield Block(page, before.count('\n') + 1, fence[1], fence[2], mark and mark[1])


def is_program(block: Block) -> bool:
    """Whether a block imports or defines something; otherwise it is a config."""
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    return any(isinstance(node, kinds) for node in ast.parse(block.text).body)


@contextmanager
def program(block: Block) -> Iterator[dict[str, Any]]:
    """Run a block as a module; afterwards nothing is registered that it registered.

    Yields:
        Its names.
    """
    names = {'__name__': f'document_{block.page.stem}_{block.line}'}
    try:
        exec(compile(block.text, str(block), 'exec', dont_inherit=True), names)
        yield names
    finally:
        forget(names['__name__'])


def forget(module: str) -> None:
    """Take what a module has registered out of every registry, and nothing else.

    Registries are not put back as they were: frameworks fill theirs when they are first used.
    """
    pending = list(REGISTRIES)
    while pending:
        registered = pending.pop()
        pending += registered.children.values()
        for name in of_module(registered.module_dict, module):
            del registered.module_dict[name]
            if registered is registry.MODELS:
                INNER_MODELS.pop(name, None)
    for head in of_module(DENSE_FAMILIES._families, module):
        del DENSE_FAMILIES._families[head]
    for head in of_module(head_logits.TABLE, module):
        del head_logits.TABLE[head]
    pairing.TABLE[:] = [row for row in pairing.TABLE if row.pair.__module__ != module]


def of_module(table: dict, module: str) -> list:
    """Keys of the classes and functions that are of a module."""
    return [key for key, value in table.items() if getattr(value, '__module__', None) == module]


def check_types(cfg: object, term: bool = False) -> None:
    """Raise where a ``type`` is not registered, or is of this package and lacks an argument.

    Args:
        cfg: Dicts, lists and values of a config.
        term: Whether it is a dict of losses, which have keys for the distiller.
    """
    if isinstance(cfg, dict):
        for key in cfg.keys() & {'type', 'constructor'}:
            check_arguments(cfg, key, TERM_KEYS if term else set())
        for key, value in cfg.items():
            for part in value.values() if key == 'losses' else [value]:
                check_types(part, term=key == 'losses')
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            check_types(value)


def check_arguments(cfg: dict, key: str, others: set[str]) -> None:
    """Raise as :func:`check_types` does, for one dict; frameworks may build theirs otherwise."""
    built = next(filter(None, (find(registry, cfg, key) for registry in REGISTRIES)), None)
    if built is None:
        raise ValueError(f'`{key}={cfg[key]!r}` is in no registry')
    parameters = inspect.signature(built).parameters.values()
    open_ended = any(x.kind is x.VAR_KEYWORD for x in parameters)
    if key == 'constructor' or open_ended or not built.__module__.startswith('mmdistill_ext'):
        return
    unknown = cfg.keys() - {key, '_delete_', '_scope_'} - {x.name for x in parameters} - others
    if unknown:
        raise ValueError(f'`{cfg[key]}` has no arguments {sorted(unknown)}')


def find(registry: Registry, cfg: dict, key: str) -> type | None:
    """Look up as building does, in this package's scope or else in the config's."""
    with registry.switch_scope_and_registry(cfg.get('_scope_')) as scoped:
        return registry.get(cfg[key]) or scoped.get(cfg[key])
