"""The detection demo from end to end, in a handful of iterations, and what its page says."""

import json
import re
import runpy
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import tiny_seg

ROOT = Path(__file__).resolve().parents[3]
STUDENTS = ('student', 'student_kd', 'student_sel', 'student_fit')
MODELS = ('teacher', *STUDENTS)
DIGITS = [*'0123456789']


@pytest.fixture(scope='module')
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/demo')
        names = ('run', 'detection', 'detection_pictures', 'results', 'tables')
        yield SimpleNamespace(**{name: import_module(name) for name in names})


def run_here(steps: list, out: Path, fingerprint: str, jobs: int) -> dict[str, dict]:
    """Stands in for ``run_steps``: in this process, which has imported mmdet already."""
    records = {}
    for step in steps:
        assert all(name in records for name in step.needs)
        record = dict(command=step.command, started=time.time())
        tiny_seg.forget_runs()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', step.command[1:])
            runpy.run_path(step.command[1], run_name='__main__')
        records[step.name] = dict(record, seconds=time.time() - record['started'])
    return records


@pytest.fixture(scope='module')
def demo(tmp_path_factory: pytest.TempPathFactory, modules) -> Path:
    out = tmp_path_factory.mktemp('run') / 'demo'
    command = ['run.py', '--task', 'detection', '--quick', '--out', str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, 'argv', command)
        patch.setattr(modules.run, 'run_steps', run_here)
        modules.run.main()
    tiny_seg.forget_runs()
    return out


def test_the_page_is_one_file_with_every_result(demo: Path, modules):
    html = (demo / 'index.html').read_text()
    assert '$' not in re.sub(r'base64,[^"]*', '', html)
    assert 'http' not in re.sub(r'base64,[^"]*', '', html)
    boxes = 4 * 6  # label and 5 models' of 4 scenes
    masks = 2 * 2 * 2  # overlay and mask of 2 images at 2 strides
    assert html.count('data:image/png') == boxes + masks
    for name in MODELS:
        assert modules.tables.dot(name) in html
        assert (demo / 'predictions' / f'{name}.pkl').is_file()
    assert html.count('tools/export_student.py') == 3


def test_exported_students_score_as_when_training_ended(demo: Path, modules):
    for name in MODELS:
        model = modules.detection.read_model(demo, name, DIGITS)
        assert model.mean == pytest.approx(model.last_mean, abs=0.11)
        assert list(model.scores) == DIGITS


def test_the_scores_are_those_of_the_test(tmp_path: Path, modules):
    found = {f'coco/{digit}_precision': int(digit) / 10 for digit in DIGITS}
    found |= {'coco/0_precision': float('nan'), 'coco/bbox_mAP': 0.5}
    validation = {'coco/bbox_mAP': 0.25, 'step': 20}
    training = {'loss': 1.0, 'time': 0.01, 'step': 10}
    for path, lines in {
        'tests/m/1/1.json': [found],
        'runs/m/1/vis_data/scalars.json': [
            training,
            validation,
        ],
    }.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text('\n'.join(map(json.dumps, lines)))
    model = modules.detection.read_model(tmp_path, 'm', DIGITS)
    assert (model.mean, model.last_mean, model.step_ms) == (50, 25, 10)
    assert modules.results.mean_score(model.scores, ['8', '9']) == pytest.approx(85)
    assert modules.results.mean_score(model.scores, ['0', '1']) == pytest.approx(10)


def test_what_the_contrast_hook_wrote_is_shown(demo: Path, modules):
    masks = list(demo.glob('runs/student_sel/*/vis_data/contrast_masks/iter_4/sel/*.png'))
    assert sorted(modules.detection_pictures.stride(path) for path in masks) == [8, 8, 16, 16]
    html = (demo / 'index.html').read_text()
    assert '<th>Scene, stride 8</th><th>Mask, stride 8</th><th>Scene, stride 16</th>' in html


@pytest.mark.parametrize(('score', 'drawn'), [(0.9, True), (0.1, False)])
def test_boxes_are_painted_from_a_score_on(modules, score: float, drawn: bool):
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    pictures = modules.detection_pictures
    painter = pictures.DetLocalVisualizer()
    painter.dataset_meta = dict(classes=DIGITS, palette=[(255, 0, 0)] * 10)
    sample = DetDataSample()
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor([[30.0, 30.0, 60.0, 60.0]]),
        labels=torch.tensor([3]),
        scores=torch.tensor([score]),
    )
    image = np.full((40, 40, 3), 128, np.uint8)
    painted = pictures.paint(painter, image, sample)
    assert painted.shape == (pictures.ZOOM * 40, pictures.ZOOM * 40, 3)
    assert (painted != 128).any() == drawn
