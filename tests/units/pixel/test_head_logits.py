"""Which logits of a head count: those of mmseg's heads, and of a user's own."""

import pytest
import torch
from mmengine.model import BaseModule
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.collaborative import CollaborativeDistiller
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.units.pixel.head import find_head
from mmdistill_ext.units.pixel.head_logits import HeadLogits, register_logits
from tests import tiny_seg


class TwoOutputs(FCNHead):
    """Its forward gives the logits second."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        return logits.abs(), logits

    def loss_by_feat(self, outputs, samples):
        return super().loss_by_feat(outputs[1], samples)

    def predict_by_feat(self, outputs, metas):
        return super().predict_by_feat(outputs[1], metas)


@MODELS.register_module()
class UnknownHead(TwoOutputs):
    pass


@MODELS.register_module()
class KnownHead(TwoOutputs):
    pass


@MODELS.register_module()
class KnownChild(KnownHead):
    """Changes nothing that shows what it gives."""

    def forward(self, inputs):
        return super().forward(inputs)


@MODELS.register_module()
class ChangedChild(KnownHead):
    def predict(self, inputs, metas, cfg):
        return super().predict(inputs, metas, cfg)


@register_logits(KnownHead)
class Second(HeadLogits):
    def pick(self, output):
        return output[1]


def cfg(head='FCNHead', channels=8, **changes):
    model = tiny_seg.model(channels)
    model['decode_head'].update(type=f'mmseg.{head}', **changes)
    return {'_scope_': 'mmseg', **model}


def distilled(student, teacher, **losses):
    torch.manual_seed(0)
    trained = dict(model=teacher, pretrained=True)
    losses = losses or dict(kd=dict(type='KDLoss'), sel=dict(type='SelectiveLoss'))
    return build_teacher_student(student, trained, losses).train()


def step(model, labels=None, **kwargs):
    torch.manual_seed(1)
    labels = torch.randint(0, 3, (2, 32, 40)) if labels is None else labels
    losses = model(torch.randn(2, 3, 32, 40), tiny_seg.samples(labels), mode='loss', **kwargs)
    model.parse_losses(losses)[0].backward()
    return losses


@pytest.mark.parametrize('head', ['KnownHead', 'KnownChild'])
def test_a_registered_head_is_student_teacher_and_member(head):
    plain, own = (step(distilled(cfg(x, channels=8), cfg(channels=16))) for x in ('FCNHead', head))
    for key in ('decode.loss_kd', 'decode.loss_sel'):
        torch.testing.assert_close(own[key], plain[key])
    plain, own = (step(distilled(cfg(channels=8), cfg(x, channels=16))) for x in ('FCNHead', head))
    torch.testing.assert_close(own['decode.loss_kd'], plain['decode.loss_kd'])
    found = []
    for x in ('FCNHead', head):
        torch.manual_seed(0)
        model = CollaborativeDistiller(dict(a=cfg(x), b=cfg(x, 4)), dict(type='Linear')).train()
        torch.manual_seed(1)
        samples = tiny_seg.samples(torch.randint(0, 3, (2, 32, 40)))
        inputs = torch.randn(2, 3, 32, 40)
        losses = model(dict(a=inputs, b=inputs), dict(a=samples, b=samples), mode='loss')
        found.append(losses['a/loss_kl'])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ('head', 'changed'),
    [('UnknownHead', 'TwoOutputs.loss_by_feat'), ('ChangedChild', 'ChangedChild.predict')],
)
@pytest.mark.parametrize('side', ['student', 'teacher', 'members'])
def test_a_head_that_changes_what_it_gives_is_refused_at_the_start(head, changed, side):
    plain, own = cfg(), cfg(head)
    key = dict(student=r'losses.kd.head', teacher=r'losses.kd.teacher_head', members='students.b')
    message = rf'`{key[side]}` .*{head} with {changed} .*register_logits\({head}\).*backbone'
    with pytest.raises(ValueError, match=message):
        if side == 'members':
            CollaborativeDistiller(dict(a=plain, b=own), dict(type='Linear'))
        else:
            distilled(*((own, plain) if side == 'student' else (plain, own)))


@pytest.mark.parametrize(
    ('head', 'reason'),
    [('STDCHead', 'predicts boundaries'), ('VPDDepthHead', 'predicts depth')],
)
def test_heads_without_classes_are_refused(head, reason):
    model = build_model(cfg())
    model.decode_head = MODELS.get(head).__new__(MODELS.get(head))
    BaseModule.__init__(model.decode_head)
    with pytest.raises(
        ValueError, match=rf'`k` should lead to a head of classes.*{reason}.*backbone'
    ):
        find_head(model, 'decode_head', 'k')


CE, BCE = dict(type='CrossEntropyLoss'), dict(type='CrossEntropyLoss', use_sigmoid=True)
DICE, FOCAL = dict(type='DiceLoss'), dict(type='FocalLoss')
OHEM, LOVASZ = dict(type='OhemCrossEntropy'), dict(type='LovaszLoss', reduction='none')


@pytest.mark.parametrize(
    ('losses', 'sigmoid'),
    [
        (CE, False),
        (BCE, True),
        ([CE, DICE], False),
        ([DICE, CE], False),
        ([BCE, DICE], True),
        ([LOVASZ, CE], False),
        ([LOVASZ, BCE], True),
        (OHEM, False),
        (FOCAL, True),
        ([FOCAL, DICE], True),
        ([CE, FOCAL], False),  # the first says it, where they contradict each other
        ([FOCAL, CE], True),
        (DICE, True),  # alone it trains sigmoids
        (dict(type='DiceLoss', use_sigmoid=False), False),
        (LOVASZ, False),
    ],
)
def test_the_loss_of_pixels_says_whether_there_are_sigmoids(losses, sigmoid):
    found = find_head(build_model(cfg(loss_decode=losses)), 'decode_head', 'k')
    assert found.logits.sigmoid is sigmoid


@pytest.mark.parametrize('losses', [CE, BCE, [CE, DICE]])
def test_one_channel_is_a_sigmoid_whatever_the_loss(losses):
    head = dict(num_classes=2, out_channels=1, loss_decode=losses)
    logits = find_head(build_model(cfg(**head)), 'decode_head', 'k').logits
    assert logits.sigmoid
    assert logits.num_labels == 2


BINARY = dict(
    plain=dict(num_classes=2, out_channels=1, loss_decode=BCE),
    one_class=dict(num_classes=1, loss_decode=BCE),
    nothing_ignored=dict(num_classes=1, loss_decode=BCE, ignore_index=None),
    two_and_nothing_ignored=dict(
        num_classes=2,
        out_channels=1,
        loss_decode=[BCE, DICE | dict(ignore_index=None)],
        ignore_index=None,
    ),
)


@pytest.mark.parametrize('name', BINARY)
def test_binary_heads_as_they_are_written(name):
    """They train like one with two classes and one channel, with labels 0 and 1 (SEL, KD, COL)."""
    labels = torch.randint(0, 2, (2, 32, 40))
    found, together = [], []
    for head in (BINARY['plain'], BINARY[name]):
        model = distilled(cfg(**head), cfg(channels=16, **head))
        losses = step(model, labels)
        found.append([losses['decode.loss_kd'], losses['decode.loss_sel']])
        assert model.distillation.terms[0].pair.data_classes == 2
        torch.manual_seed(0)
        networks = dict(a=cfg(**head), b=cfg(channels=4, **head))
        model = CollaborativeDistiller(networks, dict(type='Linear')).train()
        torch.manual_seed(1)
        inputs, samples = torch.randn(2, 3, 32, 40), tiny_seg.samples(labels)
        losses = model(dict(a=inputs, b=inputs), dict(a=samples, b=samples), mode='loss')
        together.append([losses['a/loss_kl'], losses['ensemble/loss']])
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*together)
    assert found[0][0] > 0
