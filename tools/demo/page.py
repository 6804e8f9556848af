"""Writes the demo's page: one self-contained HTML file."""

import json
import os
import platform
import time
from html import escape
from importlib import import_module
from pathlib import Path
from string import Template

from mmengine.config import Config
from results import Demo, busy_seconds, versions
from tables import NAMES, class_table, score_table, step_table
from tasks import Task
from verdict import MARGIN, verdict

TEMPLATES = Path(__file__).parent


def write_page(task: Task, out: Path, records: dict[str, dict]) -> Path:
    """Write ``index.html`` from what the steps left behind.

    The task's module has ``MEASURE``, ``FRAMEWORKS``, ``TITLE``, ``read_model`` and ``sections``;
    the template beside it holds the sections in the middle of the page.

    Args:
        task: Which demo.
        out: Folder of the demo.
        records: Step -> record, see :func:`steps.run_steps`.

    Returns:
        The page.
    """
    module = import_module(task.name)
    student = Config.fromfile(task.configs / 'student.py')
    manifest = json.loads((out / 'data' / 'manifest.json').read_text())
    meta = student.val_dataloader.dataset.metainfo
    demo = Demo(
        out=out,
        records=records,
        measure=module.MEASURE,
        models={
            name: module.read_model(out, name, meta.classes)
            for name in NAMES
            if f'train {name}' in records
        },
        meta=meta,
        digits=[name for name in meta.classes if name.isdigit()],
        mixed=[str(digit) for digit in manifest['mixed_up']],
    )
    sections = fill(
        task.name,
        mixed=' and '.join(demo.mixed),
        num_train=manifest['num_train'],
        num_val=manifest['num_val'],
        num_labelled=min(student.train_dataloader.dataset.indices, manifest['num_train']),
        scores=score_table(demo),
        classes=class_table(demo),
        **module.sections(demo),
    )
    text = fill(
        'page',
        title=module.TITLE,
        verdict=verdict(demo),
        margin=f'{MARGIN:.0f}',
        sections=sections,
        steps=step_table(records),
        minutes=f'{busy_seconds(records.values()) / 60:.1f}',
        machine=escape(f'{platform.system()} {platform.machine()}, {os.cpu_count()} processors'),
        versions=escape(', '.join(f'{n} {v}' for n, v in versions(module.FRAMEWORKS).items())),
        date=time.strftime('%Y-%m-%d %H:%M'),
    )
    page = out / 'index.html'
    page.write_text(text, encoding='utf-8')
    return page


def fill(name: str, **values: object) -> str:
    """Fill in a template of this folder."""
    text = (TEMPLATES / f'{name}.html').read_text(encoding='utf-8')
    return Template(text).substitute(values)
