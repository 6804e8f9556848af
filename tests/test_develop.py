"""What the recipes of docs/develop.md add is used: built by its config, and trained for a step."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mmdistill_ext.connectors.build import build_connector
from mmdistill_ext.distillers import CollaborativeDistiller
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.teacher_student import DistilledModel, build_teacher_student
from mmdistill_ext.plain_config import plain_config
from mmdistill_ext.registry import CONNECTORS, MODELS
from mmdistill_ext.units.dense.family import DENSE_FAMILIES
from mmdistill_ext.units.pairing import has_units
from tests import runs, tiny_det, tiny_networks, tiny_seg, tiny_zoo
from tests.documents import PAGES, blocks_of, is_program, program
from tests.losses import contract

(PAGE,) = (page for page in PAGES if page.name == 'develop.md')
BLOCKS = [block for block in blocks_of(PAGE) if block.language == 'python']
TITLES = {
    'A loss of units',
    'A loss of features, with a parameter',
    'A connector',
    'A family of single-stage heads',
    'A pair for another kind of head',
    'A policy',
    'A hook that shows something of a loss',
    'An extension that stacks',
}


def title_of(block):
    lines = PAGE.read_text().splitlines()[: block.line]
    return [line for line in lines if line.startswith('### ')][-1].removeprefix('### ')


RECIPES = {title_of(block): block for block in BLOCKS}


@contextmanager
def recipe(title):
    """The names that a recipe defines."""
    with program(RECIPES[title]) as names:
        yield names


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A segmenter of twice the student's width."""
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    return dict(
        model=tiny_seg.model(16), checkpoint=tiny_seg.save_weights(path, tiny_seg.model(16), seed=1)
    )


def segmenter(teacher, losses, **options):
    cfg = {'_scope_': 'mmseg', **tiny_seg.model(8)}
    return build_teacher_student(cfg, copy.deepcopy(teacher), losses, **options).train()


def images():
    return torch.randn(2, 3, 32, 40), tiny_seg.samples(torch.randint(0, 3, (2, 32, 40)))


def random_batches(name):
    """Name of each sort of input that a loss takes -> the sort, and a batch of it."""
    sorts = contract.accepted(name)
    return {sort: (inputs, inputs.make(torch.float64)) for sort, inputs in sorts.items()}


def check_contract(name):
    """The shortest part of what test_contract.py says of registered losses."""
    for sort, (inputs, data) in random_batches(name).items():
        loss = contract.build(name)
        value, gradients = contract.outcome(loss, inputs, data)
        assert value > 0, sort
        assert all(gradient.any() for gradient in gradients), sort
        value, gradients = contract.outcome(loss, inputs, inputs.equal(data))
        assert value.abs() < 1e-12, sort
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients), sort
        assert contract.total(loss(inputs.ignore(data))) == 0, sort
        ignored = inputs.change(inputs.ignore(data), lambda x: x.detach() * torch.nan)
        value, gradients = contract.outcome(loss, inputs, ignored)
        assert value == 0, sort
        assert not any(gradient.any() for gradient in gradients), sort


def test_there_is_a_test_for_every_recipe():
    assert len(RECIPES) == len(BLOCKS)
    assert set(RECIPES) == TITLES
    assert all(is_program(block) for block in BLOCKS)


def test_the_files_that_recipes_follow_exist():
    text = PAGE.read_text()
    named = set(re.findall(r'`((?:tests|functional|losses|units|distillers)/[\w/]+\.py)`', text))
    new = set(re.findall(r'^Files?: (.+?)\. For free', text, re.MULTILINE))
    new = {path for line in new for path in re.findall(r'`([\w/]+\.py)`', line)}
    root = PAGE.parents[1]
    missing = [
        path
        for path in sorted(named - new)
        if not (root / path).exists() and not (root / 'mmdistill_ext' / path).exists()
    ]
    assert missing == []


