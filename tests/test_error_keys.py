"""Errors name the part of the config that they came from."""

import pytest
import torch
from mmengine.config import Config

from mmdistill_ext import cli
from mmdistill_ext.distillers import CollaborativeDistiller, build_teacher_student
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.error_keys import errors_of_part, errors_of_parts
from tests import tiny_det, tiny_seg
from tests.tiny_networks import segmenters


def changed(cfg, path, value):
    node = cfg
    *above, key = (int(part) if part.isdigit() else part for part in path.split('.'))
    for name in above:
        node = node[name]
    node[key] = value
    return cfg


@pytest.mark.parametrize(
    ('path', 'value', 'part'),
    [
        ('backbone.depth', 19, 'student.backbone'),
        ('backbone.type', 'ResNetX', 'student.backbone'),
        ('backbone.colour', 1, 'student.backbone'),
        ('decode_head.num_classes', 'no', 'student.decode_head'),
        ('decode_head.loss_decode.type', 'Nothing', 'student.decode_head.loss_decode'),
        ('data_preprocessor.std', ['no'] * 3, 'student.data_preprocessor'),
        ('backbone', 'ResNet', 'student.backbone'),
        ('heads', 3, 'student'),
    ],
)
def test_a_students_own_error_names_its_part(path, value, part):
    with pytest.raises(ValueError, match=f'^`{part}`: '):
        build_model(changed(tiny_seg.model(8), path, value), 'student')


def test_an_error_without_a_message_shows_the_line():
    cfg = changed(tiny_det.atss(), 'neck.num_outs', 0)
    with pytest.raises(ValueError, match='^`student.neck`: AssertionError: assert '):
        build_model(cfg, 'student')


def test_networks_and_teachers_are_named():
    students = segmenters()
    changed(students, 'b.backbone.depth', 19)
    with pytest.raises(ValueError, match='^`students.b.backbone`: KeyError: '):
        CollaborativeDistiller(students, dict(type='MinLoss'))
    given = dict(model=changed(tiny_seg.model(8), 'backbone.depth', 19), checkpoint='x')
    with pytest.raises(ValueError, match='^`teacher.model.backbone`: KeyError: '):
        build_teacher_student(tiny_seg.model(8), given, dict(kd=dict(type='KDLoss')))


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('custom_hooks.0.type', 'Nothing', '^`custom_hooks.0`: KeyError: Nothing'),
        ('custom_hooks.0', dict(interval=1), '^`custom_hooks.0`: KeyError: '),
        ('model.student.data_preprocessor.pad_val', [1], '^`student.data_preprocessor`: TypeError'),
        ('custom_hooks.0.type', 3, '^`custom_hooks.0`: TypeError: type must be'),
        ('custom_hooks.0.interval', 'no', '^`TeacherShareHook.interval` should be an integer'),
        ('custom_hooks.0.intervall', 1, '^`TeacherShareHook.intervall` should be an argument'),
        ('model.losses.sel.type', 'Nothing', '^`losses.sel.type` should be'),
        ('model.student.backbone.depth', 19, '^`student.backbone`: '),
        ('val_evaluator.type', 'Nothing', '^`val_evaluator`: KeyError: Nothing'),
        ('train_dataloader.dataset.pipeline.0.type', 'X', '^`train_dataloader.dataset.pipeline.0`'),
        (
            'model.decode_head',
            dict(num_classes=3),
            '^`model.decode_head` .*`model.student.decode_head` is where it belongs',
        ),
        ('model.teacher', None, '^`teacher` should be a dict. Found None'),
        ('model.teacher', 'a.py', '^`teacher` should be a dict'),
        ('model.teacher', [], '^`teacher` should be a dict'),
        ('model.losses', [], '^`losses` should be a dict'),
        ('model.losses.sel', None, '^`losses.sel` should be a config such as'),
        ('model.losses.sel', 'KDLoss', '^`losses.sel` should be a config such as'),
        ('model.losses.sel', 3, '^`losses.sel` should be a config such as'),
        ('model.losses.sel.begin', 1.5, '^`losses.sel.begin` should be an integer'),
        ('model.losses.sel.stop', '3', '^`losses.sel.stop` should be an integer or None'),
        ('model.losses.sel.head', [], '^`losses.sel.head` should be a string or None'),
        ('model.fuse_task_loss', 'no', '^`fuse_task_loss` should be True or False'),
        ('model.losses.sel.together', 'no', '^`losses.sel.together` should be True or False'),
        ('model.losses.sel.class_weight', [0, 0, 0], '^`losses.sel.class_weight` .*above 0'),
        ('model.losses.sel.temperature', 1e10, '^`losses.sel.temperature` .*1000'),
        ('model.losses.sel.weight', 1e8, r'^`losses.sel.weight` .*at most 1e\+06'),
    ],
)
def test_a_run_is_refused_by_its_key(tmp_path, path, value, message):
    teacher = tiny_seg.save_weights(tmp_path / 't.pth', tiny_seg.model(16), seed=1)
    for split in ('train', 'val'):
        tiny_seg.write_data(tmp_path, split)
    cfg = tiny_seg.config(tmp_path, tmp_path / 'work')
    cfg = tiny_seg.distil(cfg, teacher, share=dict(type='mmdistill_ext.TeacherShareHook'))
    cfg = Config(changed(cfg.to_dict(), path, value))
    tiny_seg.forget_runs()
    with pytest.raises(ValueError, match=message):
        cli.train(cli.build_runner(cfg))


def test_named_errors_and_those_of_files_stay_as_they_are():
    with pytest.raises(ValueError, match='^`a` should be 1'), errors_of_part('key'):
        raise ValueError('`a` should be 1')
    for kind in (FileNotFoundError, ImportError, torch.OutOfMemoryError):
        with pytest.raises(kind, match='^gone'), errors_of_part('key'):
            raise kind('gone')
    with pytest.raises(ValueError, match='^`key`: KeyError: a$'), errors_of_part('key'):
        {}['a']
    with pytest.raises(KeyError), errors_of_parts(dict(a=1)):  # of no part that was built
        {}['a']
