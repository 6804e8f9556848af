"""Writes the demo's page: one self-contained HTML file."""

import json
import math
import os
import platform
import time
from html import escape
from pathlib import Path
from string import Template

import cv2
from figures import COLORS, bars, colored, curves, figure, png
from fit_section import fit_numbers, fit_state
from mmengine.config import Config
from results import VOID, Model, busy_seconds, curve, mean_iou, read_label, read_model, versions
from steps import shown

from mmdistill_ext.visualization import CONTRAST_COLORS, CONTRAST_VALUES

NAMES = dict(
    teacher='Teacher',
    student='Student alone',
    student_kd='Student, plain distillation',
    student_sel='Student, selective teacher',
    student_fit='Student, fit loss',
)
STUDENTS = [name for name in NAMES if name != 'teacher']
METHODS = dict(student_sel='the selective teacher (SEL)', student_fit='the fit loss (FIT)')
RIVALS = dict(student_kd='plain distillation', student='the student alone')
MARGIN = 3.0  # points of mIoU; one run cannot tell less apart
SCENES_SHOWN = 6
VOID_COLOR = (225, 225, 225)


def write_page(out: Path, records: dict[str, dict]) -> Path:
    """Write ``index.html`` from what the steps left behind.

    Args:
        out: Folder of the demo.
        records: Step -> record, see :func:`steps.run_steps`.

    Returns:
        The page.
    """
    student = Config.fromfile('configs/demo/student.py')
    meta = student.val_dataloader.dataset.metainfo
    manifest = json.loads((out / 'data' / 'manifest.json').read_text())
    mixed = [str(digit) for digit in manifest['mixed_up']]
    models = {name: read_model(out, name, meta.classes) for name in NAMES}
    text = Template(Path(__file__).with_name('page.html').read_text(encoding='utf-8')).substitute(
        verdict=verdict({name: models[name] for name in STUDENTS}, mixed),
        mixed=' and '.join(mixed),
        margin=f'{MARGIN:.0f}',
        num_train=manifest['num_train'],
        num_val=manifest['num_val'],
        num_labelled=min(student.train_dataloader.dataset.indices, manifest['num_train']),
        scores=score_table(models, records, meta.classes, mixed),
        classes=class_table(models, meta.classes, mixed),
        curves=learning_curves(models),
        shares=teacher_shares(out, models['student_sel'], meta.classes, mixed),
        fit=fit_state(models['student_fit']),
        fit_numbers=fit_numbers(models['student_fit']),
        legend=legend(meta),
        scenes=scene_table(out, meta),
        steps=step_table(records),
        minutes=f'{busy_seconds(records.values()) / 60:.1f}',
        machine=escape(f'{platform.system()} {platform.machine()}, {os.cpu_count()} processors'),
        versions=escape(', '.join(f'{name} {found}' for name, found in versions().items())),
        date=time.strftime('%Y-%m-%d %H:%M'),
    )
    page = out / 'index.html'
    page.write_text(text, encoding='utf-8')
    return page


def verdict(models: dict[str, Model], mixed: list[str]) -> str:
    """Say what came out, whatever it was.

    Args:
        models: Name -> results, of every student.
        mixed: Classes that the teacher mixes up.
    """
    first = '; '.join(
        f'{method} came out '
        + ' and '.join(
            f'{standing(models[name].miou - models[rival].miou)} {text}'
            for rival, text in RIVALS.items()
        )
        for name, method in METHODS.items()
    )
    mious = in_words([model.miou for model in models.values()])
    mixed_ious = in_words([mean_iou(model.iou, mixed) for model in models.values()])
    return (
        f'{first[0].upper()}{first[1:]}. The mIoU is {mious}. On {" and ".join(mixed)}, which the '
        f'teacher mixes up, the IoU is {mixed_ious}.'
    )


def standing(difference: float) -> str:
    """Say how a score stands to another, from their difference in points."""
    if abs(difference) <= MARGIN:
        return f'within {MARGIN:.0f} points of'
    return f'{abs(difference):.1f} points {"above" if difference > 0 else "below"}'


