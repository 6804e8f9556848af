"""The demo from end to end, in a handful of iterations, and what its page says."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
MODELS = ('teacher', 'student', 'student_kd', 'student_sel')
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
def modules(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/demo')
    import page
    import results

    return page, results


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
    assert html.count('data:image/png') == 4 * 7  # image, label, 4 predictions, mask of 4 scenes
    for name in MODELS:
        assert f'>{score_of(demo, name):.1f}<' in html
    for file in sorted((demo / 'steps').iterdir()):
        assert json.loads(file.read_text())['command'][1] in html


def test_exported_students_score_as_when_training_ended(demo: Path, modules):
    _, results = modules
    for name in MODELS:
        model = results.read_model(demo, name, CLASSES)
        assert model.miou == pytest.approx(model.last_miou, abs=0.011)
        assert list(model.iou) == CLASSES
        assert model.miou == pytest.approx(results.mean_iou(model.iou, CLASSES), abs=0.02)


def test_finished_steps_are_reused(demo: Path, tmp_path: Path):
    shutil.copytree(demo, tmp_path / 'before')
    said = run_demo(demo)
    steps = list((demo / 'steps').iterdir())
    assert said.count('finished before') == len(steps) == 12
    for file in steps:
        assert file.read_text() == (tmp_path / 'before/steps' / file.name).read_text()


def test_class_iou(tmp_path: Path, modules):
    _, results = modules
    for name, rows in dict(label=[[0, 0, 1, 255]], guess=[[0, 1, 1, 1]]).items():
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / '0.png'), np.array(rows, np.uint8))
    iou = results.class_iou(tmp_path / 'guess', tmp_path / 'label', 3)
    np.testing.assert_allclose(iou, [50, 50, np.nan])
    assert results.mean_iou(dict(zip('abc', iou, strict=True)), ['b', 'c']) == 50
    assert math.isnan(results.mean_iou({'c': iou[2]}, ['c']))


def test_busy_seconds_counts_side_by_side_once_and_breaks_not(modules):
    _, results = modules
    pairs = [(100, 10), (102, 3), (105, 10), (200, 5)]
    records = [dict(started=start, seconds=seconds) for start, seconds in pairs]
    assert results.busy_seconds(records) == 20


@pytest.mark.parametrize(
    ('scores', 'said'),
    [
        ((50, 40, 60), 'came out best: mIoU 60.0, against 50.0 alone and 40.0'),
        ((50, 40, 45), 'beat plain distillation, but not the student alone'),
        ((30, 50, 45), 'did not beat plain distillation'),
        ((50, 50, 50), 'did not beat plain distillation'),
    ],
)
def test_the_verdict_says_what_happened(modules, scores: tuple, said: str):
    page, results = modules
    models = {
        name: results.Model([], {'8': score, '9': 0.0}, score, score, 1.0)
        for name, score in zip(page.STUDENTS, scores, strict=True)
    }
    text = page.verdict(models, ['8', '9'])
    assert said in text
    assert f'the IoU is {scores[0] / 2:.1f} alone' in text
