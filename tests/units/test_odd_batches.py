"""Batches that real data has now and then: losses and gradients stay finite on every head."""

import pytest
import torch

from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.units.dense.family import DENSE_FAMILIES
from tests import tiny_dense, tiny_det, tiny_heads, tiny_zoo

KD = dict(type='KDLoss', average='positive', box=dict(distance='iou'))
SEL = dict(KD, type='SelectiveLoss')
TERMS = dict(kd=KD, l1=dict(KD, box=dict(distance='l1')), sel=SEL, joint=dict(SEL, together=True))
MASK = dict(type='SelectiveLoss', average='valid')
HEADS = dict(
    mask=dict(TERMS, mask=dict(MASK, head='roi_head.mask_head')),
    cascade={
        **{name: dict(term, head='roi_head.bbox_head.2') for name, term in TERMS.items()},
        'first': dict(KD, head='roi_head.bbox_head.0'),
        'mask': dict(MASK, head='roi_head.mask_head.1'),
    },
)
"""Terms of models with several heads; others have `TERMS`."""
FAMILIES = {**tiny_det.FAMILIES, **tiny_dense.FAMILIES}
MODELS = [*FAMILIES, *tiny_zoo.ROI, *tiny_zoo.QUERY]

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


def build(name, folder):
    """Build one of the models and its teacher."""
    losses = HEADS.get(name, TERMS)
    if name not in FAMILIES:
        return tiny_zoo.distil(folder, name, losses)
    cfg, teacher = (FAMILIES[name](channels) for channels in (8, 16))
    path = tiny_det.save_weights(folder / 'teacher.pth', teacher, seed=1)
    model = build_teacher_student(cfg, dict(model=teacher, checkpoint=path), losses)
    model.load_state_dict(tiny_det.build(cfg, 0).state_dict())
    return model.train()


@pytest.fixture(scope='module', params=MODELS)
def trained(request, tmp_path_factory):
    """Return a name and its model; the tables have every kind of head."""
    return request.param, build(request.param, tmp_path_factory.mktemp('teacher'))


def split_of(name, by):
    """How FIT splits; not at all where it is refused."""
    return None if name in tiny_dense.WHOLE else by


def assert_finite(step):
    assert all(torch.tensor(value).isfinite() for value in step.logged.values()), step.logged
    gradients = {name: x for name, x in step.gradients.items() if x is not None}
    assert gradients
    assert not [name for name, x in gradients.items() if not x.isfinite().all()]


@pytest.mark.parametrize('images', BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize('by', [None, 'unit', 'image'])
def test_losses_and_gradients_are_finite(trained, by, images):
    name, model = trained
    tiny_zoo.set_fit(model, split_of(name, by), 0.5)
    assert_finite(tiny_zoo.step(model, batch(model, images, masks=name in tiny_zoo.ROI)))


def test_every_family_of_single_stage_heads_is_in_the_table():
    """Those of `tiny_heads` see a batch without objects in the contract of pairs."""
    heads = [tiny_det.build(make(), 0).bbox_head for make in FAMILIES.values()]
    for make in tiny_heads.HEADS.values():
        model = tiny_heads.build(make(), 0)
        heads.append(getattr(model, 'bbox_head', None) or model.mask_head)
    covered = {type(DENSE_FAMILIES.find(head)) for head in heads}
    ours = {family for family in DENSE_FAMILIES if family.__module__.startswith('mmdistill_ext.')}
    assert ours <= covered


def scale_boxes(model, factor):
    """Make what predicts boxes predict huge ones."""
    parts = ('reg', 'bbox_pred')
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(('bbox_head', 'roi_head')) and any(x in name for x in parts):
                parameter.mul_(factor)


@pytest.mark.parametrize('by', [None, 'unit', 'image'])
def test_a_teacher_whose_boxes_overflow(trained, by):
    name, model = trained
    tiny_zoo.set_fit(model, split_of(name, by), 0.5)
    teacher = model.distillation.teacher.model
    weights = {key: value.clone() for key, value in teacher.state_dict().items()}
    scale_boxes(teacher, 1e4)
    try:
        data = batch(model, BATCHES['images of two sizes'], masks=name in tiny_zoo.ROI)
        assert_finite(tiny_zoo.step(model, data))
    except ValueError as error:
        # It looks for its classes where its boxes are; whether they are NaN then is up to mmcv.
        if not name.startswith('vfnet') or 'should give finite numbers' not in str(error):
            raise
    finally:
        teacher.load_state_dict(weights)


def test_a_student_of_yolox_whose_boxes_overflow(tmp_path):
    model = build('yolox', tmp_path)
    scale_boxes(model, 1e4)
    found = model(*batch(model, BATCHES['images of two sizes'], masks=False), mode='loss')
    ours = {key: value for key, value in found.items() if key.startswith('bbox.loss_')}
    assert len(ours) == 8
    assert all(value.isfinite() for value in ours.values()), ours
    sum(ours.values()).backward()
    gradients = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    assert gradients
    assert not [key for key, x in gradients.items() if not x.isfinite().all()]
