"""The segmentation demo from end to end, in a handful of iterations, and what its page says."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
STUDENTS = ('student', 'student_kd', 'student_sel', 'student_fit')
MODELS = ('teacher', *STUDENTS)
CLASSES = ['background', *'0123456789']


def run_demo(out: Path) -> str:
    """Run ``run.py --quick``; return what it says."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, ROOT / 'tools/demo/run.py', '--quick', '--out', out]
    done = subprocess.run(command, env=env, cwd=out.parent, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope='module')
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('run') / 'demo'
    assert f'The page: {out / "index.html"}' in run_demo(out)
    return out


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / 'tools/demo')
    names = ('results', 'segmentation', 'fit_section', 'tables', 'tasks', 'verdict')
    return SimpleNamespace(**{name: import_module(name) for name in names})


def svg_texts(html: str) -> list[set[str]]:
    """The texts in each SVG of a page; matplotlib writes them as comments beside the outlines."""
    pictures = re.findall(r'data:image/svg\+xml;base64,([^"]*)', html)
    return [
        {text.strip() for text in re.findall(r'<!--(.*?)-->', base64.b64decode(data).decode())}
        for data in pictures
    ]


def score_of(demo: Path, name: str) -> float:
    return json.loads(next((demo / 'tests' / name).glob('*/*.json')).read_text())['mIoU']


def test_the_page_is_one_file_with_every_result(demo: Path):
    html = (demo / 'index.html').read_text()
    assert '$' not in re.sub(r'base64,[^"]*', '', html)
    assert 'http' not in re.sub(r'base64,[^"]*', '', html)
    assert set(re.findall(r'src="([^,"]*)', html)) == {
        'data:image/svg+xml;base64',
        'data:image/png;base64',
    }
    assert html.count('data:image/png') == 4 * 8  # image, label, 5 predictions, mask of 4 scenes
    for name in MODELS:
        assert f'>{score_of(demo, name):.1f}<' in html
    for file in sorted((demo / 'steps').iterdir()):
        assert json.loads(file.read_text())['command'][1] in html


def test_exported_students_score_as_when_training_ended(demo: Path, modules):
    for name in MODELS:
        model = modules.segmentation.read_model(demo, name, CLASSES)
        assert model.mean == pytest.approx(model.last_mean, abs=0.011)
        assert list(model.scores) == CLASSES
        assert model.mean == pytest.approx(
            modules.results.mean_score(model.scores, CLASSES), abs=0.02
        )


def test_every_student_is_in_the_learning_curves(demo: Path, modules):
    for texts in svg_texts((demo / 'index.html').read_text())[:2]:
        assert {modules.tables.NAMES[name] for name in STUDENTS} <= texts


def test_the_fit_state_is_shown_as_measured(demo: Path, modules):
    results, fit_section = modules.results, modules.fit_section
    model = modules.segmentation.read_model(demo, 'student_fit', CLASSES)
    for key in ('error', 'weight', 'train_gt_loss_eval', 'val_gt_loss', 'simple_share', 'cost'):
        assert results.curve(model.scalars, f'fit/{key}')[0] == [1, 2, 3, 4]
    html = (demo / 'index.html').read_text()
    assert fit_section.fit_numbers(model, 'pixels') in html
    assert fit_section.fit_state(model, 'pixels', 'cross-entropy per pixel') in html


def test_fit_state_and_numbers(modules):
    results, fit_section = modules.results, modules.fit_section
    keys = ('error', 'weight', 'train_gt_loss', 'train_gt_loss_eval', 'val_gt_loss')
    rows = [(20, 0.1, 1.26, 0.9, 0.8, 0.7), (40, -0.5, 0.32, 0.4, 0.3, 0.8), (60, -0.25, 0.56)]
    scalars = [
        dict(zip(('step', *(f'fit/{key}' for key in keys)), row, strict=False))
        | {'fit/simple_share': 0.9375, 'fit/cost': 0.031}
        for row in rows
    ]
    model = results.Model([{'step': 10}, *scalars], {}, 0.0, 0.0, 1.0)
    assert fit_section.fit_numbers(model, 'pixels') == (
        'In this run x lay between -0.500 and 0.100. At the end it was -0.250, F(x) was 0.56, and '
        '93.8 % of the pixels were simple. The measurements begin with iteration 20, when the '
        'running statistics of BatchNorm, with which the student is measured, have settled. '
        "Measuring took 3.1 % of the training's time."
    )
    losses, state = svg_texts(fit_section.fit_state(model, 'pixels', 'cross-entropy per pixel'))
    assert {'training scenes', 'validation scenes', 'cross-entropy per pixel'} <= losses
    assert {'x = training - validation', 'share of simple pixels'} <= state
    ticks = [text for text in state if text.startswith('\N{MINUS SIGN}')]
    assert ticks, 'x is cut off at 0'