def test_a_loss_of_units_learns_by_its_definition(teacher):
    with recipe('A loss of units') as names:
        model = segmenter(teacher, names['losses'])
        found = tiny_zoo.step(model, images())
        (units,) = found.units
        other, own = (
            torch.nn.functional.interpolate(x.detach(), (32, 40), mode='bilinear').div(2).softmax(1)
            for x in (units.teacher, units.student)
        )
        mean = (own + other) / 2
        expected = sum((x * (x / mean).log()).sum(1) for x in (own, other)).mean() / 2 * 4
        assert found.logged['decode.loss_js'] == pytest.approx(expected.item(), rel=1e-3)
        assert found.gradients['decode_head.conv_seg.weight'].any()
        assert set(contract.accepted('JSLoss')) == {'softmax map', 'softmax RoIs'}
        check_contract('JSLoss')


def test_a_parameter_of_a_loss_is_the_students(teacher, monkeypatch):
    with recipe('A loss of features, with a parameter') as names:
        model = segmenter(teacher, names['losses'])
        gain = dict(model.named_parameters())['connectors.stage.loss.gain']
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found = tiny_zoo.step(model, images())
        assert found.logged['loss_stage'] > 0
        assert found.gradients['connectors.stage.loss.gain'].any()
        optimizer.step()
        assert not torch.equal(gain, torch.ones(128))
        monkeypatch.setitem(contract.ARGUMENTS, 'ScaledFeatureLoss', dict(channels=6))
        check_contract('ScaledFeatureLoss')


def test_a_connector_brings_the_teachers_channels(teacher):
    with recipe('A connector') as names:
        assert CONNECTORS.get('SeparableConv') is names['SeparableConv']
        connector = build_connector(dict(type='SeparableConv'), 4, 6, 'key')
        assert connector(torch.randn(2, 4, 5, 7)).shape == (2, 6, 5, 7)
        model = segmenter(teacher, names['losses'])
        found = tiny_zoo.step(model, images())
        assert found.logged['loss_stage'] > 0
        learned = [x for key, x in found.gradients.items() if key.startswith('connectors.stage')]
        assert len(learned) == 4
        assert all(gradient.any() for gradient in learned)


def test_a_head_with_a_loss_of_its_own_is_read_by_its_family(tmp_path):
    with recipe('A family of single-stage heads') as names:
        cfg = tiny_det.atss(type='HalfATSSHead')
        path = tiny_det.save_weights(tmp_path / 'teacher.pth', tiny_det.atss(16), seed=1)
        model = build_teacher_student(
            {'_scope_': 'mmdet', **cfg},
            dict(model=tiny_det.atss(16), checkpoint=path),
            names['losses'],
            fit=dict(function=dict(type='ConstantFit', c=0.5), iou=0.1),
        ).train()
        model.load_state_dict(tiny_det.build(cfg, seed=0).state_dict())
        tiny_det.vary(model)
        assert type(DENSE_FAMILIES.find(model.bbox_head)) is names['HalfATSS']
        model.distillation.fit.has_hook = True
        found = tiny_zoo.step(model, tiny_det.batch(model))
        for key in ('loss_kd', 'loss_kd_box', 'l_soft', 'l_hard'):
            assert found.logged[f'bbox.{key}'] > 0, key
        plain = tiny_det.build(tiny_det.atss(), seed=0).train()
        plain.load_state_dict(model.state_dict())
        model.distillation.fit = None
        own, whole = (tiny_zoo.step(x, tiny_det.batch(x)).losses for x in (model, plain))
        halves = [a / b for a, b in zip(own['loss_bbox'], whole['loss_bbox'], strict=True) if b > 0]
        assert [half.item() for half in halves] == pytest.approx([0.5] * len(halves))
        assert halves


def test_a_pair_for_another_kind_of_head(tmp_path):
    with recipe('A pair for another kind of head') as names:
        wide = build_model(dict(type='TinyClassifier', channels=8))
        torch.save(dict(state_dict=wide.state_dict()), tmp_path / 'teacher.pth')
        model = build_teacher_student(
            dict(type='TinyClassifier'),
            dict(
                model=dict(type='TinyClassifier', channels=8),
                checkpoint=str(tmp_path / 'teacher.pth'),
            ),
            names['losses'],
            fuse_task_loss=True,
        ).train()
        labels = torch.tensor([0, 1, 2, 2])
        data = torch.randn(4, 3, 9, 9), [BaseDataElement(label=label) for label in labels]
        found = tiny_zoo.step(model, data)
        with torch.no_grad():
            own, other = (
                x(data[0]).log_softmax(1) for x in (model, model.distillation.teacher.model)
            )
        expected = (other.exp() * (other - own)).sum(1).mean().item()
        assert found.logged['head.loss_kd'] == pytest.approx(expected, rel=1e-4)
        task = torch.nn.functional.nll_loss(own, labels).item()
        assert found.logged['head.loss_label'] == pytest.approx(task, rel=1e-4)
        assert 'loss_label' not in found.logged
    assert not has_units(model)


