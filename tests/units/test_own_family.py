"""What a user adds from outside: a family of dense heads, and a pair for an unknown model."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import ATSSHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import nn

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.isolation import eval_mode
from mmdistill_ext.units import pairing
from mmdistill_ext.units.base import FusedCrossEntropy, Units
from mmdistill_ext.units.dense.family import DENSE_FAMILIES, Assigned, DenseFamily
from mmdistill_ext.units.pair import HeadPair
from mmdistill_ext.units.pairing import has_units, pair_heads, register_pair
from tests import tiny_det, tiny_zoo

KD = dict(type='KDLoss', average='positive', box=dict(distance='iou'))
SEL = dict(type='SelectiveLoss', average='positive', box=dict(distance='l1'), together=True)
LOSSES = dict(kd=KD, sel=SEL)


# -- a dense head, as a user writes it: names, targets and losses are its own


@MODELS.register_module()
class DotHead(BaseDenseHead):
    """Each point in a box learns its class and the logarithm of the distances to the sides."""

    def __init__(
        self, num_classes, in_channels, strides, feat_channels=8, stacked_convs=1, **kwargs
    ):
        super().__init__()
        self.num_classes = num_classes
        self.prior_generator = MlvlPointGenerator(strides, offset=0.5)
        self.classes = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        self.sides = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.loss_dots = MODELS.build(dict(type='FocalLoss', use_sigmoid=True))
        self.loss_sides = MODELS.build(dict(type='L1Loss'))

    def forward(self, features):
        return [self.classes(x) for x in features], [self.sides(x) for x in features]

    def loss_by_feat(self, scores, sides, batch_gt_instances, batch_img_metas, *_):
        priors = torch.cat(self.points(scores))
        labels, targets = self.draw_dots(priors, batch_gt_instances)
        scores, sides = (
            torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1) for maps in (scores, sides)
        )
        positive = labels < self.num_classes
        count = max(positive.sum().item(), 1)
        return dict(
            loss_dots=self.loss_dots(scores.flatten(0, 1), labels.flatten(), avg_factor=count),
            loss_sides=self.loss_sides(sides[positive], targets[positive], avg_factor=4 * count),
        )

    def points(self, maps):
        """Points and strides of each level, ``(n, 4)``."""
        sizes = [x.shape[-2:] for x in maps]
        return self.prior_generator.grid_priors(sizes, device=maps[0].device, with_stride=True)

    def draw_dots(self, priors, batch_gt_instances):
        """Labels ``(B, N)`` and targets ``(B, N, 4)``."""
        labels = torch.full((len(batch_gt_instances), len(priors)), self.num_classes)
        targets = torch.zeros(*labels.shape, 4)
        for image, truth in enumerate(batch_gt_instances):
            for box, label in zip(truth.bboxes, truth.labels, strict=True):
                low, high = priors[:, :2] - box[:2], box[2:] - priors[:, :2]
                sides = torch.cat((low, high), 1)
                inside = sides.amin(1) > 0
                labels[image, inside] = label
                targets[image, inside] = (sides / priors[:, 2:3])[inside].log()
        return labels, targets

    def predict_by_feat(self, *args, **kwargs):
        raise NotImplementedError


class Dots(DenseFamily):
    """What has to be said of it."""

    loss_methods = ('loss_by_feat', 'draw_dots')
    targets = 'draw_dots'
    needs_assigner = False
    all_rows = ('loss_dots',)
    sigmoid = True

    @property
    def score_channels(self):
        return self.head.num_classes

    def decode(self, priors, strides, predicted):
        low, high = (predicted.exp() * strides[:, None]).split(2, 1)
        return torch.cat((priors - low, priors + high), 1)

    decode_targets = decode

    def assigned(self, calls, levels):
        labels, targets = calls[-1].output
        every = torch.ones_like(labels, dtype=torch.bool)
        return Assigned(labels, every, targets, every)

    @contextmanager
    def tell_rows(self, own, split):
        def join():
            return tuple(torch.cat(parts, 1).flatten() for parts in zip(*split(), strict=True))

        self.tell_joined_rows(own, join)
        yield


DENSE_FAMILIES.register(DotHead)(Dots)


def dots(channels=8):
    return tiny_det.detector('ATSS', dict(type='DotHead', strides=tiny_det.STRIDES), None, channels)


def distilled(folder, teacher, losses=LOSSES, fit=None, seeds=(0, 1)):
    path = tiny_det.save_weights(folder / 'teacher.pth', teacher, seeds[1])
    model = build_teacher_student(
        dots(), dict(model=copy.deepcopy(teacher), checkpoint=path), losses, fit=fit
    )
    model.load_state_dict(tiny_det.build(dots(), seeds[0]).state_dict())
    return model.train()


def set_fit(model, by, c):
    score = 0.5 if by == 'unit' else 0.999  # then nothing is seen in the image without objects
    return tiny_zoo.set_fit(model, by, c, iou=0.1, score=score)


TEACHERS = dict(same=lambda: dots(16), atss=tiny_det.atss, fcos_norm=tiny_det.fcos_norm)


@pytest.mark.parametrize('teacher', TEACHERS)
def test_a_family_of_ones_own_learns_by_the_definition(teacher, tmp_path):
    model = distilled(tmp_path, TEACHERS[teacher]())
    data = tiny_det.batch(model)
    found = tiny_zoo.step(model, data)
    plain = tiny_zoo.step(tiny_det.build(dots(), 0).train(), data)
    for key, value in plain.losses.items():
        assert torch.equal(found.losses[key], value), key
    units = found.units[0]
    count = len(units.boxes.target)
    assert count > 10
    sums = tiny_zoo.reference(units, False)
    assert found.logged['bbox.loss_kd'] == pytest.approx(sums['classes'] / count, rel=1e-3)
    assert found.logged['bbox.loss_kd_box'] == pytest.approx(sums['boxes'] / count, rel=1e-3)
    sums = tiny_zoo.reference(units, True, joint=True)
    assert found.logged['bbox.loss_sel'] == pytest.approx(sums['classes'] / count, rel=1e-3)
    assert 0 < found.logged['bbox.loss_sel_box'] < math.inf
    assert 0 < sums['wins'].sum() < sums['wins'].numel()
    for key, gradient in found.gradients.items():
        assert gradient.isfinite().all(), key
        assert not torch.equal(gradient, plain.gradients[key]), key
    truth = torch.cat([sample.gt_instances.bboxes for sample in data[1]])
    distances = torch.cdist(units.boxes.target, truth).amin(1)
    torch.testing.assert_close(distances, torch.zeros(count), atol=1e-3, rtol=0)


def test_it_has_nothing_to_learn_from_itself(tmp_path):
    model = distilled(tmp_path, dots(), seeds=(0, 0))
    found = tiny_zoo.step(model, tiny_det.batch(model))
    for key in ('kd', 'kd_box'):
        assert found.logged[f'bbox.loss_{key}'] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize('by', ['unit', 'image'])
def test_its_own_loss_is_split(by, tmp_path):
    model = distilled(tmp_path, dots(16))
    data = tiny_det.batch(model)
    without = tiny_zoo.step(model, data)
    steps = {c: tiny_zoo.step(set_fit(model, by, c), data) for c in (0.0, 0.25, 1.0)}
    for key, gradient in without.gradients.items():
        assert torch.equal(steps[1.0].gradients[key], gradient), key
        none, some = (steps[c].gradients[key] for c in (0.0, 0.25))
        torch.testing.assert_close(some, none + 0.25 * (gradient - none), rtol=1e-3, atol=1e-5)
    for c, found in steps.items():
        soft, hard = found.logged['bbox.l_soft'], found.logged['bbox.l_hard']
        assert found.logged['loss'] == pytest.approx(soft + c * hard, rel=1e-3)
        assert soft == pytest.approx(steps[1.0].logged['bbox.l_soft'], rel=1e-4)
        assert hard > 0
    units = found.units[0]
    assert 0 < units.simple.sum() < units.simple.numel()
    sums = model.distillation.fit.pop_records()[-1]
    own = sum(without.logged[key] for key in ('loss_dots', 'loss_sides'))
    assert sums[:2].tolist() == pytest.approx([3 * own, 3], rel=1e-4)
    simple = units.simple if by == 'unit' else units.simple[:, 0]
    assert sums[2:].tolist() == [simple.sum(), simple.numel()]


def test_the_loss_on_other_images_is_its_own_loss(tmp_path):
    model = distilled(tmp_path, dots(16))
    pair = model.distillation.main_term.pair
    assert pair.has_labels(dict(data_samples=tiny_det.raw()['data_samples'][0]))
    with eval_mode(model):
        total, images = pair.gt_loss(model, tiny_det.raw())
    plain = tiny_zoo.step(tiny_det.build(dots(), 0).eval(), tiny_det.batch(model)).logged
    assert [total.item() / 3, images] == pytest.approx([plain['loss'], 3], rel=1e-4)


def test_contrast_masks_show_where_its_teacher_wins(tmp_path):
    model = distilled(tmp_path, dots(16))
    loss = model.distillation.losses['sel']
    loss.records.keep_contrast = True
    (units, _) = tiny_zoo.step(model, tiny_det.batch(model)).units
    maps = loss.records.pop_contrast().maps()
    wins = tiny_zoo.reference(units, True, joint=True)['wins']
    start = 0
    for stride, (height, width) in zip(tiny_det.STRIDES, ((8, 12), (4, 6), (2, 3)), strict=True):
        won, known = maps[f'_stride{stride}']
        assert won.shape == (3, 64, 96)
        assert known.all()
        expected = wins[:, start : start + height * width].view(3, height, width)
        assert torch.equal(won[:, ::stride, ::stride], expected)
        start += height * width


def test_a_subclass_with_another_loss_needs_a_family_of_its_own(monkeypatch):
    class Other(DotHead):
        def draw_dots(self, *args):
            return super().draw_dots(*args)

    class Renamed(DotHead):
        pass

    class Strict(ATSSHead):
        def get_targets(self, *args):
            return super().get_targets(*args)

    arguments = dict(num_classes=3, in_channels=8, strides=[8])
    assert type(DENSE_FAMILIES.find(Renamed(**arguments))) is Dots
    assert DENSE_FAMILIES.find(Other(**arguments)) is None
    assert DENSE_FAMILIES.find(nn.Conv2d(1, 1, 1)) is None
    monkeypatch.setattr(DENSE_FAMILIES, '_families', dict(DENSE_FAMILIES._families))

    @DENSE_FAMILIES.register(Other)
    class OtherDots(Dots):
        pass

    assert type(DENSE_FAMILIES.find(Other(**arguments))) is OtherDots
    assert type(DENSE_FAMILIES.find(Renamed(**arguments))) is Dots
    assert OtherDots.head_type is Other
    assert Dots.head_type is DotHead
    strict = Strict.__new__(Strict)
    assert DENSE_FAMILIES.find(strict) is None
    with pytest.raises(ValueError, match='once for a class of heads. Found Other, .* OtherDots'):
        DENSE_FAMILIES.register(Other)


# -- a kind of model that the package does not know


@MODELS.register_module()
class Tagger(BaseModel):
    """Gives each cell of a grid of 3 x 4 a class."""

    def __init__(self, channels=6, classes=3, **kwargs):
        super().__init__(**kwargs)
        self.backbone = nn.Conv2d(3, channels, 3, padding=1)
        self.tags = TagHead(channels, classes)

    def extract_feat(self, inputs):
        return self.backbone(inputs).relu()

    def forward(self, inputs, data_samples=None, mode='tensor'):
        cells = self.tags(self.extract_feat(inputs))
        return self.tags.loss_by_feat(cells, data_samples) if mode == 'loss' else cells


class TagHead(nn.Module):
    """Its logits are ``(B, 3, 3, 4)``."""

    def __init__(self, channels, classes):
        super().__init__()
        self.fc = nn.Conv2d(channels, classes, 1)

    def forward(self, features):
        return self.fc(F.adaptive_avg_pool2d(features, (3, 4))) * 20

    def loss_by_feat(self, cells, data_samples):
        labels = torch.stack([sample.tags for sample in data_samples])
        return dict(loss_tags=F.cross_entropy(cells, labels))


@register_pair(Tagger, 'a tagger', head='tags')
class TagPair(HeadPair):
    """Cell by cell."""

    prefix = 'tags'
    sigmoid = False
    predicts = True
    label_kinds = 'tags'
    num_classes = data_classes = 3
    ignore_index = 9

    def __init__(self, student, teacher, head, teacher_head, key):
        self.head = student.get_submodule(head)
        self.heads = head, teacher_head
        self.student_tap, self.teacher_tap = f'{head}.loss_by_feat', teacher_head
        self.student_taps = (self.student_tap,)

    def fused_loss(self, key):
        return FusedCrossEntropy('loss_tags')

    def __call__(self, taps, teacher_call, data_samples, split=None, own=None):
        return Units(
            student=taps[self.student_tap].args[0],
            teacher=teacher_call.output,
            labels=torch.stack([sample.tags for sample in data_samples]),
            ignore_index=self.ignore_index,
            split=split,
        )

    def has_labels(self, sample):
        return 'tags' in sample['data_samples']

    def gt_loss(self, student, batch, fused=None):
        loss = student(**batch, mode='loss')['loss_tags'].detach()
        return torch.stack((loss, torch.ones_like(loss)))


def tagged():
    torch.manual_seed(3)
    labels = torch.randint(3, (2, 3, 4))
    return torch.randn(2, 3, 12, 16), [BaseDataElement(tags=tags) for tags in labels]


def tagger(folder, fit=None, fuse=False, **losses):
    cfg = dict(type='Tagger', _scope_='mmdet')
    torch.manual_seed(1)
    teacher = build_model(dict(cfg, channels=12))
    torch.save(dict(state_dict=teacher.state_dict()), folder / 't.pth')
    torch.manual_seed(0)
    return build_teacher_student(
        cfg,
        dict(model=dict(cfg, channels=12), checkpoint=str(folder / 't.pth')),
        losses or dict(kd=dict(type='KDLoss'), sel=dict(type='SelectiveLoss')),
        fuse_task_loss=fuse,
        fit=fit,
    ).train()


def test_a_pair_for_an_unknown_model_learns_by_the_definition(tmp_path):
    model = tagger(tmp_path)
    loss = model.distillation.losses['sel']
    loss.records.keep_contrast = True
    inputs, samples = tagged()
    found = tiny_zoo.step(model, (inputs, samples))
    with torch.no_grad():
        own = model(inputs, mode='tensor')
        other = model.distillation.teacher.model(inputs, mode='tensor')
    labels = torch.stack([sample.tags for sample in samples])
    divergence = F.kl_div(own.log_softmax(1), other.softmax(1), reduction='none').sum(1)
    better = F.cross_entropy(other, labels, reduction='none') < F.cross_entropy(
        own, labels, reduction='none'
    )
    assert 0 < better.sum() < better.numel()
    assert found.logged['loss_tags'] == pytest.approx(F.cross_entropy(own, labels).item())
    assert found.logged['tags.loss_kd'] == pytest.approx(divergence.mean().item(), rel=1e-4)
    expected = divergence[better].mean().item()
    assert found.logged['tags.loss_sel'] == pytest.approx(expected, rel=1e-4)
    won, known = loss.records.pop_contrast().maps()['']
    assert torch.equal(won, better)
    assert known.all()
    assert all(gradient.any() for gradient in found.gradients.values())


@pytest.mark.parametrize('by', ['unit', 'image'])
def test_fit_splits_its_loss(by, tmp_path):
    def fitted(c):
        function = dict(type='ConstantFit', c=c)
        model = tagger(tmp_path, dict(function=function, split=by, threshold=0.4))
        model.distillation.fit.has_hook = True
        return tiny_zoo.step(model, tagged())

    plain = tiny_zoo.step(tagger(tmp_path), tagged())
    whole = fitted(1.0)
    assert 'loss_tags' not in whole.logged
    assert whole.logged['tags.loss_tags'] == pytest.approx(plain.logged['loss_tags'], rel=1e-5)
    for key, gradient in plain.gradients.items():
        torch.testing.assert_close(whole.gradients[key], gradient, rtol=1e-4, atol=1e-6)
    for c in (0.0, 0.3):
        found = fitted(c)
        soft, hard = found.logged['tags.l_soft'], found.logged['tags.l_hard']
        assert found.logged['loss'] == pytest.approx(soft + c * hard, rel=1e-4)
        assert soft + hard == pytest.approx(whole.logged['loss'], rel=1e-4)


def test_models_without_a_row_are_refused(tmp_path):
    model = tagger(tmp_path)
    assert has_units(model)
    assert not has_units(model.tags)
    with pytest.raises(ValueError, match=r'`student` should be .*`register_pair`.*Found TagHead'):
        pair_heads(model.tags, model, None, None, 'a')
    with pytest.raises(ValueError, match=r'`teacher.model` should be a tagger .*Found TagHead for'):
        pair_heads(model, model.tags, None, None, 'a')


def test_the_nearest_class_and_the_heads_class_decide(monkeypatch):
    monkeypatch.setattr(pairing, 'TABLE', list(pairing.TABLE))

    class Narrow(Tagger):
        pass

    class FineHead(TagHead):
        pass

    @register_pair(Narrow, 'a narrow tagger', head='tags', head_type=FineHead)
    class FinePair(TagPair):
        pass

    @register_pair(Narrow, 'a narrow tagger', teacher_head='tags', head_type=nn.Conv2d)
    class ConvPair(TagPair):
        pass

    wide, narrow, fine = Tagger(), Narrow(), Narrow()
    fine.tags = FineHead(6, 3)
    assert type(pair_heads(wide, wide, None, None, 'a')) is TagPair
    assert type(pair_heads(narrow, wide, None, None, 'a')) is TagPair  # no row for this head
    assert type(pair_heads(fine, narrow, None, None, 'a')) is FinePair
    assert type(pair_heads(fine, narrow, 'tags', None, 'a')) is FinePair
    assert pair_heads(fine, narrow, 'backbone', None, 'a').heads == ('backbone', 'tags')
    assert type(pair_heads(fine, narrow, 'backbone', 'tags', 'a')) is ConvPair
    with pytest.raises(
        ValueError, match=r'`teacher.model` should be a narrow tagger.*Found Tagger'
    ):
        pair_heads(fine, wide, None, None, 'a')
    with pytest.raises(ValueError, match=r"`a.head`.*'nothing'"):
        pair_heads(fine, fine, 'nothing', None, 'a')


def test_a_row_for_one_class_of_heads_names_it(monkeypatch):
    monkeypatch.setattr(pairing, 'TABLE', [row for row in pairing.TABLE if row.pair is not TagPair])

    @register_pair(Tagger, 'a tagger', head='tags', head_type=nn.Linear)
    class LinearPair(TagPair):
        pass

    with pytest.raises(ValueError, match=r'`a.head` should lead to a Linear. Found .*Tagger'):
        pair_heads(Tagger(), Tagger(), None, None, 'a')


def test_a_row_for_any_head_without_a_default_asks_for_one(monkeypatch):
    monkeypatch.setattr(pairing, 'TABLE', [row for row in pairing.TABLE if row.pair is not TagPair])
    register_pair(Tagger, 'a tagger')(TagPair)
    with pytest.raises(ValueError, match=r"`a.head` should lead to a head. Found 'none' .*Tagger"):
        pair_heads(Tagger(), Tagger(), None, None, 'a')
