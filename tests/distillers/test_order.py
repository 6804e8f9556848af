"""The order of a config's keys means nothing: names decide."""

import pytest
import torch
from mmengine.config import Config

from mmdistill_ext.distillers import CollaborativeDistiller, build_teacher_student
from tests import tiny_collaboration, tiny_det, tiny_seg
from tests.runs import assert_identical, plain_config, state_of, train
from tests.tiny_networks import detectors, segmenters

PARTS = ('state_dict', 'optimizer')


def turned(node):
    """The same config with the keys of each dict in reverse."""
    if isinstance(node, dict):
        return {key: turned(node[key]) for key in reversed(list(node))}
    return [turned(item) for item in node] if isinstance(node, list) else node


def collaboration(root, work_dir):
    second = dict(type='ValidationWeighted', metric='mIoU', temperature=0.5)
    cfg = tiny_collaboration.config(root, work_dir, second)
    cfg.optim_wrapper = tiny_collaboration.PER_NETWORK
    return cfg


def distillation(root, work_dir, teacher):
    cfg = tiny_seg.distil(plain_config(root, work_dir), teacher)
    cfg.train_cfg.val_interval = 2
    conv = dict(type='Conv1x1')
    cfg.model.losses = dict(
        z=dict(type='SelectiveLoss', temperature=3.0),
        b=dict(type='CWDLoss', tap='backbone.3', connector=conv),
        a=dict(type='KDLoss', weight=0.3),
        c=dict(type='FeatureLoss', tap='backbone.2', connector=conv),
    )
    cfg.model.fuse_task_loss = True
    return cfg


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp('teacher') / 't.pth'
    return tiny_seg.save_weights(path, tiny_seg.model(16), seed=1)


@pytest.mark.parametrize('kind', ['distillation', 'collaboration'])
def test_a_run_does_not_depend_on_the_order_and_resumes_from_its_dump(
    root, tmp_path, teacher, kind
):
    def config(name):
        folder = tmp_path / name
        if kind == 'collaboration':
            return collaboration(root, folder)
        return distillation(root, folder, teacher)

    whole = train(config('whole'))
    expected = state_of(whole / 'iter_4.pth')
    cfg = config('turned')
    cfg.model = turned(cfg.model.to_dict())
    found = state_of(train(cfg) / 'iter_4.pth')
    dumped = Config.fromfile(next(whole.glob('*/vis_data/config.py')))
    assert list(dumped.model) == sorted(dumped.model)  # what mmengine dumps is in another order
    dumped.work_dir = str(tmp_path / 'resumed')
    dumped.resume, dumped.load_from = True, str(whole / 'iter_2.pth')
    resumed = state_of(train(dumped) / 'iter_4.pth')
    for part in PARTS:
        assert_identical(expected[part], found[part])
        assert_identical(expected[part], resumed[part])


def test_the_first_by_name_leads(teacher):
    losses = dict(b=dict(type='SelectiveLoss'), a=dict(type='KDLoss'))
    given = dict(model=tiny_seg.model(16), checkpoint=teacher)
    model = build_teacher_student(tiny_seg.model(8), given, losses, fuse_task_loss=True)
    assert [term.name for term in model.distillation.terms] == ['a', 'b']
    assert model.distillation.main_term.name == 'a'


def test_networks_are_sorted_by_name():
    students = dict(reversed(segmenters(3).items()))
    model = CollaborativeDistiller(students, dict(type='MinLoss'))
    assert model.names == list(model.data_preprocessor.names) == ['a', 'b', 'c']
    assert model.reference == 'a'


def test_the_reference_assigns_the_targets():
    students = detectors('atss gfl')
    for name in ('n0', 'n1'):
        joint = CollaborativeDistiller(students, dict(type='MinLoss'), reference=name).joint
        assert joint.reference == name
        assert [len(joint.taps(network)) for network in ('n0', 'n1')] == [
            2 if network == name else 1 for network in ('n0', 'n1')
        ]


def test_an_unknown_reference_is_named():
    with pytest.raises(ValueError, match="`reference` should be one of a, b. Found.*'c'"):
        CollaborativeDistiller(segmenters(), dict(type='MinLoss'), reference='c')


def test_a_reference_decides_for_unlike_assignments():
    """The detectors' losses differ with the reference, and only with it."""

    def losses(students, reference):
        torch.manual_seed(0)
        model = CollaborativeDistiller(students, dict(type='MinLoss'), reference=reference)
        for name in model.names:
            torch.manual_seed(len(name))
            tiny_det.vary(model.students[name])
        data = model.data_preprocessor(tiny_det.raw(), True)
        found = model.loss(data['inputs'], data['data_samples'])
        return found['ensemble/loss'].detach()

    pair = dict(a=tiny_det.atss(), b=tiny_det.fcos())
    other = dict(reversed(pair.items()))
    for reference in pair:
        assert torch.equal(losses(pair, reference), losses(other, reference))
    assert not torch.equal(losses(pair, 'a'), losses(pair, 'b'))
