"""The frameworks' functions for inference read the config of a training, without its teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmseg.apis import MMSegInferencer, inference_model, init_model
from torch import nn

from mmdistill_ext.distillers.build import build_model
from tests import tiny_det, tiny_seg

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
TEACHERS = {
    'missing checkpoint': dict(checkpoint='nowhere.pth'),
    'checkpoint of another machine': dict(checkpoint='https://nowhere.invalid/teacher.pth'),
    'missing config': dict(model='nowhere.py', checkpoint='nowhere.pth'),
}


def pipeline(pack: str) -> list[dict]:
    resize = dict(type='Resize', scale=(96, 64), keep_ratio=True)
    return [dict(type='LoadImageFromFile'), resize, dict(type=pack)]


def seg_config(student: dict | str, teacher: dict) -> Config:
    cfg = tiny_seg.config(Path('data'), None)
    cfg.model = student
    cfg = tiny_seg.distil(cfg, '')
    cfg.model.teacher.update(teacher)
    cfg.test_dataloader.dataset.pipeline = pipeline('PackSegInputs')
    cfg.test_pipeline = pipeline('PackSegInputs')
    return cfg


def det_config(student: dict | str, teacher: dict) -> Config:
    dataset = dict(
        type='CocoDataset',
        metainfo=dict(classes=tiny_det.CLASSES, palette=[(1, 2, 3)] * 3),
        pipeline=pipeline('PackDetInputs'),
    )
    return Config(
        dict(
            default_scope='mmdet',
            custom_imports=dict(imports=['mmdistill_ext'], allow_failed_imports=False),
            model=dict(
                type='mmdistill_ext.TeacherStudentDistiller',
                student=student,
                teacher={'model': tiny_det.gfl(16), **teacher},
                losses=dict(kd=dict(type='KDLoss')),
            ),
            test_dataloader=dict(dataset=dataset),
            visualizer=dict(type='DetLocalVisualizer', name='visualizer'),
        )
    )


def by_init_model(config: str, weights: str) -> torch.Tensor:
    model = init_model(config, weights, device='cpu')
    return inference_model(model, IMAGE).seg_logits.data


def by_seg_inferencer(config: str, weights: str) -> torch.Tensor:
    inferencer = MMSegInferencer(config, weights, device='cpu')
    sample = inferencer(IMAGE, return_datasamples=True)
    return (sample[0] if isinstance(sample, list) else sample).seg_logits.data


def by_init_detector(config: str, weights: str) -> torch.Tensor:
    found = inference_detector(init_detector(config, weights, device='cpu'), IMAGE).pred_instances
    return torch.cat([found.bboxes, found.scores[:, None]], 1)


def by_det_inferencer(config: str, weights: str) -> torch.Tensor:
    inferencer = DetInferencer(config, weights, device='cpu')
    found = inferencer(IMAGE, return_datasamples=True)['predictions'][0].pred_instances
    return torch.cat([found.bboxes, found.scores[:, None]], 1)


FUNCTIONS = dict(
    init_model=(by_init_model, 'mmseg'),
    MMSegInferencer=(by_seg_inferencer, 'mmseg'),
    init_detector=(by_init_detector, 'mmdet'),
    DetInferencer=(by_det_inferencer, 'mmdet'),
)


def detector() -> dict:
    cfg = tiny_det.gfl()
    return {**cfg, 'test_cfg': {**cfg['test_cfg'], 'max_per_img': 10}}


def plain(framework: str) -> dict:
    """A student whose pretrained weights are not at hand either."""
    student = tiny_seg.model(8) if framework == 'mmseg' else detector()
    student['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='nowhere.pth')
    return student


def without_init(student: dict) -> dict:
    return {**student, 'backbone': {**student['backbone'], 'init_cfg': None}}


@pytest.fixture(autouse=True)
def _no_leftovers():
    yield
    tiny_seg.forget_runs()
    DefaultScope._instance_dict.clear()


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('teacher', TEACHERS)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_inference_needs_no_teacher(tmp_path: Path, name: str, teacher: str):
    """Distilled, exported or plain config: the same prediction, that of the student."""
    predict, framework = FUNCTIONS[name]
    tiny, config = (tiny_seg, seg_config) if framework == 'mmseg' else (tiny_det, det_config)
    student = plain(framework)
    weights = tiny.save_weights(tmp_path / 'student.pth', without_init(student), seed=2)
    paths = [tmp_path / 'distilled.py', tmp_path / 'plain.py']
    distilled = config(student, TEACHERS[teacher])
    distilled.dump(paths[0])
    distilled.model = student
    distilled.dump(paths[1])
    first, second = (predict(str(path), weights) for path in paths)
    assert first.numel()
    assert torch.equal(first, second)


def test_a_student_in_a_file_is_found(tmp_path: Path):
    Config(dict(model=plain('mmdet'), default_scope='mmdet')).dump(tmp_path / 'student.py')
    weights = tiny_det.save_weights(tmp_path / 'student.pth', tiny_det.gfl(), seed=2)
    det_config(str(tmp_path / 'student.py'), TEACHERS['missing checkpoint']).dump(tmp_path / 'a.py')
    assert by_init_detector(str(tmp_path / 'a.py'), weights).numel()


@pytest.mark.parametrize('teacher', TEACHERS)
def test_the_same_config_does_not_train(teacher: str):
    cfg = seg_config(tiny_seg.model(8), TEACHERS[teacher])
    inputs, samples = torch.zeros(1, 3, 32, 40), tiny_seg.samples(torch.zeros(1, 32, 40).long())
    for start in ('init_weights', 'loss'):
        model = build_model(cfg.model)
        assert isinstance(model, nn.Module)
        with pytest.raises((FileNotFoundError, ValueError), match='`teacher.*nowhere'):
            model.init_weights() if start == 'init_weights' else model(inputs, samples, 'loss')


def test_an_untrained_teacher_does_not_train():
    model = build_model(seg_config(tiny_seg.model(8), dict(checkpoint=None)).model)
    with pytest.raises(ValueError, match='`teacher.checkpoint` should be the file or URL'):
        model.init_weights()


def test_what_frameworks_set_to_none_is_no_argument():
    cfg = seg_config(tiny_seg.model(8), TEACHERS['missing checkpoint']).model
    cfg.pretrained = cfg.train_cfg = None
    build_model(cfg)
    cfg.pretrained = 'a.pth'
    with pytest.raises(ValueError, match='`pretrained` should be an argument'):
        build_model(cfg)


def test_a_config_is_read_through_to_the_student():
    cfg = ConfigDict(
        type='mmdistill_ext.TeacherStudentDistiller', student=dict(type='A', backbone=dict(depth=1))
    )
    cfg.backbone.depth = 2
    assert cfg.student.backbone.depth == 2
    assert 'backbone' not in cfg
    assert cfg.get('backbone') is None
    for node, name in ((cfg, 'neck'), (cfg.student, 'neck'), (ConfigDict(type='A'), 'backbone')):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(node, name)


def test_a_teacher_is_read_when_the_training_starts(tmp_path: Path):
    path = tiny_seg.save_weights(tmp_path / 't.pth', tiny_seg.model(16), seed=1)
    expected = torch.load(path)['state_dict']
    for start in ('init_weights', 'teacher'):
        model = build_model(seg_config(tiny_seg.model(8), dict(checkpoint=Path(path))).model)
        assert not model.distillation._teacher.is_loaded
        model.init_weights() if start == 'init_weights' else model.distillation.teacher
        state = model.distillation._teacher.model.state_dict()
        assert all(torch.equal(state[k], v) for k, v in expected.items())
        assert model.distillation.classes == tiny_seg.CLASSES
