import copy
import dataclasses
import math

import pytest
import torch

from mmdistill_ext.distillers.teacher_student import DistilledModel, build_teacher_student
from mmdistill_ext.taps import Taps
from tests import tiny_det

FAMILIES = list(tiny_det.FAMILIES)
KD = dict(type='KDLoss', average='positive', box=dict(distance='iou'))
SEL = dict(type='SelectiveLoss', average='positive', box=dict(distance='l1'))
UNTAUGHT = ('centerness', 'conv_obj')
"""Outputs that are neither class nor box: the labels alone teach them."""


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    """Family -> teacher of twice the width, or the student itself."""
    folder = tmp_path_factory.mktemp('teachers')
    made = {}

    def get(name, same=False, **head):
        key = f'{name}{same}{head}'
        if key not in made:
            cfg = tiny_det.FAMILIES[name](8 if same else 16, **head)
            path = tiny_det.save_weights(folder / f'{len(made)}.pth', cfg, seed=0 if same else 1)
            made[key] = cfg, path
        cfg, path = made[key]
        return dict(model=copy.deepcopy(cfg), checkpoint=path)

    return get


def distilled(name, teacher, losses, cfg=None):
    """The student that ``tiny_det.build`` with seed 0 gives, distilled."""
    cfg = cfg or tiny_det.FAMILIES[name]()
    model = build_teacher_student(cfg, teacher, losses)
    model.load_state_dict(tiny_det.build(cfg, 0).state_dict())
    return model.train()


def step(model, boxes=True):
    """Named losses and gradients of one step."""
    losses = model(*tiny_det.batch(model, boxes), mode='loss')
    total, logged = model.parse_losses(losses)
    model.zero_grad()
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return losses, logged, gradients


@pytest.mark.parametrize('name', FAMILIES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, teachers):
    kinds = ['iou', 'l1'] + ['distribution'] * (name == 'gfl')
    losses = {kind: dict(KD, box=dict(distance=kind)) for kind in kinds}
    joint = dict(SEL, together=True)
    model = distilled(name, teachers(name, same=True), {**losses, 'sel': SEL, 'joint': joint})
    found, _, gradients = step(model)
    for kind in kinds:
        assert found[f'bbox.loss_{kind}'].item() == pytest.approx(0, abs=1e-5)
        assert found[f'bbox.loss_{kind}_box'].item() == pytest.approx(0, abs=1e-4)
    plain, _, expected = step(tiny_det.build(tiny_det.FAMILIES[name](), 0).train())
    assert plain.keys() <= found.keys()
    if name.startswith('fcos'):  # boxes are scaled by the stride elsewhere, rounding differs
        return
    only = distilled(name, teachers(name, same=True), dict(sel=SEL))
    found, _, gradients = step(only)
    assert found['bbox.teacher_better'].item() < 0.05
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-4)


def test_fcos_that_predicts_empty_boxes_has_nothing_to_learn_from_itself(teachers):
    """With ``norm_on_bbox`` distances are clamped at 0: boxes without width are common."""
    cfg = tiny_det.fcos_norm()
    teacher = teachers('fcos_norm', same=True)
    state = torch.load(teacher['checkpoint'])
    state['state_dict']['bbox_head.conv_reg.bias'].fill_(-0.5)
    path = teacher['checkpoint'].replace('.pth', '_empty.pth')
    torch.save(state, path)
    model = build_teacher_student(cfg, dict(teacher, checkpoint=path), dict(kd=KD))
    model.load_state_dict(state['state_dict'])
    found, _, gradients = step(model.train())
    assert found['bbox.loss_kd_box'].item() == pytest.approx(0, abs=1e-4)
    plain = tiny_det.build(cfg, 0).train()
    plain.load_state_dict(state['state_dict'])
    _, _, expected = step(plain)
    largest = max(g.abs().max() for g in expected.values())
    assert max(g.abs().max() for g in gradients.values()) < 10 * largest


@pytest.mark.parametrize('name', FAMILIES)
def test_both_losses_move_all_that_is_taught(name, teachers):
    model = distilled(name, teachers(name), dict(kd=KD, sel=dict(SEL, together=True)))
    losses, _, gradients = step(model)
    plain, _, expected = step(tiny_det.build(tiny_det.FAMILIES[name](), 0).train())
    assert set(plain) <= set(losses)
    for key in ('kd', 'kd_box', 'sel'):
        assert 0 < losses[f'bbox.loss_{key}'] < math.inf
    assert 0 < losses['bbox.teacher_better'] < 1
    assert not losses['bbox.teacher_better'].requires_grad
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        if expected[key].any() and not any(name in key for name in UNTAUGHT):
            assert not torch.equal(gradient, expected[key]), key


