"""Writes the demo's page: one self-contained HTML file."""

import json
import math
import os
import platform
import statistics
import time
from html import escape
from pathlib import Path
from string import Template

import cv2
import figures
import numpy as np
from mmengine.config import Config
from results import busy_seconds, class_iou, curve, read_label, read_metrics, read_scalars, versions
from steps import shown

from mmdistill_ext.visualization import CONTRAST_COLORS, CONTRAST_VALUES

MODELS = dict(
    teacher='Teacher',
    student='Student alone',
    student_kd='Student, plain distillation',
    student_sel='Student, selective teacher',
)
STUDENTS = [name for name in MODELS if name != 'teacher']
SCENES_SHOWN = 6


def write_page(out, records):
    """Write ``index.html`` from what the steps left behind.

    Args:
        out (Path): Folder of the demo.
        records (dict): Step -> record, see :func:`steps.run_steps`.

    Returns:
        Path: The page.
    """
    meta = Config.fromfile('configs/demo/student.py').val_dataloader.dataset.metainfo
    manifest = json.loads((out / 'data' / 'manifest.json').read_text())
    new = [f'{digit}' for digit in manifest['unlabelled']]
    models = {name: read_model(out, name, meta.classes, records) for name in MODELS}
    text = Template(Path(__file__).with_name('page.html').read_text()).substitute(
        verdict=verdict(models, new),
        new=' and '.join(new),
        num_train=manifest['num_train'],
        num_val=manifest['num_val'],
        num_labelled=labelled(manifest),
        scores=score_table(models, meta.classes, new),
        classes=class_table(models, meta.classes, new),
        curves=learning_curves(models),
        shares=teacher_shares(out, models['student_sel']['scalars'], meta.classes, new),
        legend=legend(meta),
        scenes=scene_table(out, meta),
        steps=step_table(records),
        total=f'{busy_seconds(records.values()) / 60:.1f}',
        machine=escape(f'{platform.system()} {platform.machine()}, {os.cpu_count()} processors'),
        versions=escape(', '.join(f'{k} {v}' for k, v in versions().items())),
        python=platform.python_version(),
        date=time.strftime('%Y-%m-%d %H:%M'),
    )
    page = out / 'index.html'
    page.write_text(text, encoding='utf-8')
    return page


def read_model(out, name, classes, records):
    """Return what the page says of one model."""
    scalars = read_scalars(out / 'runs' / name)
    iou = class_iou(out / 'predictions' / name, out / 'data/annotations/val', len(classes))
    return dict(
        scalars=scalars,
        iou=dict(zip(classes, iou)),
        miou=read_metrics(out / 'tests' / name)['mIoU'],
        trained=[line['mIoU'] for line in scalars if 'mIoU' in line][-1],
        step_ms=1000 * statistics.median(curve(scalars, 'time')[1]),
        minutes=records[f'train {name}']['seconds'] / 60,
    )


def labelled(manifest):
    """How many fully labelled scenes the students see."""
    indices = Config.fromfile('configs/demo/student.py').train_dataloader.dataset.indices
    return min(indices, manifest['num_train'])


def verdict(models, new):
    """Say in two sentences what came out, whatever it was."""
    scores = {name: models[name]['miou'] for name in STUDENTS}
    alone, plain, selective = scores.values()
    numbers = f'mIoU {selective:.1f}, against {alone:.1f} alone and {plain:.1f} with plain distillation'
    if selective > max(alone, plain):
        first = f'The student with the selective teacher came out best: {numbers}.'
    elif selective > plain:
        first = f'The selective teacher beat plain distillation, but not the student alone: {numbers}.'
    else:
        first = f'The selective teacher did not win this time: {numbers}.'
    unseen = {name: group_iou(models[name]['iou'], new) for name in STUDENTS}
    second = (
        f'On the digits that the teacher does not know, the students reach '
        f'{unseen["student"]:.1f} alone, {unseen["student_kd"]:.1f} with plain distillation and '
        f'{unseen["student_sel"]:.1f} with the selective teacher.'
    )
    return f'{first} {second}'


def group_iou(iou, names):
    """Mean IoU of some classes; those that are nowhere do not count."""
    values = [iou[name] for name in names if not math.isnan(iou[name])]
    return statistics.fmean(values) if values else math.nan


def table(header, rows, kind=''):
    """Return an HTML table; cells are HTML, or a pair of text and background."""
    cells = ''.join(f'<th>{cell}</th>' for cell in header)
    lines = [f'<tr>{cells}</tr>']
    for row in rows:
        parts = [c if isinstance(c, tuple) else (c, '') for c in row]
        cells = ''.join(f'<td style="background:{b}">{t}</td>' if b else f'<td>{t}</td>' for t, b in parts)
        lines.append(f'<tr>{cells}</tr>')
    return f'<table class="{kind}">{"".join(lines)}</table>'


def dot(name):
    """A model's name with its colour."""
    return f'<i style="background:{figures.COLORS[name]}"></i>{MODELS[name]}'


