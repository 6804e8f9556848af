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


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_the_path_of_several_heads_leads_to_one(side):
    """Of auxiliary heads to the first, of a cascade to the last stage, which predicts."""
    cfg = tiny_seg.model(8)
    head = cfg['decode_head']
    cfg['auxiliary_head'] = [dict(head, in_channels=32, in_index=2), dict(head)]
    last = dict(head, type='OCRHead', ocr_channels=8)
    del last['num_convs']
    cascade = dict(cfg, type='CascadeEncoderDecoder', num_stages=2, decode_head=[head, last])
    own, other = build_model(cascade), models()[0]
    two = (own, other) if side == 'student' else (other, own)
    for path, expected in (
        ('decode_head', 'decode_head.1'),
        ('auxiliary_head', 'auxiliary_head.0'),
    ):
        paths = (path, 'decode_head') if side == 'student' else ('decode_head', path)
        pair = PixelPair(*two, *paths, 'losses.a')
        assert pair.heads[side == 'teacher'] == expected
        assert pair.predicts == (side == 'teacher' or path == 'decode_head')
        assert side == 'teacher' or pair.student_tap == f'{expected}.loss_by_feat'
        prefix = 'decode_1' if path == 'decode_head' else 'aux_0'
        assert pair.prefix == (prefix if side == 'student' else 'decode')


SIGMOID = dict(loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
ONE = dict(num_classes=2, out_channels=1, **SIGMOID)


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [(SIGMOID, {}), (ONE, dict(num_classes=2)), (dict(num_classes=2), ONE), (dict(), dict())],
)
def test_the_teachers_probabilities_reach_a_student_with_another_activation(student, teacher):
    pair = PixelPair(*models(student, teacher), 'decode_head', 'decode_head', 'losses.a')
    own, other = (torch.randn(2, x.out_channels, 4, 5) for x in (pair.head, pair.teacher_head))
    calls = {'decode_head.loss_by_feat': Call((own, None), {}, None)}
    units = pair(calls, Call((), {}, other), tiny_seg.samples(torch.zeros(2, 16, 20).long()))
    assert units.student is own
    assert units.teacher.shape == own.shape
    assert units.sigmoid is (student in (SIGMOID, ONE))
    p = other.sigmoid() if teacher is ONE else other.softmax(1)
    q = units.teacher.sigmoid() if units.sigmoid else units.teacher.softmax(1)
    torch.testing.assert_close(*(x if x.shape[1] == 1 else x[:, -1:] for x in (p, q)))


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [({}, SIGMOID), (ONE, dict(num_classes=2, **SIGMOID))],
)
def test_sigmoids_teach_no_softmax(student, teacher):
    message = (
        r'`losses.a` should .*same activation.*sigmoids are no distribution.*'
        r"student's 'decode_head', . sigmoids in the teacher's 'decode_head'.*backbone"
    )
    with pytest.raises(ValueError, match=message):
        PixelPair(*models(student, teacher), 'decode_head', 'decode_head', 'losses.a')


def test_points_are_units_where_the_student_sees_only_these():
    cfg = tiny_seg.model(8)
    head = dict(cfg['decode_head'], in_channels=[8], in_index=[0], type='PointHead', num_fcs=1)
    del head['num_convs'], head['norm_cfg']
    heads = [cfg['decode_head'], head]
    cfg.update(type='CascadeEncoderDecoder', num_stages=2, decode_head=heads)
    pair = PixelPair(build_model(cfg), models()[1], 'decode_head', 'decode_head', 'losses.a')
    labels = torch.arange(20 * 24).view(1, 20, 24) % 3
    labels[0, 2, 5] = 255
    teacher = torch.randn(1, 3, 20, 24)
    place = torch.tensor([[2, 5], [19, 23], [0, 0], [7, 11]])  # row and column
    points = ((place.flip(1) + 0.5) / torch.tensor([24, 20]))[None]
    logits = torch.randn(1, 3, 4)
    calls = {'decode_head.1.loss_by_feat': Call((logits, points, None), {}, None)}
    units = pair(calls, Call((), {}, teacher), tiny_seg.samples(labels))
    assert units.student is logits
    assert units.labels.tolist() == [[255, *(labels[0, row, x].item() for row, x in place[1:])]]
    torch.testing.assert_close(units.teacher[0], teacher[0, :, place[:, 0], place[:, 1]])
    wins = torch.tensor([[True, False, True, True]])
    won, valid = units.paint(wins, units.labels != 255)['']
    assert won.nonzero()[:, 1:].tolist() == [[0, 0], [7, 11]]
    assert valid.nonzero()[:, 1:].tolist() == [[0, 0], [7, 11], [19, 23]]


def test_output_that_is_not_one_map_is_refused():
    pair = PixelPair(*models(), 'decode_head', 'decode_head', 'losses.a')
    call = Call(((torch.zeros(1, 3, 4, 4),) * 2, None), {}, None)
    with pytest.raises(
        TypeError, match=r"'decode_head.loss_by_feat' should give one tensor.*tuple"
    ):
        pair({pair.student_tap: call}, call, tiny_seg.samples(torch.zeros(1, 4, 4)))
