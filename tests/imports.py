"""The imports of Python files, read without running them."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arrow:
    """One import: ``source`` imports ``target``, both dotted names of modules."""

    source: str
    target: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f'{self.file}:{self.line}: {self.source} -> {self.target}'


def module_name(file: Path) -> str:
    """Dotted name of a file whose path is relative to the root; a package's is its folder's."""
    parts = file.with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports_of(root: Path, package: str) -> tuple[set[str], list[Arrow]]:
    """Names of a package's modules, and all their imports.

    Imports inside functions and under ``TYPE_CHECKING`` are there too. What is imported from a
    package is a module where the package has one of this name, else the package itself.
    """
    files = [path.relative_to(root) for path in sorted((root / package).rglob('*.py'))]
    modules = {module_name(file) for file in files}
    arrows = []
    for file in files:
        for name, line in _imported(ast.parse((root / file).read_text()), file):
            while name.startswith(f'{package}.') and name not in modules:
                name = name.rpartition('.')[0]
            arrows.append(Arrow(module_name(file), name, file, line))
    return modules, list(dict.fromkeys(arrows))


def _imported(tree: ast.AST, file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(file.parts[: len(file.parts) - node.level]) if node.level else ''
            base = '.'.join(part for part in (base, node.module) if part)
            yield from ((f'{base}.{alias.name}', node.lineno) for alias in node.names)


def circles(arrows: Iterable[Arrow]) -> Iterator[list[Arrow]]:
    """For each arrow that is part of a circle, the shortest one; each circle once."""
    starting: dict[str, list[Arrow]] = {}
    for arrow in arrows:
        starting.setdefault(arrow.source, []).append(arrow)
    seen = set()
    for arrow in arrows:
        circle = _way(starting, arrow)
        if circle and frozenset(circle) not in seen:
            seen.add(frozenset(circle))
            yield circle


def _way(starting: dict[str, list[Arrow]], first: Arrow) -> list[Arrow]:
    """The shortest way along arrows from ``first`` back to its source; empty where none is."""
    ways, reached = [[first]], {first.target}
    while ways:
        way = ways.pop(0)
        if way[-1].target == first.source:
            return way
        for arrow in starting.get(way[-1].target, []):
            if arrow.target not in reached:
                reached.add(arrow.target)
                ways.append([*way, arrow])
    return []