def test_finished_steps_are_reused(demo: Path, tmp_path: Path):
    shutil.copytree(demo, tmp_path / 'before')
    said = run_demo(demo)
    steps = list((demo / 'steps').iterdir())
    assert said.count('finished before') == len(steps) == 15
    for file in steps:
        assert file.read_text() == (tmp_path / 'before/steps' / file.name).read_text()


def test_class_iou(tmp_path: Path, modules):
    for name, rows in dict(label=[[0, 0, 1, 255]], guess=[[0, 1, 1, 1]]).items():
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / '0.png'), np.array(rows, np.uint8))
    iou = modules.segmentation.class_iou(tmp_path / 'guess', tmp_path / 'label', 3)
    np.testing.assert_allclose(iou, [50, 50, np.nan])
    assert modules.results.mean_score(dict(zip('abc', iou, strict=True)), ['b', 'c']) == 50
    assert math.isnan(modules.results.mean_score({'c': iou[2]}, ['c']))


def test_busy_seconds_counts_side_by_side_once_and_breaks_not(modules):
    pairs = [(100, 10), (102, 3), (105, 10), (200, 5)]
    records = [dict(started=start, seconds=seconds) for start, seconds in pairs]
    assert modules.results.busy_seconds(records) == 20


def demo_with(modules, means: tuple, *measure: str):
    """A demo whose students scored so, and half of it on digit 8, nothing on 9."""
    results = modules.results
    models = {
        name: results.Model([], {'8': score, '9': 0.0}, score, score, 1.0)
        for name, score in zip(STUDENTS, means, strict=False)
    }
    models['teacher'] = results.Model([], {}, 99.0, 99.0, 1.0)
    digits = ['8', '9']
    return results.Demo(Path(), {}, results.Measure(*measure, 'key'), models, {}, digits, digits)


@pytest.mark.parametrize(
    ('scores', 'sel', 'fit'),
    [
        (
            (50, 40, 60, 36),
            '20.0 points above plain distillation and 10.0 points above the student alone',
            '4.0 points below plain distillation and 14.0 points below the student alone',
        ),
        (
            (50, 48, 51, 46),
            'within 3 points of plain distillation and within 3 points of the student alone',
            'within 3 points of plain distillation and 4.0 points below the student alone',
        ),
    ],
)
def test_the_verdict_says_what_happened(modules, scores: tuple, sel: str, fit: str):
    alone, plain, selective, fitted = scores
    assert modules.verdict.verdict(demo_with(modules, scores, 'mIoU', 'IoU')) == (
        f'The selective teacher (SEL) came out {sel}; the fit loss (FIT) came out {fit}. '
        f'The mIoU is {alone:.1f} alone, {plain:.1f} with plain distillation, {selective:.1f} with '
        f'SEL and {fitted:.1f} with FIT. On 8 and 9, which the teacher mixes up, the IoU is '
        f'{alone / 2:.1f} alone, {plain / 2:.1f} with plain distillation, {selective / 2:.1f} with '
        f'SEL and {fitted / 2:.1f} with FIT.'
    )


def test_the_verdict_speaks_only_of_what_was_run(modules):
    assert modules.verdict.verdict(demo_with(modules, (30, 40, 50), 'mAP', 'AP')) == (
        'The selective teacher (SEL) came out 10.0 points above plain distillation and 20.0 points '
        'above the student alone. The mAP is 30.0 alone, 40.0 with plain distillation and 50.0 '
        'with SEL. On 8 and 9, which the teacher mixes up, the AP is 15.0 alone, 20.0 with plain '
        'distillation and 25.0 with SEL.'
    )


def test_every_task_has_its_configs(modules):
    for task in modules.tasks.TASKS.values():
        named = {'base', *modules.tasks.PLAIN, *task.distilled}
        assert {path.stem for path in (ROOT / task.configs).glob('*.py')} == named
        assert (ROOT / task.data).is_file()


def test_an_unknown_task_is_refused():
    command = [sys.executable, ROOT / 'tools/demo/run.py', '--task', 'captioning']
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 2
    assert "invalid choice: 'captioning'" in done.stderr
