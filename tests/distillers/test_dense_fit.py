"""The fit loss of single-stage detectors, against references that are formed afterwards."""

import copy
import math
from functools import partial

import pytest
import torch

from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.functional import unit_distillation
from mmdistill_ext.losses.boxes.box_term import BoxTerm
from mmdistill_ext.policies import ConstantFit
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.base import SplitRule
from mmdistill_ext.units.dense.families.atss import ATSS
from mmdistill_ext.units.dense.split import DenseSplit
from mmdistill_ext.units.detector_pair import IGNORED
from tests import tiny_det
from tests.tiny_zoo import in_one

FAMILIES = {
    **tiny_det.FAMILIES,
    'retina_softmax': partial(tiny_det.retina, softmax=True),
    'retina_decoded': partial(tiny_det.retina, reg_decoded_bbox=True, loss_bbox=tiny_det.GIOU),
    'yolox_l1': tiny_det.yolox,
}
SPLITS = ('unit', 'image')
KD = dict(type='KDLoss', average='positive', box=dict(distance='iou'))
SEL = dict(type='SelectiveLoss', average='positive', box=dict(distance='l1'), together=True)
BOTH = dict(kd=KD, sel={**SEL, 'weight': 0.7})
NOT_SEEN = 0.999  # a score that this teacher never reaches
IOU = 0.2