def test_a_fit_function_weighs_the_hard_pixels(teacher):
    with recipe('A policy') as names:
        losses = dict(kd=dict(type='KDLoss'))
        model = segmenter(teacher, losses, fit=names['fit'])
        fit, data = model.distillation.fit, images()
        fit.has_hook = True
        for error, weight in ((0.1, 1.0), (-0.1, 0.7), (-0.5, 0.0)):
            fit.error = error
            logged = tiny_zoo.step(model, data).logged
            expected = logged['decode.l_soft'] + weight * logged['decode.l_hard']
            assert logged['loss'] == pytest.approx(expected, rel=1e-4)
            assert logged['decode.l_hard'] > 0


def test_a_second_prediction_is_what_networks_learn_from():
    with recipe('A policy') as names:
        students = tiny_networks.segmenters()
        model = CollaborativeDistiller(students, second=names['second']).train()
        inputs, samples = images()
        logits = [
            model.students[name].encode_decode(inputs, [x.metainfo for x in samples])
            for name in students
        ]
        labels = torch.stack([x.gt_sem_seg.data[0] for x in samples])
        expected = torch.nn.functional.cross_entropy(sum(logits) / 2, labels).item()
        losses = model(
            dict.fromkeys(students, inputs), dict.fromkeys(students, samples), mode='loss'
        )
        assert losses['ensemble/loss'].item() == pytest.approx(expected, rel=1e-3)
        total, _ = model.parse_losses(losses)
        total.backward()
        assert all(x.grad is not None for x in model.students.parameters())


def test_a_hook_logs_what_the_loss_counted(root, teacher, tmp_path):
    with recipe('A hook that shows something of a loss') as names:
        tiny_seg.forget_runs()
        cfg = tiny_seg.config(root, tmp_path)
        cfg = tiny_seg.distil(cfg, teacher['checkpoint'])
        cfg.custom_hooks = names['custom_hooks']
        runner = Runner.from_cfg(cfg)
        counted = []
        add = runner.model.distillation.losses['sel'].records.add_counts

        def count(counts):
            counted.append(counts[0].tolist())
            add(counts)

        runner.model.distillation.losses['sel'].records.add_counts = count
        runner.train()
    shares = [line['rarest/sel'] for line in runs.logged(tmp_path) if 'rarest/sel' in line]
    assert shares == pytest.approx([min(units) / sum(units) for units in counted])
    assert len(shares) == 2
    assert names['rarest'](torch.zeros(2, 3)) is None


def test_an_extension_stacks_over_a_distilled_student(teacher, root, tmp_path):
    with recipe('An extension that stacks') as names:
        cfg = tiny_seg.distil(tiny_seg.config(root, tmp_path), teacher['checkpoint'])
        cfg.model = {**names['model'], 'model': cfg.model.to_dict()}
        model = MODELS.build({'_scope_': 'mmseg', **Config(cfg.to_dict()).model}).train()
        assert isinstance(model, names['NoisyModel'])
        assert isinstance(model, DistilledModel)
        inputs, samples = images()
        torch.manual_seed(3)
        noise = 0.2 * torch.randn_like(inputs)
        expected = super(names['NoisyModel'], model).forward(inputs + noise, samples, 'loss')
        torch.manual_seed(3)
        losses = model(inputs, samples, mode='loss')
        assert 'decode.loss_sel' in losses
        for key, value in expected.items():
            assert torch.equal(losses[key], value), key
        plain = plain_config(Config(cfg.to_dict()))
        assert plain.model.type == 'EncoderDecoder'
        assert plain.model.backbone == Config(tiny_seg.model(8)).backbone
