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
