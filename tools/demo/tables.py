"""Tables and curves that the page has for every task."""

import math
from html import escape

from figures import COLORS, curves, figure
from results import Demo, Model, curve, mean_score
from steps import shown

NAMES = dict(
    teacher='Teacher',
    student='Student alone',
    student_kd='Student, plain distillation',
    student_sel='Student, selective teacher',
    student_fit='Student, fit loss',
)


def table(header: list[str], rows: list[list[str | tuple[str, str]]], kind: str) -> str:
    """Return an HTML table; a cell is HTML, or HTML and a background colour."""
    lines = [''.join(f'<th>{cell}</th>' for cell in header)]
    for row in rows:
        cells = [cell if isinstance(cell, tuple) else (cell, 'none') for cell in row]
        lines.append(
            ''.join(f'<td style="background:{color}">{text}</td>' for text, color in cells)
        )
    body = ''.join(f'<tr>{line}</tr>' for line in lines)
    return f'<table class="{kind}">{body}</table>'


def dot(name: str) -> str:
    """A model's name with its colour."""
    return f'<i style="background:{COLORS[name]}"></i>{NAMES[name]}'


def swatches(pairs: list[tuple]) -> str:
    """Return coloured squares with names."""
    return ''.join(f'<span><i style="background:rgb{tuple(c)}"></i>{n}</span>' for n, c in pairs)


def score_table(demo: Demo) -> str:
    """Return the table of results; the best student's mean is bold."""
    best = max(model.mean for model in demo.students.values())
    rows = []
    for name, model in demo.models.items():
        is_best = name in demo.students and model.mean == best
        rows.append(
            [
                dot(name),
                f'<b>{model.mean:.1f}</b>' if is_best else f'{model.mean:.1f}',
                f'{mean_score(model.scores, demo.others):.1f}',
                f'{mean_score(model.scores, demo.mixed):.1f}',
                f'{model.last_mean:.1f}',
                f'{model.step_ms:.0f}',
                f'{demo.records[f"train {name}"]["seconds"] / 60:.1f}',
            ]
        )
    mean = demo.measure.mean
    header = ['', mean, 'other digits', f'digits {" and ".join(demo.mixed)}']
    header += [f'{mean} when training ended', 'ms per iteration', 'minutes to train']
    return table(header, rows, 'numbers')


def class_table(demo: Demo) -> str:
    """Return the table of scores per class, shaded by value."""

    def cell(value: float) -> tuple[str, str]:
        if math.isnan(value):
            return '-', 'none'
        return f'{value:.0f}', f'rgba(10, 143, 108, {0.6 * value / 100:.2f})'

    classes = [f'{name}*' if name in demo.mixed else name for name in demo.meta['classes']]
    rows = [[dot(name), *map(cell, model.scores.values())] for name, model in demo.models.items()]
    return table(['', *classes], rows, 'numbers')


def learning_curves(demo: Demo, loss: str, ylabel: str, text: str) -> str:
    """Return the pictures of the validation score and of a loss over the iterations.

    Args:
        demo: The demo.
        loss: The loss's name in the logs.
        ylabel: What it is.
        text: Caption of its picture.
    """
    students, mean = demo.students, demo.measure.mean

    def series(key: str, scale: float) -> list[tuple]:
        return [
            (NAMES[name], COLORS[name], *curve(model.scalars, key, scale))
            for name, model in students.items()
        ]

    level = ('Teacher, when finished', COLORS['teacher'], demo.models['teacher'].mean)
    scores = series(demo.measure.key, demo.measure.scale)
    return figure(curves(scores, f'{mean} (%)', level), f'Validation {mean}') + figure(
        curves(series(loss, 1.0), ylabel), text
    )


def teacher_curves(model: Model, lines: list[tuple[str, str, str]], ylabel: str) -> str:
    """Draw how often the teacher was better over the iterations.

    Args:
        model: A student that compares itself with the teacher, as the loss ``sel``.
        lines: (label, colour, class) of each curve; no class for all of them.
        ylabel: What is counted.

    Returns:
        A data URI.
    """
    series = []
    for label, color, name in lines:
        key = f'teacher_better/sel/{name}' if name else 'teacher_better/sel'
        series.append((label, color, *curve(model.scalars, key, 100)))
    return curves(series, ylabel)


def step_table(records: dict[str, dict]) -> str:
    """Return what was run, in the order of the start."""
    ordered = sorted(records.items(), key=lambda item: item[1]['started'])
    rows = []
    for name, record in ordered:
        start = record['started'] - ordered[0][1]['started']
        command = f'<code>{escape(shown(record["command"]))}</code>'
        rows.append([name, f'{start:.0f}', f'{record["seconds"]:.0f}', command])
    return table(['Step', 'Started at (s)', 'Took (s)', 'Command'], rows, 'steps')