def score_table(models, classes, new):
    """Return the table of results."""
    known = [name for name in classes[1:] if name not in new]
    best = max(models[name]['miou'] for name in STUDENTS)
    rows = []
    for name, model in models.items():
        miou = f'{model["miou"]:.1f}'
        rows.append(
            [
                dot(name),
                f'<b>{miou}</b>' if name != 'teacher' and model['miou'] == best else miou,
                f'{group_iou(model["iou"], known):.1f}',
                f'{group_iou(model["iou"], new):.1f}',
                f'{model["trained"]:.1f}',
                f'{model["step_ms"]:.0f}',
                f'{model["minutes"]:.1f}',
            ]
        )
    header = ['', 'mIoU', f'digits {known[0]} to {known[-1]}', f'digits {", ".join(new)}']
    header += ['mIoU when training ended', 'ms per iteration', 'minutes to train']
    return table(header, rows, 'numbers')


def class_table(models, classes, new):
    """Return the table of IoU per class, shaded by value."""

    def cell(value):
        if math.isnan(value):
            return '–'
        return f'{value:.0f}', f'rgba(10, 143, 108, {0.6 * value / 100:.2f})'

    header = ['', *(f'{name}*' if name in new else name for name in classes)]
    rows = [[dot(n), *(cell(m['iou'][c]) for c in classes)] for n, m in models.items()]
    return table(header, rows, 'numbers')


def learning_curves(models):
    """Return the pictures of validation mIoU and of the task loss over the iterations."""

    def series(key):
        return [
            (MODELS[n], figures.COLORS[n], *curve(models[n]['scalars'], key)) for n in STUDENTS
        ]

    level = ('Teacher, when finished', figures.COLORS['teacher'], models['teacher']['miou'])
    return ''.join(
        f'<figure><img src="{picture}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        for picture, text in (
            (figures.curves(series('mIoU'), 'mIoU (%)', level), 'Validation mIoU'),
            (
                figures.curves(series('decode.loss_ce'), 'cross-entropy'),
                'Task loss on the labels (the distillation term is not in it)',
            ),
        )
    )


def teacher_shares(out, scalars, classes, new):
    """Return the pictures of where the teacher wins: over time, and at the end per class."""
    summary = json.loads((out / 'contrast' / 'summary.json').read_text())
    key = 'teacher_better/sel'
    orange = '#%02x%02x%02x' % CONTRAST_COLORS['teacher']
    lines = [('all pixels', figures.COLORS['teacher'], key)]
    lines += [(f'digit {new[0]}: unknown to the teacher', figures.COLORS['student_kd'], f'{key}/{new[0]}')]
    lines += [('digit 0: known to the teacher', orange, f'{key}/0')]
    series = []
    for label, color, name in lines:
        steps, values = curve(scalars, name)
        series.append((label, color, steps, [100 * value for value in values]))
    shares = [summary['classes'][name]['teacher_better'] for name in classes]
    values = [None if share is None else 100 * share for share in shares]
    names = ['back-\nground', *classes[1:]]
    ylabel = 'teacher better (% of pixels)'
    overall = 100 * summary['overall']['teacher_better']
    return ''.join(
        f'<figure><img src="{picture}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        for picture, text in (
            (figures.curves(series, ylabel), 'During training with SEL, on the training scenes'),
            (
                figures.bars(names, values, orange, ylabel),
                f'Finished student, validation scenes, by label ({overall:.0f} % of all pixels)',
            ),
        )
    )


def swatches(pairs):
    """Return coloured squares with names."""
    return ''.join(f'<span><i style="background:rgb{tuple(c)}"></i>{n}</span>' for n, c in pairs)


def legend(meta):
    """Return what the colours of label maps and of contrast masks mean."""
    names = dict(teacher='teacher better', student='student better or equal')
    masks = [(text, CONTRAST_COLORS[name]) for name, text in names.items()]
    void = [('void', (225, 225, 225))]
    labels = [*zip(meta.classes, meta.palette), *void]
    return f'<p>{swatches(labels)}</p><p>Contrast mask: {swatches(masks + void)}</p>'


def scene_table(out, meta):
    """Return the first validation scenes: image, label, predictions, contrast mask."""
    classes = dict(enumerate(meta.palette))
    contrast = {CONTRAST_VALUES[name]: CONTRAST_COLORS[name] for name in ('teacher', 'student')}
    rows = []
    for path in sorted((out / 'data/images/val').glob('*.png'))[:SCENES_SHOWN]:
        maps = [out / 'data/annotations/val', *(out / 'predictions' / name for name in STUDENTS)]
        maps.append(out / 'predictions' / 'teacher')
        pictures = [cv2.imread(str(path))[..., ::-1]]
        pictures += [figures.colored(read_label(folder / path.name), classes) for folder in maps]
        mask = read_label(out / 'contrast' / 'masks' / path.name)
        pictures.append(figures.colored(np.asarray(mask), contrast))
        rows.append([f'<img src="{figures.png(picture)}" alt="">' for picture in pictures])
    header = ['Image', 'Label', *(MODELS[name] for name in STUDENTS), 'Teacher', 'Contrast mask']
    return table(header, rows, 'scenes')


def step_table(records):
    """Return what was run, in the order of the start."""
    rows = []
    first = min(record['started'] for record in records.values())
    for name, record in sorted(records.items(), key=lambda item: item[1]['started']):
        command = f'<code>{escape(shown(record["command"]))}</code>'
        start = record['started'] - first
        rows.append([name, f'{start:.0f}', f'{record["seconds"]:.0f}', command])
    return table(['Step', 'started at (s)', 'took (s)', 'Command'], rows, 'steps')