def in_words(scores: list[float]) -> str:
    """Say the scores of the students, in the order of ``STUDENTS``."""
    alone, plain, selective, fit = scores
    return (
        f'{alone:.1f} alone, {plain:.1f} with plain distillation, {selective:.1f} with SEL and '
        f'{fit:.1f} with FIT'
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


def score_table(
    models: dict[str, Model], records: dict, classes: list[str], mixed: list[str]
) -> str:
    """Return the table of results; the best student's mIoU is bold."""
    others = [name for name in classes[1:] if name not in mixed]
    best = max(models[name].miou for name in STUDENTS)
    rows = []
    for name, model in models.items():
        is_best = name in STUDENTS and model.miou == best
        rows.append(
            [
                dot(name),
                f'<b>{model.miou:.1f}</b>' if is_best else f'{model.miou:.1f}',
                f'{mean_iou(model.iou, others):.1f}',
                f'{mean_iou(model.iou, mixed):.1f}',
                f'{model.last_miou:.1f}',
                f'{model.step_ms:.0f}',
                f'{records[f"train {name}"]["seconds"] / 60:.1f}',
            ]
        )
    header = ['', 'mIoU', 'other digits', f'digits {" and ".join(mixed)}']
    header += ['mIoU when training ended', 'ms per iteration', 'minutes to train']
    return table(header, rows, 'numbers')


def class_table(models: dict[str, Model], classes: list[str], mixed: list[str]) -> str:
    """Return the table of IoU per class, shaded by value."""

    def cell(value: float) -> tuple[str, str]:
        if math.isnan(value):
            return '-', 'none'
        return f'{value:.0f}', f'rgba(10, 143, 108, {0.6 * value / 100:.2f})'

    header = ['', *(f'{name}*' if name in mixed else name for name in classes)]
    rows = [[dot(name), *map(cell, model.iou.values())] for name, model in models.items()]
    return table(header, rows, 'numbers')


def learning_curves(models: dict[str, Model]) -> str:
    """Return the pictures of validation mIoU and of the task loss over the iterations."""

    def series(key: str) -> list[tuple]:
        return [(NAMES[n], COLORS[n], *curve(models[n].scalars, key)) for n in STUDENTS]

    level = ('Teacher, when finished', COLORS['teacher'], models['teacher'].miou)
    text = (
        'Task loss on the labels (the distillation term is not in it; with FIT, hard pixels weigh '
        'F(x))'
    )
    return figure(curves(series('mIoU'), 'mIoU (%)', level), 'Validation mIoU') + figure(
        curves(series('decode.loss_ce'), 'cross-entropy'), text
    )


def teacher_shares(out: Path, model: Model, classes: list[str], mixed: list[str]) -> str:
    """Return the pictures of where the teacher wins: over time, and at the end per class."""
    orange = '#{:02x}{:02x}{:02x}'.format(*CONTRAST_COLORS['teacher'])
    other = next(name for name in classes[1:] if name not in mixed)
    key = 'teacher_better/sel'
    series = []
    for label, color, name in (
        (f'digit {other}', orange, f'{key}/{other}'),
        ('all pixels', COLORS['teacher'], key),
        (f'digit {mixed[0]}, mixed up by the teacher', COLORS['student_kd'], f'{key}/{mixed[0]}'),
    ):
        steps, values = curve(model.scalars, name)
        series.append((label, color, steps, [100 * value for value in values]))
    summary = json.loads((out / 'contrast' / 'summary.json').read_text())
    shares = [summary['classes'][name]['teacher_better'] for name in classes]
    values = [None if share is None else 100 * share for share in shares]
    overall = f'{100 * summary["overall"]["teacher_better"]:.0f} % of all pixels'
    ylabel = 'teacher better (% of pixels)'
    return figure(
        curves(series, ylabel), 'During training with SEL, on the training scenes'
    ) + figure(
        bars(['back-\nground', *classes[1:]], values, orange, ylabel),
        f'Finished student, on the validation scenes, by label ({overall})',
    )


def swatches(pairs: list[tuple]) -> str:
    """Return coloured squares with names."""
    return ''.join(f'<span><i style="background:rgb{tuple(c)}"></i>{n}</span>' for n, c in pairs)


def legend(meta: dict) -> str:
    """Return what the colours of label maps and of contrast masks mean."""
    masks = [
        ('teacher better', CONTRAST_COLORS['teacher']),
        ('student better or equal', CONTRAST_COLORS['student']),
        ('void', VOID_COLOR),
    ]
    labels = list(zip(meta.classes, meta.palette, strict=True))
    return f'<p>{swatches(labels + masks[-1:])}</p><p>Contrast mask: {swatches(masks)}</p>'


def scene_table(out: Path, meta: dict) -> str:
    """Return the first validation scenes: image, label, predictions, contrast mask."""
    classes = {**dict(enumerate(meta.palette)), VOID: VOID_COLOR}
    contrast = {value: CONTRAST_COLORS[name] for name, value in CONTRAST_VALUES.items()}
    contrast[CONTRAST_VALUES['void']] = VOID_COLOR
    maps = [(out / 'data/annotations/val', classes)]
    maps += [(out / 'predictions' / name, classes) for name in (*STUDENTS, 'teacher')]
    maps += [(out / 'contrast' / 'masks', contrast)]
    rows = []
    for path in sorted((out / 'data/images/val').glob('*.png'))[:SCENES_SHOWN]:
        pictures = [cv2.imread(str(path))[..., ::-1]]
        pictures += [colored(read_label(folder / path.name), colors) for folder, colors in maps]
        rows.append([f'<img src="{png(picture)}" alt="">' for picture in pictures])
    header = ['Image', 'Label', *(NAMES[name] for name in (*STUDENTS, 'teacher')), 'Contrast mask']
    return table(header, rows, 'scenes')


def step_table(records: dict[str, dict]) -> str:
    """Return what was run, in the order of the start."""
    ordered = sorted(records.items(), key=lambda item: item[1]['started'])
    rows = []
    for name, record in ordered:
        start = record['started'] - ordered[0][1]['started']
        command = f'<code>{escape(shown(record["command"]))}</code>'
        rows.append([name, f'{start:.0f}', f'{record["seconds"]:.0f}', command])
    return table(['Step', 'Started at (s)', 'Took (s)', 'Command'], rows, 'steps')
