import copy
import gc
import weakref

import pytest
import torch
from mmengine.model import ExponentialMovingAverage

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from tests import tiny_seg

KD = dict(type='KDLoss', temperature=2.0)
SEL = dict(type='SelectiveLoss', temperature=2.0)


def distilled(teacher, losses, student=None, **kwargs):
    torch.manual_seed(5)
    model = build_teacher_student(student or tiny_seg.model(8), teacher, losses, **kwargs)
    model.init_weights()
    return model.train()


def plain(student=None):
    torch.manual_seed(5)
    model = build_model(student or tiny_seg.model(8))
    model.init_weights()
    return model.train()


def gradients(model, losses):
    total, _ = model.parse_losses(losses)
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_the_model_is_the_plain_student_to_everybody_else(teacher):
    model, student = distilled(teacher, dict(sel=SEL)), plain()
    assert isinstance(model, type(student))
    assert list(model.state_dict()) == list(student.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in student.named_parameters()]
    for key, value in student.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert model.decode_head.num_classes == 3


def test_teacher_follows_moves_and_casts_and_is_shared_by_copies(teacher):
    model = distilled(teacher, dict(sel=SEL)).double()
    own = model.distillation.teacher
    assert {p.dtype for p in own.parameters()} == {torch.float64}
    assert {p.dtype for p in model.half().distillation.teacher.parameters()} == {torch.float16}
    average = ExponentialMovingAverage(model)
    assert average.module.distillation.teacher is own
    assert len(list(average.parameters())) == len(list(plain().parameters()))
    assert copy.deepcopy(model).distillation.teacher is own
    model.to('meta')
    assert {p.device.type for p in own.parameters()} == {'meta'}


def test_losses_are_the_students_own_and_the_terms(teacher, batch):
    model = distilled(teacher, dict(kd=KD, sel=SEL))
    losses = model(*batch, mode='loss')
    expected = plain()(*batch, mode='loss')
    assert set(losses) - set(expected) == {
        'decode.loss_kd',
        'decode.loss_sel',
        'decode.teacher_better',
    }
    for key, value in expected.items():
        assert torch.equal(losses[key], value), key
    assert 0 < losses['decode.loss_sel'] < float('inf')


def test_data_preprocessor_beside_the_model_is_for_a_student_without(teacher):
    student = tiny_seg.model(8)
    own = student.pop('data_preprocessor')
    model = build_teacher_student(student, teacher, dict(sel=SEL), data_preprocessor=own)
    assert model.data_preprocessor.size == (32, 40)
    other = dict(own, size=(8, 8))
    model = build_teacher_student(
        tiny_seg.model(8), teacher, dict(sel=SEL), data_preprocessor=other
    )
    assert model.data_preprocessor.size == (32, 40)


@pytest.mark.parametrize('mode', ['tensor', 'predict'])
def test_other_modes_are_the_students(teacher, batch, mode):
    model, student = distilled(teacher, dict(sel=SEL)).eval(), plain().eval()
    with torch.no_grad():
        outputs = [net(*copy.deepcopy(batch), mode=mode) for net in (model, student)]
    if mode == 'predict':
        outputs = [[sample.seg_logits.data for sample in output] for output in outputs]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_weight_0_is_bit_identical_and_the_teacher_does_not_run(teacher, batch, monkeypatch):
    model = distilled(teacher, dict(kd={**KD, 'weight': 0.0}, sel={**SEL, 'weight': 0.0}))
    monkeypatch.setattr(model.distillation.teacher, 'forward', None)
    losses, expected = model(*batch, mode='loss'), plain()(*batch, mode='loss')
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[key], expected[key]) for key in expected)


def test_terms_follow_their_schedule(teacher, batch, iteration):
    model = distilled(
        teacher, dict(kd={**KD, 'begin': 2, 'warmup': 2, 'stop': 5}, sel={**SEL, 'stop': 1})
    )
    found = []
    for value in range(6):
        iteration(value)
        losses = model(*batch, mode='loss')
        found.append([key for key in ('kd', 'sel') if f'decode.loss_{key}' in losses])
    assert found == [['sel'], [], ['kd'], ['kd'], ['kd'], []]


def test_warmup_scales_the_loss(teacher, batch, iteration):
    model = distilled(teacher, dict(kd={**KD, 'warmup': 4, 'weight': 2.0}))
    model.eval()
    values = []
    for value in (0, 3):
        iteration(value)
        values.append(model(*batch, mode='loss')['decode.loss_kd'])
    torch.testing.assert_close(values[1], 4 * values[0])


@pytest.mark.parametrize(
    ('class_weight', 'avg_non_ignore'),  # mmseg's own loss fails on class weights with the latter
    [(None, False), (None, True), ([1.0, 2.0, 0.5], False)],
)
def test_fused_task_loss_equals_the_heads_own(teacher, batch, class_weight, avg_non_ignore):
    if class_weight:  # mmseg 1.2 fails on void labels with class weights
        for sample in batch[1]:
            sample.gt_sem_seg.data.clamp_(max=2)
    student = tiny_seg.model(8)
    student['decode_head']['loss_decode'].update(
        class_weight=class_weight, avg_non_ignore=avg_non_ignore, loss_weight=0.7
    )
    results = []
    for fused in (False, True):
        model = distilled(teacher, dict(sel=SEL), student, fuse_task_loss=fused).double()
        losses = model(batch[0].double(), batch[1], mode='loss')
        results.append((losses, gradients(model, losses)))
    (own, own_grad), (fused, fused_grad) = results
    assert own.keys() == fused.keys()
    for key in own:
        torch.testing.assert_close(fused[key].double().squeeze(), own[key].double().squeeze())
    for key in own_grad:
        torch.testing.assert_close(fused_grad[key], own_grad[key], msg=key)


