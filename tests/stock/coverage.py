"""Writes docs/coverage.md from what the stock configs do: ``python -m tests.stock.coverage``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase

LETTERS = ascii_uppercase
PAGE = Path(__file__).resolve().parents[2] / 'docs/coverage.md'
INTRO = (
    '# What distils\n\n'
    'One stock config for each kind of head that MMSegmentation and MMDetection ship, shrunk, with '
    'a teacher of the same kind and another width, for one training step of everything named in '
    'the columns. `python -m tests.stock.coverage` runs them and writes this page; the tests run '
    'them again, for detectors all but the column **together**, and compare.\n\n'
    '- **classes**, **boxes**, **masks**, **pixels**: `KDLoss` and `SelectiveLoss` on the head '
    'that predicts, `KDLoss` with `box=...`, and on the mask head;\n'
    "- **fit**: FIT, the head's own loss split by unit;\n"
    "- **features**: a loss of the backbone's maps, with a connector;\n"
    '- **together**: two networks without a teacher (`CollaborativeDistiller`);\n'
    '- **learns from**: whose teachers the head can have, by the default heads.\n\n'
    'A number says why not, below the table: that is the error at the start of such a run.\n'
)


def main() -> None:
    """Run everything, write the page."""
    from mmengine.logging import MMLogger

    from tests.stock import outcomes, segmenters

    MMLogger.get_current_instance().setLevel(logging.ERROR)
    parts = dict(segmenters=segmenters.rows(), detectors=outcomes.rows())
    PAGE.write_text('\n'.join([INTRO, *(_section(*part) for part in parts.items())]))


def _section(title: str, rows: list[dict[str, str]]) -> str:
    """A table; what is neither yes nor short is said below it, by number or by letter."""
    reasons: list[str] = []
    groups: list[str] = []
    lines = [f'## {title.capitalize()}', '', _line(rows[0]), _line(['---'] * len(rows[0]))]
    for row in rows:
        cells = []
        for column, text in row.items():
            if column == 'learns from' and len(text) > 80:
                cells.append(f'group {LETTERS[_place(text, groups)]}')
            elif column in ('config', 'head', 'learns from', 'note') or len(text) < 10:
                cells.append(text)
            else:
                cells.append(f'no ({_place(text, reasons) + 1})')
        lines.append(_line(cells))
    lettered = (f'- Group {LETTERS[place]}: {text}.' for place, text in enumerate(groups))
    numbered = (f'{place}. {text}' for place, text in enumerate(reasons, 1))
    return '\n'.join([*lines, '', *lettered, '', *numbered, ''])


def _place(text: str, known: list[str]) -> int:
    """Where a text stands in a list, to which it is added if it is new."""
    if text not in known:
        known.append(text)
    return known.index(text)


def _line(cells: object) -> str:
    return f'| {" | ".join(cells)} |'


def published(title: str) -> dict[str, dict[str, str]]:
    """What the page says: config -> column -> text, reasons written out."""
    section = PAGE.read_text().partition(f'## {title.capitalize()}\n')[2].partition('\n## ')[0]
    lines = section.splitlines()
    reasons = dict(_reasons(lines))
    table = [line[2:-2].split(' | ') for line in lines if line.startswith('| ')]
    columns, _, *rows = table
    return {
        row[0]: {c: reasons.get(text, text) for c, text in zip(columns, row, strict=True)}
        for row in rows
    }


def _reasons(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        number, dot, text = line.partition('. ')
        if dot and number.isdigit():
            yield f'no ({number})', text


if __name__ == '__main__':
    main()
