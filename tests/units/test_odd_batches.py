"""Batches that real data has now and then: losses and gradients stay finite on every head."""

import pytest
import torch

from mmdistill_ext.units.dense.family import DENSE_FAMILIES
from tests import tiny_det, tiny_zoo
from tests.units.test_pair_contract import CASES

EMPTY = ([], [], [])
TWO = ([[6, 8, 40, 44], [20, 10, 60, 36]], [0, 2], [])
SMALL, LARGE = (40, 56), (64, 80)
CROWD = [[0, 0, 80, 64]]
BATCHES = {
    'no object at all': [(LARGE, EMPTY), (LARGE, EMPTY)],
    'an image without an object': [(LARGE, TWO), (LARGE, EMPTY)],
    'images of two sizes': [(SMALL, TWO), (LARGE, TWO)],
    'crowds': [(LARGE, (*TWO[:2], CROWD)), (LARGE, ([], [], CROWD))],
    'an image with a crowd alone': [(LARGE, ([], [], CROWD))],
}
"""Size and truth of each image: boxes, classes, ignored boxes."""


def batch(model, images, masks):
    generator = torch.Generator().manual_seed(1)
    data = dict(
        inputs=[
            torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
            for size, _ in images
        ],
        data_samples=[tiny_det.sample(size, *truth) for size, truth in images],
    )
    if masks:
        tiny_zoo.add_masks(data)
    data = model.data_preprocessor(data, training=True)
    return data['inputs'], data['data_samples']


@pytest.fixture(scope='module', params=CASES, ids=lambda case: case.name)
def trained(request, tmp_path_factory):
    """Return a case and its model; the table has every kind of head."""
    case = request.param
    return case, case.build(tmp_path_factory.mktemp(case.name), same=False)


@pytest.mark.parametrize('images', BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize('by', [None, 'unit', 'image'])
def test_losses_and_gradients_are_finite(trained, by, images):
    case, model = trained
    tiny_zoo.set_fit(model, by, 0.5)
    found = tiny_zoo.step(model, batch(model, images, masks=case.kind == 'roi'))
    assert all(torch.tensor(value).isfinite() for value in found.logged.values()), found.logged
    gradients = {name: x for name, x in found.gradients.items() if x is not None}
    assert not [name for name, x in gradients.items() if not x.isfinite().all()]
    assert gradients


def test_every_family_of_single_stage_heads_is_in_the_table():
    heads = [tiny_det.build(make(), 0).bbox_head for make in tiny_det.FAMILIES.values()]
    covered = {type(DENSE_FAMILIES.find(head)) for head in heads}
    ours = {family for family in DENSE_FAMILIES if family.__module__.startswith('mmdistill_ext.')}
    assert ours <= covered


def scale_boxes(model, case, factor):
    """Make what predicts boxes predict huge ones."""
    parts = ('reg', 'bbox_pred')
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(('bbox_head', 'roi_head')) and any(x in name for x in parts):
                parameter.mul_(factor)


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
def test_a_teacher_whose_boxes_overflow(trained, by, tmp_path):
    case, model = trained
    tiny_zoo.set_fit(model, by, 0.5)
    teacher = model.distillation.teacher.model
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}
    scale_boxes(teacher, case, 1e4)
    try:
        data = batch(model, BATCHES['images of two sizes'], masks=case.kind == 'roi')
        found = tiny_zoo.step(model, data)
    finally:
        teacher.load_state_dict(weights)
    assert all(torch.tensor(value).isfinite() for value in found.logged.values()), found.logged
    gradients = {name: x for name, x in found.gradients.items() if x is not None}
    assert not [name for name, x in gradients.items() if not x.isfinite().all()]


def test_a_student_of_yolox_whose_boxes_overflow(tmp_path):
    (case,) = (case for case in CASES if case.name == 'yolox')
    model = case.build(tmp_path, same=False)
    scale_boxes(model, case, 1e4)
    found = model(*batch(model, BATCHES['images of two sizes'], masks=False), mode='loss')
    ours = {name: value for name, value in found.items() if case.is_ours(name) and 'loss' in name}
    assert all(value.isfinite() for value in ours.values()), ours
    sum(ours.values()).backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert gradients
    assert not [name for name, x in gradients.items() if not x.isfinite().all()]