def family(name):
    return name.partition('_')[0]


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    """Family -> another detector of it; ``coarse`` ones lack the finest level of the student."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}

    def get(name, coarse=False):
        if (name, coarse) not in made:
            cfg = FAMILIES[name]()
            if coarse:
                cfg['neck']['start_level'] = 2
                head = cfg['bbox_head']
                strides = dict(strides=[16, 32, 64])
                if 'strides' in head:
                    head.update(strides)
                else:
                    head['anchor_generator'] = {**head['anchor_generator'], **strides}
            made[name, coarse] = cfg, tiny_det.save_weights(folder / f'{len(made)}.pth', cfg, 1)
        cfg, path = made[name, coarse]
        return dict(model=copy.deepcopy(cfg), checkpoint=path)

    return get


def prepare(model, name):
    """Weights of seed 0, in training."""
    model.load_state_dict(tiny_det.build(FAMILIES[name](), 0).state_dict())
    if name == 'yolox_l1':
        model.bbox_head.use_l1 = True
    return model.train()


def build(name, teacher, losses=BOTH):
    fit = dict(function=dict(type='ConstantFit'), iou=IOU)
    model = build_teacher_student(FAMILIES[name](), teacher, losses, fit=fit)
    model.distillation.fit.has_hook = True
    return prepare(model, name)


@pytest.fixture(scope='module')
def students(teachers):
    """Family -> student; a step changes nothing in it but the gradients."""
    made = {}

    def get(name, coarse=False):
        if (name, coarse) not in made:
            made[name, coarse] = build(name, teachers(name, coarse))
        return made[name, coarse]

    return get


def step(model, weight, split='unit', boxes=True, autocast=False, score=None):
    """Losses as logged, gradients and records with F(x) = ``weight``; None is no fit."""
    fit = model.distillation.fit
    fit.function, fit.by = ConstantFit(1.0 if weight is None else weight), split
    fit.score = NOT_SEEN if split == 'image' else score or 0.5
    inputs, samples = tiny_det.batch(model, boxes)
    try:
        model.distillation.fit = None if weight is None else fit
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            losses = model(inputs, samples, mode='loss')
    finally:
        model.distillation.fit = fit
    total, logged = model.parse_losses(losses)
    model.zero_grad()
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {key: float(value) for key, value in logged.items()}, gradients, fit.pop_records()


def overlap(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return width * height / max(areas - width * height, 1e-6)


class Reference:
    """A plain step of the student beside the teacher, with all that its loss modules saw."""

    def __init__(self, name, model):
        self.name, self.model = name, model
        self.pair = model.distillation.main_term.pair
        student = prepare(tiny_det.build(FAMILIES[name](), 0), name)
        inputs, self.samples = tiny_det.batch(student)
        self.modules = {k: m for k, m in student.bbox_head.named_children() if k[:5] == 'loss_'}
        paths = {path: path for path in self.pair.student_taps}
        with Taps(student, {**paths, **{k: f'bbox_head.{k}' for k in self.modules}}) as taps:
            self.losses = student(inputs, self.samples, mode='loss')
        head = self.pair.teacher_tap
        self.call = model.distillation.teacher(inputs, self.samples, [head])[head]
        self.taps = taps
        self.units = self.pair(taps, self.call, self.samples)
        self.found = self.pair.step(taps, self.call, self.samples)

    def confidence(self):
        """Scores of the teacher, ``(B, N, C)``, and with a softmax that of background."""
        levels = [[output[i] for i in self.pair.teacher_levels] for output in self.call.output]
        scores = in_one(self.units.teacher).transpose(1, 2)
        if not self.units.sigmoid:
            return scores.softmax(-1)
        if family(self.name) != 'yolox':
            return scores.sigmoid()
        objectness = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in levels[2]], 1)
        return scores.sigmoid() * objectness.sigmoid()

    def labels(self):
        """Of units; YOLOX's background counts, though it has no class."""
        labels = self.units.labels
        return labels.where(labels != IGNORED, 3) if family(self.name) == 'yolox' else labels

    def correct_units(self, score):
        """FIT-3, unit by unit."""
        boxes, right = self.units.boxes, torch.zeros(self.units.labels.shape, dtype=torch.bool)
        ious = {
            (image, unit): overlap(own, target)
            for image, unit, own, target in zip(
                *(x.tolist() for x in (*boxes.index, boxes.teacher, boxes.target)), strict=True
            )
        }
        values, labels = self.confidence().tolist(), self.labels().tolist()
        for image, unit in ((i, u) for i in range(3) for u in range(right.shape[1])):
            found, label = values[image][unit], labels[image][unit]
            likeliest = found.index(max(found))
            if label == 3:
                good = max(found) <= score if self.units.sigmoid else likeliest == 3
            else:
                good = likeliest == label and ious.get((image, unit), -1) >= IOU
            right[image, unit] = good and label != IGNORED
        return right

    def rows(self, name, number, simple):
        """Which rows of a module's call are simple; all units of a level, or the positive ones."""
        levels = self.found.student.all_levels
        counts = [level.height * level.width * level.priors for level in levels]
        positive = self.found.targets.all_assigned.labels < 3
        parts = [x.split(counts, 1) for x in (simple, positive)]
        kind = family(self.name)
        if kind == 'yolox':
            simple, positive = simple.flatten(), positive.flatten()
            return simple if name == 'loss_obj' else simple[positive]
        if kind == 'fcos':
            simple, positive = (torch.cat([x.flatten() for x in part]) for part in parts)
            return simple if name == 'loss_cls' else simple[positive]
        if name == 'loss_cls' or kind == 'retina':
            return parts[0][number].flatten()
        level = [i for i, x in enumerate(parts[1]) if x.any()][number]
        return parts[0][level][parts[1][level]]

    def own_parts(self, simple):
        """The head's loss over simple and hard rows: modules called again on either alone."""
        result = torch.zeros(2)
        for name, module in self.modules.items():
            calls, total, parts = self.taps.all(name), 0, torch.zeros(2)
            for number, call in enumerate(calls):
                kwargs = dict(call.kwargs)
                factor = kwargs.pop('avg_factor', None) or 1
                data = [*call.args, *([kwargs.pop('weight')] if 'weight' in kwargs else [])]
                chosen = self.rows(name, number, simple)
                chosen = chosen.repeat_interleave(len(data[0]) // max(len(chosen), 1))
                for place, part in enumerate((chosen, ~chosen)):
                    if part.any():
                        cut = [
                            tuple(y[part] for y in x) if isinstance(x, tuple) else x[part]
                            for x in data
                        ]
                        value = module(*cut, **kwargs, reduction_override='sum') / factor
                        parts[place] += value.detach()
                total += call.output.detach()
            if calls:
                values = self.losses[name]
                values = values if isinstance(values, list) else [values]
                result += parts * sum(x.detach() for x in values) / total
        return result

    def kd_parts(self, simple):
        """The distillation over simple and hard units, boxes included."""
        units = self.units
        kind = 'bce' if units.sigmoid else 'kl'
        values = unit_distillation(in_one(units.student), in_one(units.teacher), kind).detach()
        valid = units.labels != IGNORED
        boxes = BoxTerm()(units.boxes, torch.ones(len(units.boxes.scale), dtype=torch.bool))
        number = max(len(units.boxes.scale), 1)
        return torch.stack(
            [
                (values[part & valid].sum() + boxes[part[units.boxes.index]].sum()) / number
                for part in (simple, ~simple)
            ]
        ).detach()

    def score(self):
        """One that about half of the units exceed."""
        best = self.confidence().amax(-1).flatten().sort().values
        return best[len(best) // 2 :][:2].mean().item()


CASES = [(name, False) for name in FAMILIES]
CASES += [(name, True) for name in ('retina', 'gfl', 'fcos_norm', 'yolox')]


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize(('name', 'coarse'), CASES)
def test_the_parts_are_the_losses_of_simple_and_of_hard_units(name, coarse, split, teachers):
    model = build(name, teachers(name, coarse), dict(kd=KD))
    reference = Reference(name, model)
    score = reference.score()
    logged, _, (sums,) = step(model, 0.25, split, score=score)
    labels, every = reference.labels(), reference.found.targets.all_assigned.labels
    if split == 'unit':
        simple = reference.correct_units(score)
        start = every.shape[1] - simple.shape[1]  # of levels that the teacher has not
        whole = torch.cat((torch.ones(3, start, dtype=torch.bool), simple), 1)
        samples = [simple.sum().item(), (labels != IGNORED).sum().item()]
        assert 0 < samples[0] < samples[1]
    else:
        empty = torch.tensor([False, True, False])  # the image without objects: nothing is seen
        simple, whole = (empty[:, None].expand(x.shape) for x in (labels, every))
        samples = [1, 3]
    own = reference.own_parts(whole)
    parts = own + reference.kd_parts(simple)
    found = [logged['bbox.l_soft'], logged['bbox.l_hard']]
    assert found == pytest.approx(parts.tolist(), rel=1e-4)
    assert min(found) > 0
    assert logged['loss'] == pytest.approx(found[0] + 0.25 * found[1], rel=1e-4)
    assert sums.tolist() == pytest.approx([3 * own.sum().item(), 3, *samples], rel=1e-4)


@pytest.mark.parametrize(('split', 'boxes'), [('unit', True), ('image', True), ('unit', False)])
@pytest.mark.parametrize('name', FAMILIES)
def test_f_of_1_is_no_fit_to_the_bit_and_the_loss_linear_in_f(name, split, boxes, students):
    model = students(name)
    plain, expected, records = step(model, None, split, boxes)
    assert records == []
    runs = {f: step(model, f, split, boxes) for f in (0.0, 0.25, 1.0)}
    whole, gradients, (sums,) = runs[1.0]
    assert whole.keys() - plain.keys() == {'bbox.l_soft', 'bbox.l_hard'}
    assert gradients.keys() == expected.keys()
    for key in expected:
        assert torch.equal(gradients[key], expected[key]), key
    soft, hard = whole['bbox.l_soft'], whole['bbox.l_hard']
    for weight, (logged, _, (record,)) in runs.items():
        assert record.tolist() == pytest.approx(sums.tolist(), rel=1e-5)
        assert logged['bbox.l_hard'] == pytest.approx(hard, rel=1e-4, abs=1e-6)
        assert logged['loss'] == pytest.approx(soft + weight * hard, rel=1e-4, abs=1e-6)
        assert logged['bbox.l_soft'] == pytest.approx(soft, rel=1e-4, abs=1e-6)
        assert logged['bbox.teacher_better'] == plain['bbox.teacher_better']
    for key, value in plain.items():
        assert whole[key] == pytest.approx(value, rel=1e-5), key
    head = sum(value for key, value in plain.items() if key.startswith('loss_'))
    assert sums[:2].tolist() == pytest.approx([3 * head, 3], rel=1e-5)
    largest = max(g.abs().max() for g in expected.values())
    for key in expected:
        mixed = 0.75 * runs[0.0][1][key] + 0.25 * expected[key]
        torch.testing.assert_close(runs[0.25][1][key], mixed, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('name', tiny_det.FAMILIES)
def test_hard_units_of_weight_0_may_be_anything(name, split, students, monkeypatch):
    """A teacher that breaks down in one image knows nothing of it."""
    model = students(name)
    plain, expected, _ = step(model, 0.0, split)
    head = model.distillation.teacher.model.bbox_head
    forward = head.forward

    def broken(features):
        scores, *others = forward(features)
        for level in scores:
            level[0] = math.nan
        return scores, *others

    monkeypatch.setattr(head, 'forward', broken)
    found, gradients, _ = step(model, 0.0, split)
    assert math.isfinite(found['loss'])
    assert all(g.isfinite().all() for g in gradients.values())
    assert math.isnan(found['bbox.l_hard'])
    if split == 'image':  # whose first image is hard anyway
        assert found['loss'] == plain['loss']
        for key in expected:
            assert torch.equal(gradients[key], expected[key]), key


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('name', ['retina', 'gfl', 'fcos_norm', 'yolox'])
def test_autocast(name, split, students):
    model = students(name)
    _, expected, _ = step(model, None, split, autocast=True)
    _, gradients, _ = step(model, 1.0, split, autocast=True)
    assert all(torch.equal(gradients[key], expected[key]) for key in expected)
    halved, gradients, _ = step(model, 0.5, split, autocast=True)
    parts = halved['bbox.l_soft'] + 0.5 * halved['bbox.l_hard']
    assert halved['loss'] == pytest.approx(parts, rel=0.01)
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize('split', SPLITS)
def test_terms_on_one_head_share_its_own_loss_and_its_units(split, teachers, monkeypatch):
    calls = []
    decode = ATSS.decode
    monkeypatch.setattr(ATSS, 'decode', lambda *args: calls.append(1) or decode(*args))
    runs, counts = [], []
    for names in (('kd',), ('sel',), ('kd', 'sel')):
        model = build('atss', teachers('atss'), {name: BOTH[name] for name in names})
        calls.clear()
        logged, _, records = step(model, 0.3, split)
        assert len(records) == 1
        runs.append(logged)
        counts.append(len(calls))
    assert counts[2] == counts[0] > 0
    kd, sel, both = runs
    head = [key for key in kd if key.startswith('loss_')]
    assert all(both[key] == kd[key] == sel[key] for key in head)
    total = kd['loss'] + sel['loss'] - sum(kd[key] for key in head)
    assert both['loss'] == pytest.approx(total, rel=1e-5)
    parts = both['bbox.l_soft'] + 0.3 * both['bbox.l_hard']
    assert both['loss'] == pytest.approx(parts, rel=1e-5)


def answer(reference, change):
    """What a teacher would say that knows the student's labels, and errs as ``change`` says."""
    found, labels = reference.found, reference.units.labels
    scores = torch.full((*labels.shape, 3), -9.0)
    deltas = torch.zeros(*labels.shape, 4)
    index = found.targets.index
    scores[(*index, labels[index])] = 9.0
    targets = reference.pair.head.bbox_coder.encode(
        found.student.priors[index[1]], reference.units.boxes.target
    )
    deltas[index] = targets
    change(scores, deltas, index)
    outputs = []
    for values in (scores, deltas):
        parts = values.split([level.height * level.width for level in found.student.levels], 1)
        outputs.append(
            [
                part.view(3, level.height, level.width, -1).permute(0, 3, 1, 2)
                for part, level in zip(parts, found.student.levels, strict=True)
            ]
        )
    return outputs


def miss_an_object(scores, deltas, index):
    scores[0, ..., 1] = -9


def shift_boxes(scores, deltas, index):
    deltas[2, :, :2] += 30


def swap_classes(scores, deltas, index):
    scores[2] = scores[2].flip(-1) + torch.tensor([0.0, 0.0, 20.0]).flip(-1)


def see_something_in_the_empty_one(scores, deltas, index):
    scores[1, 40, 0] = 9.0


def see_it_in_the_ignored_region_alone(scores, deltas, index):
    """The padding of the last image: no unit of the student."""
    scores[2, 11, 0] = 9.0


@pytest.mark.parametrize(
    ('change', 'simple'),
    [
        (lambda *_: None, [True, True, True]),
        (miss_an_object, [False, True, True]),
        (shift_boxes, [True, True, False]),
        (swap_classes, [True, True, False]),
        (see_something_in_the_empty_one, [True, False, True]),
        (see_it_in_the_ignored_region_alone, [True, True, True]),
    ],
)
def test_an_image_is_simple_when_all_objects_are_found_and_nothing_else(change, simple, teachers):
    reference = Reference('atss', build('atss', teachers('atss')))
    reference.call.output = answer(reference, change)
    step = reference.pair.step(reference.taps, reference.call, reference.samples)
    split = SplitRule('image', 0.9, 1.0, iou=0.5, score=0.3)
    found = DenseSplit(step, split, reference.pair.head)
    assert found.right.tolist() == simple
    assert torch.equal(found.simple, torch.tensor(simple)[:, None].expand(found.simple.shape))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(iou=0), r'`fit.iou` should be in \(0, 1\]. Found fit.iou=0'),
        (dict(iou=1.1), 'fit.iou=1.1'),
        (dict(score=1), r'`fit.score` should be in \[0, 1\). Found 1'),
        (dict(score=-0.1), '`fit.score`.*Found -0.1'),
        (dict(score='0.3'), "`fit.score`.*Found '0.3'"),
    ],
)
def test_bad_rules_are_named(change, message, teachers):
    fit = dict(function=dict(type='ConstantFit'), **change)
    with pytest.raises(ValueError, match=message):
        build_teacher_student(tiny_det.atss(), teachers('atss'), BOTH, fit=fit)


def test_a_head_whose_loss_has_no_rows_is_refused(teachers):
    cfg = tiny_det.retina(loss_cls=dict(type='GHMC', use_sigmoid=True))
    fit = dict(function=dict(type='ConstantFit'))
    with pytest.raises(ValueError, match='`fit` needs loss modules.*GHMC in `loss_cls` of Retina'):
        build_teacher_student(cfg, teachers('retina'), BOTH, fit=fit)
