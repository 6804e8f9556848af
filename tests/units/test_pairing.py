import subprocess
import sys

import pytest

from mmdistill_ext.units.dense.pair import DensePair
from mmdistill_ext.units.pairing import has_units, pair_heads
from mmdistill_ext.units.query.pair import QueryPair
from mmdistill_ext.units.roi.mask_pair import MaskPair
from mmdistill_ext.units.roi.pair import RoIPair
from tests import tiny_det, tiny_zoo

BOX, MASK = 'roi_head.bbox_head', 'roi_head.mask_head'


@pytest.fixture(scope='module')
def model():
    """Name -> detector."""
    made = {}

    def get(name):
        if name not in made:
            base, *variant = name.split(' ')
            if base in tiny_det.FAMILIES:
                made[name] = tiny_det.build(tiny_det.FAMILIES[base](), 0)
            else:
                made[name] = tiny_zoo.build(vary(base, *variant), 0)
        return made[name]

    return get


def vary(base, variant=None):
    """Config of a detector, or of a variant of it."""
    cfg = tiny_zoo.config(base)
    if variant == 'untrained':
        cfg.train_cfg = None
    elif variant == 'sigmoid':
        cfg.roi_head.bbox_head.loss_cls.use_sigmoid = True
    elif variant == 'eql':
        cfg.roi_head.bbox_head.loss_cls = dict(type='EQLV2Loss', num_classes=3)
    elif variant == 'classes':
        tiny_zoo._shrink(cfg, dict(num_classes=4))
    return cfg


@pytest.mark.parametrize(
    ('student', 'teacher', 'head', 'teacher_head', 'kind', 'prefix', 'predicts'),
    [
        ('atss', 'gfl', None, None, DensePair, 'bbox', True),
        ('faster', 'mask', None, None, RoIPair, 'bbox', True),
        ('faster', 'cascade', None, f'{BOX}.1', RoIPair, 'bbox', True),
        ('faster', 'pisa', None, None, RoIPair, 'bbox', True),
        ('faster', 'dynamic', None, None, RoIPair, 'bbox', True),
        ('mask', 'mask', MASK, None, MaskPair, 'mask', False),
        ('mask', 'cascade', MASK, f'{MASK}.2', MaskPair, 'mask', False),
        ('scoring', 'pointrend', None, None, RoIPair, 'bbox', True),
        ('cascade', 'cascade', None, None, RoIPair, 'bbox_2', True),
        ('cascade', 'cascade', MASK, None, MaskPair, 'mask_2', False),
        ('faster', 'cascade', None, None, RoIPair, 'bbox', True),
        ('htc_plain', 'cascade', f'{BOX}.0', None, RoIPair, 'bbox_0', False),
        ('double', 'grid', None, None, RoIPair, 'bbox', True),
        ('grid', 'sabl', None, None, RoIPair, 'bbox', True),
        ('pisa', 'dynamic', None, None, RoIPair, 'bbox', True),
        ('seesaw', 'faster', None, None, RoIPair, 'bbox', True),
        ('sparse', 'dino', None, None, QueryPair, 'bbox_1', True),
        ('dino', 'sparse', None, f'{BOX}.0', QueryPair, 'bbox', True),
        ('queryinst', 'ddq', f'{BOX}.0', None, QueryPair, 'bbox_0', False),
        ('ddq', 'dino', None, None, QueryPair, 'bbox', True),
        ('scoring', 'mask', MASK, None, MaskPair, 'mask', False),
        ('cascade', 'faster', f'{BOX}.0', BOX, RoIPair, 'bbox_0', False),
        ('cascade', 'cascade', f'{BOX}.2', None, RoIPair, 'bbox_2', True),
        ('cascade', 'cascade', f'{MASK}.2', f'{MASK}.0', MaskPair, 'mask_2', False),
        ('detr', 'detr', None, None, QueryPair, 'bbox', True),
        ('deformable', 'dino', None, None, QueryPair, 'bbox', True),
        ('dino', 'dab', None, None, QueryPair, 'bbox', True),
    ],
)
def test_pairs(student, teacher, head, teacher_head, kind, prefix, predicts, model):
    assert has_units(model(student))
    pair = pair_heads(model(student), model(teacher), head, teacher_head, 'losses.a')
    assert type(pair) is kind
    assert pair.prefix == prefix
    assert pair.predicts == predicts
    assert pair.data_classes == 3
    names = ('outside', 'inside') if kind is MaskPair else ('a', 'b', 'c', 'background')
    assert pair.label_names(('a', 'b', 'c')) == names
    assert pair.num_classes == (2 if kind is MaskPair else 3)