@pytest.mark.parametrize('name', FAMILIES)
def test_the_terms_alone_reach_scores_and_boxes(name, teachers):
    model = distilled(name, teachers(name), dict(kd=KD))
    losses = model(*tiny_det.batch(model), mode='loss')
    (losses['bbox.loss_kd'] + losses['bbox.loss_kd_box']).backward()
    _, _, plain = step(tiny_det.build(tiny_det.FAMILIES[name](), 0).train())
    for key, parameter in model.named_parameters():
        learns = plain[key].any() and not any(name in key for name in UNTAUGHT)
        assert (parameter.grad is not None and parameter.grad.any()) == learns, key
    assert all(p.grad is None for p in model.distillation.teacher.parameters())


@pytest.mark.parametrize('joint', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_a_batch_without_any_box_is_finite(name, joint, teachers):
    losses = dict(kd=KD, sel=dict(SEL, together=joint), selected=dict(SEL, average='selected'))
    model = distilled(name, teachers(name), losses)
    found, logged, gradients = step(model, boxes=False)
    for key in ('kd', 'sel', 'selected'):
        assert found[f'bbox.loss_{key}_box'].item() == 0
        assert found[f'bbox.loss_{key}'].isfinite()
    assert all(math.isfinite(value) for value in logged.values())
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)
    assert (found['bbox.loss_kd'] > 0) == (name != 'yolox')  # whose background has no class


def test_the_loss_without_positives_is_no_larger_than_the_plain_ones_scale(teachers):
    """Divided by 1, as mmdet's own losses are."""
    model = distilled('atss', teachers('atss'), dict(kd=KD, valid=dict(KD, average='valid')))
    found, *_ = step(model, boxes=False)
    valid = found['bbox.loss_kd'] / found['bbox.loss_valid']
    assert valid.item() == pytest.approx((2 * (96 + 24 + 6) + 64 + 16 + 4), rel=1e-3)


@pytest.mark.parametrize('name', ['retina', 'fcos_norm'])
@pytest.mark.parametrize(
    'change',
    [
        dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0]),
        dict(bgr_to_rgb=False, mean=[100.0, 110.0, 120.0], std=[1.0, 1.0, 1.0]),
        dict(pad_value=7),
    ],
    ids=['normalisation', 'order', 'padding'],
)
def test_the_teacher_sees_what_its_own_preprocessor_would_give(name, change, teachers):
    teacher = teachers(name)
    teacher['model']['data_preprocessor'].update(change)
    model = distilled(name, teacher, dict(kd=KD))
    own = model.distillation.teacher
    seen = []
    own.model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    raw = tiny_det.raw()
    expected = own.model.data_preprocessor(copy.deepcopy(raw), training=True)['inputs']
    data = model.data_preprocessor(raw, training=True)
    before = data['inputs'].clone()
    model(data['inputs'], data['data_samples'], mode='loss')
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(data['inputs'], before)


@pytest.mark.parametrize(
    ('student', 'teacher'), [('atss', 'gfl'), ('gfl', 'fcos_norm'), ('rtmdet', 'atss')]
)
def test_another_family_teaches(student, teacher, teachers):
    model = distilled(student, teachers(teacher), dict(kd=KD, sel=dict(SEL, together=True)))
    found, logged, gradients = step(model)
    assert all(math.isfinite(value) for value in logged.values())
    assert found['bbox.loss_kd'] > 0 < found['bbox.loss_kd_box']
    assert all(g is not None and g.isfinite().all() for g in gradients.values())


def test_softmax_heads_are_distilled(teachers):
    cfg = tiny_det.retina(softmax=True)
    model = distilled('retina', teachers('retina', softmax=True), dict(kd=KD, sel=SEL), cfg)
    found, _, gradients = step(model)
    assert found['bbox.loss_kd'] > 0
    assert all(g.isfinite().all() for g in gradients.values())
    assert model.distillation.losses['kd'].records.pop_counts().shape == (2, 4)


@pytest.mark.parametrize('name', ['retina', 'gfl', 'fcos_norm', 'rtmdet'])
def test_autocast_is_near_full_precision(name, teachers):
    model = distilled(name, teachers(name), dict(kd=KD))
    full, *_ = step(model)
    with torch.autocast('cpu', torch.bfloat16):
        half = model(*tiny_det.batch(model), mode='loss')
    for key in ('bbox.loss_kd', 'bbox.loss_kd_box'):
        assert half[key].dtype == torch.float32
        assert half[key].item() == pytest.approx(full[key].item(), rel=0.1), key


