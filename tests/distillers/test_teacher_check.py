"""A teacher that gives no numbers is refused in the first step, by name."""

import copy
import itertools

import pytest
import torch

from mmdistill_ext.distillers.teacher_check import tensors_in
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from tests import tiny_det, tiny_seg, tiny_zoo

NAN, INF = float('nan'), float('inf')
SEG = {
    'kd': (dict(type='KDLoss'), 'teacher_head', 'decode_head'),
    'sel': (dict(type='SelectiveLoss'), 'teacher_head', 'decode_head'),
    'feature': (
        dict(type='CWDLoss', tap='backbone.3', connector=dict(type='Conv1x1')),
        'teacher_tap',
        'backbone.3',
    ),
}
DETECTORS = {
    'dense': ('atss', 'bbox_head.atss_cls.weight', 'bbox_head'),
    'boxes': ('atss', 'bbox_head.atss_reg.weight', 'bbox_head'),
    'roi': ('faster', 'roi_head.bbox_head.fc_cls.weight', 'roi_head.bbox_head'),
    'roi boxes': ('faster', 'roi_head.bbox_head.fc_reg.weight', 'roi_head.bbox_head'),
    'roi features': ('faster', 'neck.fpn_convs.0.conv.weight', 'extract_feat'),
    'query': ('deformable', 'bbox_head.cls_branches.1.weight', 'bbox_head'),
}


def spoil(model, name, value):
    """Spoil one weight of the teacher."""
    with torch.no_grad():
        model.distillation.teacher.model.get_parameter(name).view(-1)[0] = value


@pytest.mark.parametrize('value', [NAN, INF])
@pytest.mark.parametrize(
    ('name', 'fit'),
    [('feature', None), *itertools.product(('kd', 'sel'), (None, 'unit', 'image'))],
)
def test_segmenters(teacher, batch, iteration, name, fit, value):
    loss, key, path = SEG[name]
    losses = {'it': dict(loss, begin=3)}
    fit = fit and dict(function=dict(type='ConstantFit'), split=fit)
    model = build_teacher_student(tiny_seg.model(8), copy.deepcopy(teacher), losses, fit=fit)
    feature = name == 'feature'
    weight = 'backbone.layer4.0.conv1.weight' if feature else 'decode_head.conv_seg.weight'
    model.train()
    spoil(model, weight, value)
    iteration(0)
    model(*batch, mode='loss')  # the term does not look at the teacher yet
    iteration(3)
    message = rf"`losses.it.{key}`: .* Found -?(nan|inf) in \d+ of \d+ values .* of '{path}' on"
    with pytest.raises(ValueError, match=message):
        model(*batch, mode='loss')


@pytest.mark.parametrize('fit', [None, 'unit', 'image'])
@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(tmp_path, name, fit):
    detector, weight, path = DETECTORS[name]
    losses = dict(sel=dict(type='SelectiveLoss', average='positive', box=dict(distance='iou')))
    if detector in tiny_det.FAMILIES:
        cfg = tiny_det.FAMILIES[detector]()
        checkpoint = tiny_det.save_weights(tmp_path / 't.pth', cfg, 1)
        model = build_teacher_student(cfg, dict(model=cfg, checkpoint=checkpoint), losses).train()
        data = tiny_det.batch(model)
    else:
        model = tiny_zoo.distil(tmp_path, detector, losses)
        data = tiny_zoo.batch(model)
    tiny_zoo.set_fit(model, fit, 0.5)
    model(*copy.deepcopy(data), mode='loss')
    model.distillation._checked.clear()
    spoil(model, weight, NAN)
    message = rf"`losses.sel.teacher_head`: .* Found nan in \d+ of \d+ values \(.* of '{path}' on"
    with pytest.raises(ValueError, match=message):
        model(*data, mode='loss')


def test_boxes_may_overflow(tmp_path):
    """Those units take no part."""
    cfg = tiny_det.fcos()
    checkpoint = tiny_det.save_weights(tmp_path / 't.pth', cfg, 1)
    losses = dict(kd=dict(type='KDLoss', average='positive', box=dict(distance='iou')))
    model = build_teacher_student(cfg, dict(model=cfg, checkpoint=checkpoint), losses).train()
    spoil(model, 'bbox_head.conv_reg.bias', 1e4)
    found = model(*tiny_det.batch(model), mode='loss')
    assert found['bbox.loss_kd_box'].isfinite()


def test_what_is_ignored_may_be_anything(teacher, batch, monkeypatch):
    model = build_teacher_student(
        tiny_seg.model(8), copy.deepcopy(teacher), dict(kd=dict(type='KDLoss'))
    ).train()
    logits = torch.randn(2, 3, 32, 40)
    logits[:, :, :4] = INF  # where the labels are ignored
    head = model.distillation.teacher.model.decode_head
    monkeypatch.setattr(head, 'forward', lambda features: logits)
    assert all(value.isfinite().all() for value in model(*batch, mode='loss').values())


def test_tensors_in_a_nest():
    a, b = torch.zeros(1), torch.ones(2)
    assert list(tensors_in([a, (b, None, dict(x=a, n=torch.arange(3))), 'text'])) == [a, b, a]
