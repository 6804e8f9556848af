import pytest
import torch
from mmengine.registry import init_default_scope

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.taps import Call
from mmdistill_ext.units.base import FusedCrossEntropy
from mmdistill_ext.units.pixel.pair import PixelPair
from tests import tiny_seg


def models(student_head=(), teacher_head=()):
    built = []
    for channels, change in ((8, dict(student_head)), (8, dict(teacher_head))):
        cfg = tiny_seg.model(channels)
        cfg['decode_head'].update(change)
        built.append(build_model(cfg))
    return built


def test_units_carry_what_the_heads_say():
    student, teacher = models(dict(align_corners=True, ignore_index=7))
    pair = PixelPair(student, teacher, 'decode_head', 'decode_head', 'losses.a')
    logits = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10)
    labels = torch.randint(0, 3, (2, 16, 20))
    calls = {'decode_head.loss_by_feat': Call((logits[0], None), {}, None)}
    units = pair(calls, Call((), {}, logits[1]), tiny_seg.samples(labels))
    assert units.student is logits[0]
    assert units.teacher is logits[1]
    assert torch.equal(units.labels, labels)
    assert (units.ignore_index, units.sigmoid, units.fused) == (7, False, None)
    assert (units.student_align_corners, units.teacher_align_corners) == (True, False)


@pytest.mark.parametrize(
    ('head', 'sigmoid'),
    [
        (dict(), False),
        (dict(loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)), True),
        (
            dict(
                num_classes=2,
                out_channels=1,
                loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True),
            ),
            True,
        ),
    ],
)
def test_sigmoid_heads_are_recognised(head, sigmoid):
    pair = PixelPair(*models(head, head), 'decode_head', 'decode_head', 'losses.a')
    assert pair.sigmoid is sigmoid


def test_task_loss_mirrors_the_head():
    loss = dict(
        type='CrossEntropyLoss', loss_weight=0.4, class_weight=[1, 2, 3], loss_name='loss_x'
    )
    pair = PixelPair(*models(dict(loss_decode=loss)), 'decode_head', 'decode_head', 'k')
    assert pair.fused_loss('fuse_task_loss') == FusedCrossEntropy(
        'loss_x', 0.4, (1.0, 2.0, 3.0), False
    )


@pytest.mark.parametrize(
    'head',
    [
        dict(loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)),
        dict(loss_decode=[dict(type='CrossEntropyLoss'), dict(type='DiceLoss')]),
        dict(sampler=dict(type='OHEMPixelSampler')),
    ],
)
def test_task_loss_that_is_not_plain_is_refused(head):
    init_default_scope('mmseg')  # mmseg builds its samplers in the default scope
    pair = PixelPair(*models(head, head), 'decode_head', 'decode_head', 'losses.a')
    with pytest.raises(ValueError, match='`model.fit` needs a head whose loss is one softmax'):
        pair.fused_loss('model.fit')


@pytest.mark.parametrize(
    ('head', 'prefix'),
    [('decode_head', 'decode'), ('auxiliary_head', 'aux'), ('auxiliary_head.1', 'aux_1')],
)
def test_names_in_the_log_are_those_of_mmseg(head, prefix):
    cfg = tiny_seg.model(8)
    aux = dict(cfg['decode_head'], in_channels=32, in_index=2)
    cfg['auxiliary_head'] = [aux, dict(aux)] if '.' in head else aux
    student = build_model(cfg)
    pair = PixelPair(student, models()[1], head, 'decode_head', 'losses.a')
    assert pair.prefix == prefix


def test_output_that_is_not_one_map_is_refused():
    pair = PixelPair(*models(), 'decode_head', 'decode_head', 'losses.a')
    call = Call(((torch.zeros(1, 3, 4, 4),) * 2, None), {}, None)
    with pytest.raises(
        TypeError, match=r"'decode_head.loss_by_feat' should give one tensor.*tuple"
    ):
        pair({pair.student_tap: call}, call, tiny_seg.samples(torch.zeros(1, 4, 4)))
