import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.units.base import FusedCrossEntropy
from mmdistill_ext.units.pixel.pair import PixelPair
from tests import tiny_seg

TASK = FusedCrossEntropy()
WEIGHED = FusedCrossEntropy(class_weight=(1.0, 0.0, 2.5))


def build(head=(), preprocessor=(), test_cfg=(), **model):
    cfg = tiny_seg.model(8)
    cfg['decode_head'].update(head)
    cfg['data_preprocessor'].update(preprocessor)
    cfg['test_cfg'].update(test_cfg)
    torch.manual_seed(0)
    student = build_model({**cfg, **model})
    student.init_weights()
    torch.nn.init.normal_(student.decode_head.conv_seg.weight)  # so that the classes differ
    return student.eval()


def pair(student, head='decode_head'):
    return PixelPair(student, student, head, head, 'losses.a')


def make(size=(32, 40), label_size=None, images=2):
    """What a loader gives: raw images, and labels as large as the original images."""
    generator = torch.Generator().manual_seed(1)
    label_size = label_size or size
    samples = []
    for _ in range(images):
        label = torch.randint(0, 3, (1, *label_size), generator=generator)
        label[torch.rand(1, *label_size, generator=generator) < 0.2] = 255
        meta = dict(img_shape=size, ori_shape=label_size, pad_shape=size)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=meta))
    inputs = [
        torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)
        for _ in range(images)
    ]
    return dict(inputs=inputs, data_samples=samples)


def plain(student, batch, size, padded=None, class_weight=None):
    """The network's logits, upsampled as the label needs it, one image at a time."""
    align, total = student.align_corners, torch.zeros(2)
    for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
        image = (image.flip(0).float() - 127.5) / 64  # BGR to RGB, as tests.tiny_seg says
        right, bottom = ((padded or size)[i] - size[i] for i in (1, 0))
        image = F.pad(image, (0, right, 0, bottom))[None]
        with torch.no_grad():
            logits = student.decode_head(student.extract_feat(image))
        logits = F.interpolate(logits, image.shape[2:], mode='bilinear', align_corners=align)
        logits = logits[:, :, : size[0], : size[1]]
        label = sample.gt_sem_seg.data
        if label.shape[1:] != size:
            logits = F.interpolate(logits, label.shape[1:], mode='bilinear', align_corners=align)
        weight = None if class_weight is None else torch.tensor(class_weight)
        total[0] += F.cross_entropy(logits, label, weight, ignore_index=255, reduction='sum')
        valid = label[label != 255]
        total[1] += len(valid) if weight is None else weight[valid].sum()
    return total


def measured(student, batch, task=TASK):
    return pair(student).gt_loss(student, copy.deepcopy(batch), task)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('task', [TASK, WEIGHED], ids=['plain', 'weighed'])
def test_equals_cross_entropy_on_the_upsampled_logits(task, align_corners):
    student, batch = build(dict(align_corners=align_corners)), make()
    found = measured(student, batch, task)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    expected = plain(student, batch, (32, 40), class_weight=task.class_weight)
    torch.testing.assert_close(found, expected)
    assert found[0] > 0


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('label_size', [(30, 37), (45, 61)])
def test_padding_and_images_of_another_size_than_their_label(label_size, align_corners):
    student = build(dict(align_corners=align_corners), dict(test_cfg=dict(size_divisor=32)))
    batch = make((30, 37), label_size)
    expected = plain(student, batch, (30, 37), padded=(32, 64))
    torch.testing.assert_close(measured(student, batch), expected)


@pytest.mark.parametrize(
    'change',
    [
        dict(),
        dict(preprocessor=dict(test_cfg=dict(size=(64, 64)))),
        dict(test_cfg=dict(mode='slide', crop_size=(16, 20), stride=(8, 10))),
    ],
    ids=['whole', 'padded', 'slide'],
)
def test_equals_cross_entropy_on_what_the_test_tool_predicts(change):
    student, batch = build(**change), make((32, 40), (40, 56))
    found = measured(student, batch)
    expected = torch.zeros(2)
    with torch.no_grad():
        predicted = student.test_step(copy.deepcopy(batch))
    for own, sample in zip(predicted, batch['data_samples'], strict=True):
        label = sample.gt_sem_seg.data
        logits = own.seg_logits.data[None]
        expected[0] += F.cross_entropy(logits, label, ignore_index=255, reduction='sum')
        expected[1] += (label != 255).sum()
    torch.testing.assert_close(found, expected)