def test_auxiliary_head_learns_from_the_teachers_main_head(teacher, batch):
    student = tiny_seg.model(8)
    student['auxiliary_head'] = dict(student['decode_head'], in_channels=32, in_index=2)
    model = distilled(teacher, dict(aux={**KD, 'head': 'auxiliary_head'}, sel=SEL), student)
    losses = model(*batch, mode='loss')
    assert {'aux.loss_aux', 'decode.loss_sel', 'aux.loss_ce', 'decode.loss_ce'} <= losses.keys()


def test_nothing_is_kept_after_the_step(teacher, batch):
    model = distilled(teacher, dict(sel=SEL))
    logits = []
    forward = model.decode_head.forward

    def spy(inputs):
        output = forward(inputs)
        logits.append(weakref.ref(output))
        return output

    model.decode_head.forward = spy
    losses = model(*batch, mode='loss')
    gradients(model, losses)
    del losses
    gc.collect()
    assert len(logits) == 1  # and no second forward
    assert logits[0]() is None


def test_one_step_under_autocast_gives_losses_in_fp32(teacher, batch):
    model = distilled(teacher, dict(sel=SEL, kd=KD))
    seen = []
    head = model.distillation.teacher.model.decode_head
    head.conv_seg.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(*batch, mode='loss')
    assert seen == [torch.bfloat16]
    assert losses['decode.loss_sel'].dtype == losses['decode.loss_kd'].dtype == torch.float32
    assert all(torch.isfinite(g).all() for g in gradients(model, losses).values())


@pytest.mark.parametrize('fused', [False, True])
def test_extreme_batches_give_finite_losses(teacher, fused):
    torch.manual_seed(0)
    model = distilled(teacher, dict(sel=SEL, kd=KD), fuse_task_loss=fused)
    model.eval()  # one value per channel is too few for batch statistics
    for size, label in (((1, 3, 32, 40), 255), ((1, 3, 4, 4), 1)):  # all void; a 1x1 feature map
        labels = torch.full((size[0], *size[2:]), label)
        losses = model(torch.randn(size), tiny_seg.samples(labels), mode='loss')
        assert all(torch.isfinite(value).all() for value in losses.values())
        assert all(torch.isfinite(g).all() for g in gradients(model, losses).values())
        if label == 255:
            assert losses['decode.loss_sel'] == losses['decode.loss_kd'] == 0


@pytest.mark.parametrize('label', [3, 7, -1])
def test_labels_outside_the_classes_are_refused_in_the_first_step(teacher, batch, label):
    batch[1][1].gt_sem_seg.data[0, 9, 9] = label
    model = distilled(teacher, dict(sel=SEL), fuse_task_loss=True)
    with pytest.raises(
        ValueError, match=rf'Labels should be in \[0, 3\).*Found the values {label}'
    ):
        model(*batch, mode='loss')


def other_classes(cfg):
    cfg['decode_head']['num_classes'] = 4
    return cfg


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(losses={}), '`losses` should name at least one loss'),
        (
            dict(losses=dict(a={**SEL, 'head': 'head'})),
            "`losses.a.head`.*Found 'head'.*decode_head",
        ),
        (dict(losses=dict(a={**SEL, 'teacher_head': 'x'})), "`losses.a.teacher_head`.*Found 'x'"),
        (dict(losses=dict(a={**SEL, 'head': 'backbone'})), '`losses.a.head`.*per-pixel head'),
        (dict(losses=dict(a={**SEL, 'temperature': 0})), '`losses.a.temperature` .*=0'),
        (
            dict(losses=dict(a={**SEL, 'weight': -1})),
            '`losses.a.weight` should be a finite.*=-1',
        ),
        (dict(losses=dict(a={**SEL, 'distance': 'l7'})), "`losses.a.distance` .*'l7'"),
        (dict(losses=dict(a={**SEL, 'colour': 1})), '`losses.a.colour` should be an argument'),
        (dict(losses=dict(a={**SEL, 'class_weight': [1, 1]})), '`class_weight`.*3'),
        (dict(student=other_classes(tiny_seg.model(8))), '`num_classes`.*4.*student.*3.*teacher'),
        (
            dict(student=dict(type='ResNet', _scope_='mmseg', depth=18)),
            '`student` should be a segm',
        ),
    ],
)
def test_errors_at_start_name_key_rule_and_value(teacher, change, message):
    arguments = dict(student=tiny_seg.model(8), teacher=teacher, losses=dict(sel=SEL))
    with pytest.raises(ValueError, match=message):
        build_teacher_student(**{**arguments, **change})


def test_fusing_an_unlike_task_loss_is_refused(teacher):
    student = tiny_seg.model(8)
    student['decode_head']['loss_decode'] = dict(type='DiceLoss')
    with pytest.raises(ValueError, match='`fuse_task_loss=True` needs.*DiceLoss'):
        build_teacher_student(student, teacher, dict(sel=SEL), fuse_task_loss=True)