def test_a_few_steps_towards_the_teacher_bring_scores_and_boxes_closer(teachers):
    model = distilled('gfl', teachers('gfl'), dict(kd=dict(KD, box=dict(distance='distribution'))))
    keys = ('bbox.loss_kd', 'bbox.loss_kd_box')
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    values = []
    for _ in range(8):
        losses = model(*tiny_det.batch(model), mode='loss')
        values.append([losses[key].item() for key in keys])
        optimizer.zero_grad()
        sum(losses[key] for key in keys).backward()
        optimizer.step()
    assert all(last < 0.7 * first for first, last in zip(values[0], values[-1], strict=True))


@pytest.mark.parametrize('name', FAMILIES)
def test_bad_boxes_of_background_do_not_spread(name, teachers):
    """Most units are background; what their boxes are, even in the teacher, is of no account."""
    model = distilled(name, teachers(name), dict(kd=KD, sel=dict(SEL, together=True)))
    inputs, samples = tiny_det.batch(model)
    pair = model.distillation.main_term.pair
    with Taps(model, {path: path for path in pair.student_taps}) as taps:
        model.distillation.teacher.model(inputs, mode='tensor')
        super(DistilledModel, model).forward(inputs, samples, mode='loss')
    call = model.distillation.teacher(inputs, samples, [pair.teacher_tap])[pair.teacher_tap]
    expected = pair(taps, call, samples)
    background = torch.ones(expected.labels.shape, dtype=torch.bool)
    background[expected.boxes.index] = False
    start, spoilt = 0, []
    for level in call.output[1]:
        units = level.permute(0, 2, 3, 1).reshape(len(level), -1, pair.teacher.box_channels)
        units = units.clone()
        units[background[:, start : start + units.shape[1]]] = math.nan
        start += units.shape[1]
        height, width = level.shape[-2:]
        spoilt.append(units.reshape(len(level), height, width, -1).permute(0, 3, 1, 2))
    outputs = call.output[0], spoilt, *call.output[2:]
    found = pair(taps, dataclasses.replace(call, output=outputs), samples)
    assert start == background.shape[1]
    assert torch.equal(found.boxes.teacher, expected.boxes.teacher)
    for loss in model.distillation.losses.values():
        own, other = loss(found), loss(expected)
        assert all(torch.equal(own[key], other[key]) for key in other)


def test_fusing_is_refused(teachers):
    with pytest.raises(ValueError, match='`fuse_task_loss=True` needs.*Found ATSSHead: leave it'):
        build_teacher_student(tiny_det.atss(), teachers('atss'), dict(sel=SEL), fuse_task_loss=True)


@pytest.mark.parametrize(
    ('loss', 'message'),
    [
        (dict(KD, box=dict(distance='distribution')), "one of iou, l1 .*'distribution'"),
        (dict(SEL, difference='ce'), "sigmoid head. Found 'ce'"),
        (dict(KD, class_weight=[1.0] * 3), 'hold 4 weights'),
        (dict(KD, box=dict(sides=4)), '`losses.kd.box.sides`'),
        (dict(KD, head='decode_head'), "`losses.kd.head`.*'decode_head'"),
        (dict(KD, teacher_head='rpn_head'), "`losses.kd.teacher_head`.*'rpn_head'"),
    ],
)
def test_losses_that_do_not_fit_are_refused(loss, message, teachers):
    with pytest.raises(ValueError, match=message):
        build_teacher_student(tiny_det.atss(), teachers('atss'), dict(kd=loss))


def test_detectors_of_another_kind_are_refused(teachers, tmp_path):
    cfg, path = tiny_det.faster_rcnn(), tmp_path / 't.pth'
    with pytest.raises(ValueError, match=r'`teacher.model`.*two-stage.*Found ATSS for a FasterRC'):
        build_teacher_student(cfg, teachers('atss'), dict(kd=KD))
    state = tiny_det.build_model({**cfg, '_scope_': 'mmdet'}).state_dict()
    torch.save(dict(state_dict=state), path)
    teacher = dict(model=cfg, checkpoint=str(path))
    with pytest.raises(ValueError, match=r'`teacher.model`.*single-stage.*FasterRCNN for a ATSS'):
        build_teacher_student(tiny_det.atss(), teacher, dict(kd=KD))


def test_a_proposal_network_is_refused(teachers):
    cfg = {**tiny_det.faster_rcnn(), 'type': 'RPN'}
    cfg.pop('roi_head')
    with pytest.raises(ValueError, match="`losses.kd.head`.*'bbox_head', a RPNHead"):
        build_teacher_student(cfg, teachers('atss'), dict(kd=KD))