def test_labels_need_not_be_int64_and_another_index_may_be_ignored():
    student, batch = build(), make()
    expected = measured(student, batch)
    other = copy.deepcopy(batch)
    for sample in other['data_samples']:
        sample.gt_sem_seg.data = sample.gt_sem_seg.data.to(torch.uint8)
    assert torch.equal(measured(student, other), expected)
    for sample in batch['data_samples']:
        sample.gt_sem_seg.data[sample.gt_sem_seg.data == 255] = 7
    assert torch.equal(measured(build(dict(ignore_index=7)), batch), expected)


@pytest.mark.parametrize('task', [TASK, WEIGHED], ids=['plain', 'weighed'])
def test_all_void_is_0_and_0(task):
    batch = make()
    for sample in batch['data_samples']:
        sample.gt_sem_seg.data.fill_(255)
    assert measured(build(), batch, task).tolist() == [0, 0]


def test_the_weight_of_the_loss_is_no_part_of_it():
    student, batch = build(), make()
    expected = measured(student, batch)
    assert torch.equal(measured(student, batch, FusedCrossEntropy(loss_weight=0.4)), expected)


@pytest.mark.parametrize('training', [False, True])
def test_the_mode_is_left_alone(training):
    student, batch = build(), make()
    student.train(training)
    student.backbone.layer1.eval()
    modes = [module.training for module in student.modules()]
    before = copy.deepcopy(student.state_dict())
    measured(student, batch)
    assert [module.training for module in student.modules()] == modes
    assert all(parameter.grad is None for parameter in student.parameters())
    if not training:
        assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_sums_are_float32_under_autocast():
    student, batch = build(), make()
    expected = measured(student, batch)
    with torch.autocast('cpu', torch.bfloat16):
        found = measured(student, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize('class_weight', [None, [1.0, 0.5, 2.5]])
def test_equals_the_training_side_on_the_same_batch(class_weight, tmp_path):
    """The two GT losses are one function (FIT-1)."""
    cfg = tiny_seg.model(8)
    loss = dict(loss_weight=0.4, class_weight=class_weight)
    cfg['decode_head']['loss_decode'].update(loss)
    checkpoint = tiny_seg.save_weights(tmp_path / 't.pth', tiny_seg.model(16), seed=1)
    model = build_teacher_student(
        cfg,
        dict(model=tiny_seg.model(16), checkpoint=checkpoint),
        dict(kd=dict(type='KDLoss')),
        fit=dict(function=dict(type='ConstantFit')),
    )
    model.init_weights()
    model.eval()
    model.distillation.fit.has_hook = True
    batch, term = make(), model.distillation.main_term
    found = term.pair.gt_loss(model, copy.deepcopy(batch), term.fused)
    model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    (sums,) = model.distillation.fit.pop_records()
    torch.testing.assert_close(found, sums[:2])


def test_labels_are_looked_for():
    sample = make()['data_samples'][0]
    assert PixelPair.has_labels(dict(data_samples=sample))
    del sample.gt_sem_seg
    assert not PixelPair.has_labels(dict(data_samples=sample))


def test_the_head_that_predicts_is_known():
    cfg = tiny_seg.model(8)
    student = build_model(
        {**cfg, 'auxiliary_head': dict(cfg['decode_head'], in_channels=32, in_index=2)}
    )
    assert pair(student).predicts
    assert not pair(student, 'auxiliary_head').predicts
    ocr = dict(cfg['decode_head'], type='OCRHead', ocr_channels=8)
    ocr.pop('num_convs')
    cascade = build_model(
        {
            **cfg,
            'type': 'CascadeEncoderDecoder',
            'num_stages': 2,
            'decode_head': [cfg['decode_head'], ocr],
        }
    )
    assert [pair(cascade, f'decode_head.{i}').predicts for i in range(2)] == [False, True]
    batch = make()
    final = pair(cascade.eval(), 'decode_head.1')
    with torch.no_grad():
        predicted = cascade.test_step(copy.deepcopy(batch))
    expected = sum(
        F.cross_entropy(
            own.seg_logits.data[None], sample.gt_sem_seg.data, ignore_index=255, reduction='sum'
        )
        for own, sample in zip(predicted, batch['data_samples'], strict=True)
    )
    torch.testing.assert_close(final.gt_loss(cascade, batch, TASK)[0], expected)