@pytest.mark.parametrize(
    ('student', 'teacher', 'head', 'teacher_head', 'message'),
    [
        ('cascade', 'cascade', f'{BOX}.3', None, "`a.head`.*no '3', only: 0, 1, 2"),
        ('sparse', 'faster', None, BOX, '`teacher.model`.*a Sparse R-CNN.*Found FasterRCNN'),
        ('faster', 'sparse', None, f'{BOX}.0', '`a.teacher_head`.*DIIHead in a SparseRoIHead'),
        ('faster', 'crowd', None, None, 'a MultiInstanceBBoxHead in a .*FeatureLoss.*any head'),
        ('mask', 'queryinst', MASK, None, 'a DynamicMaskHead in a SparseRoIHead.*any head'),
        ('queryinst', 'mask', MASK, None, '`teacher.model`.*a QueryInst as.*Found MaskRCNN'),
        ('queryinst', 'sparse', MASK, None, "`a.teacher_head`.*no 'mask_head'"),
        ('faster', 'faster', f'{BOX}.loss', BOX, '`a.head`.*a Shared2FCBBoxHead'),
        ('dino', 'dino', 'bbox_head.loss', 'bbox_head', '`a.head`.*a DINOHead'),
        ('faster untrained', 'faster', None, None, 'should have an assigner.*train_cfg'),
        ('faster sigmoid', 'faster', None, None, '`a.head`.*box head.*one softmax.*CrossEntr'),
        ('faster', 'faster sigmoid', None, None, '`a.teacher_head`.*one softmax.*CrossEntr'),
        ('faster', 'faster eql', None, None, 'one softmax.*Found EQLV2Loss'),
        ('faster', 'faster classes', None, None, '`num_classes`.*Found 3 in.*, 4 in'),
        ('mask', 'mask classes', MASK, None, '`num_classes`.*Found 3 in.*, 4 in'),
        ('detr', 'detr classes', None, None, '`num_classes`.*Found 3 in.*, 4 in'),
        ('dino', 'dino classes', None, None, '`num_classes`.*Found 3 in.*, 4 in'),
        ('faster', 'mask', MASK, None, "`a.head`.*no 'mask_head', only: bbox_roi_extr"),
        ('mask', 'faster', MASK, None, "`a.teacher_head`.*no 'mask_head', only: bbox_roi"),
        ('mask', 'mask', MASK, BOX, "`a.teacher_head`.*of FCNMaskHead.*Found 'roi_head.bbox"),
        ('mask', 'mask', BOX, MASK, '`a.teacher_head`.*of BBoxHead.*a FCNMaskHead in a St'),
        ('faster', 'faster', 'rpn_head', None, '`a.head`.*a RPNHead in a StandardRoIHead'),
        ('faster', 'atss', None, None, '`teacher.model`.*two-stage.*Found ATSS for a Fast'),
        ('atss', 'faster', None, None, '`teacher.model`.*single-stage.*FasterRCNN for a ATSS'),
        ('detr', 'faster', None, None, '`teacher.model`.*a DETR as.*FasterRCNN for a DETR'),
        ('mask', 'dino', MASK, None, '`teacher.model`.*two-stage.*DINO for a MaskRCNN'),
        ('detr', 'detr untrained', None, None, '`a.teacher_head`.*`train_cfg.assigner`'),
        ('dino', 'deformable untrained', None, None, '`a.teacher_head`.*`train_cfg.assigner`'),
        ('dino', 'detr', None, None, 'both sigmoid.*Found True in.*DINOHead, False in.*DETRHead'),
        ('detr', 'deformable', None, None, 'both sigmoid.*Found False.*, True in'),
        ('dino', 'dino', 'neck', None, "`a.head`.*Found 'neck', a ChannelMapper"),
    ],
)
def test_what_cannot_be_paired_is_refused(student, teacher, head, teacher_head, message, model):
    with pytest.raises(ValueError, match=message):
        pair_heads(model(student), model(teacher), head, teacher_head, 'a')


@pytest.mark.parametrize(
    ('name', 'head'), [('faster', BOX), ('mask', MASK), ('cascade', f'{BOX}.1'), ('dino', None)]
)
def test_only_fit_takes_part_in_a_heads_loss(name, head, model):
    units = pair_heads(model(name), model(name), head, None, 'a')
    with pytest.raises(ValueError, match=r'`fuse_task_loss=True` needs.*Found \w+Head: leave'):
        units.fused_loss('fuse_task_loss=True')
    assert units.fused_loss('fit') is None


def test_what_is_no_detector():
    assert not has_units(tiny_det.build(tiny_det.atss(), 0).backbone)


@pytest.mark.parametrize(('name', 'other'), [('mmseg', 'mmdet'), ('mmdet', 'mmseg')])
def test_one_framework_is_enough(name, other):
    code = f"""
import sys
sys.modules[{other!r}] = None  # importing it fails
from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.units.joint_pairing import pair_networks
from mmdistill_ext.units.pairing import has_units, pair_heads
{'from tests import tiny_seg' if name == 'mmseg' else 'from tests import tiny_det'}
cfg = {'tiny_seg.model(8)' if name == 'mmseg' else 'tiny_det.atss()'}
model = build_model(dict(cfg, _scope_={name!r}))
pair = pair_heads(model, model, None, None, 'losses.a')
print(has_units(model), type(pair).__name__, has_units(model.backbone))
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pair = 'PixelPair' if name == 'mmseg' else 'DensePair'
    assert done.stdout.splitlines()[-1] == f'True {pair} False'
