import math

import pytest

from mmdistill_ext.distillers import CollaborativeDistiller
from tests import tiny_det
from tests.tiny_networks import (
    MIN_LOSS,
    detectors,
    segmenter,
    segmenters,
)


def sigmoid_segmenter():
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    return segmenter(loss_decode=loss)


def change(cfg, **head):
    cfg['decode_head' if 'decode_head' in cfg else 'bbox_head'].update(head)
    return cfg


@pytest.mark.parametrize(
    ('students', 'message'),
    [
        (dict(a=segmenter()), '`students` should be a dict of two networks or more.*Found'),
        ({}, '`students` should be a dict of two networks or more.*Found .none'),
        ([segmenter(), segmenter()], '`students` should be a dict. Found'),
        *(
            ({name: segmenter(), 'b': segmenter()}, f'names that are identifiers.*Found {name!r}')
            for name in ('ensemble', 'a.b', 'keys', 'my_loss', '', '1a', 'a/b', 'forward', 3)
        ),
        (
            dict(a=segmenter(), b=change(segmenter(), num_classes=4)),
            "same `num_classes`. Found 3 in 'a', 4 in 'b'",
        ),
        (
            dict(a=segmenter(), b=change(segmenter(), ignore_index=254)),
            "same `ignore_index`. Found 255 in 'a', 254 in 'b'",
        ),
        (
            dict(a=segmenter(), b=sigmoid_segmenter()),
            "same `use_sigmoid`. Found False in 'a', True in 'b'",
        ),
        (dict(a=segmenter(), b=tiny_det.atss()), 'all be segmentors.*of one kind: single-stage'),
        (
            dict(a=tiny_det.atss(), b=tiny_det.faster_rcnn()),
            r'of one kind: .*b.*FasterRCNN',
        ),
        (
            dict(a=tiny_det.retina(), b=tiny_det.atss()),
            r'as many priors .*.students.*in .a. .*in .b. ',
        ),
        (
            dict(a=tiny_det.atss(), b=change(tiny_det.gfl(), num_classes=4)),
            '`num_classes`.*.students.*3 in .a. .*4 in .b. ',
        ),
        (
            dict(a=tiny_det.retina(), b=tiny_det.retina(softmax=True)),
            'both sigmoid or both softmax.*.students.*in .a. .*in .b. ',
        ),
        (dict(a=segmenter(), b=dict(type='Nothing')), r'`students.b.type`.*Nothing'),
        (dict(a=segmenter(), b=dict()), r'`students.b` should have a `type`'),
    ],
    ids=str,
)
def test_networks_that_cannot_learn_together(students, message):
    with pytest.raises(ValueError, match=message):
        CollaborativeDistiller(students, MIN_LOSS)


@pytest.mark.parametrize('name', ['training', '_modules', 'T_destination', 'call_super_init'])
def test_names_that_belong_to_pytorch(name):
    with pytest.raises(ValueError, match='`students` should have names'):
        CollaborativeDistiller({name: segmenter(), 'b': segmenter()}, MIN_LOSS)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(second=dict(type='Nothing')),
            "`second.type` should be a registered second prediction: .*Found 'Nothing'",
        ),
        (dict(second=dict(per='unit')), '`second`.*type'),
        (dict(second='MinLoss'), '`second`'),
        (dict(second=None), '`second`'),
        (
            dict(second=dict(type='MinLoss', pre='unit')),
            '`second.pre` should be an argument of MinLoss: per. Found .*is it `per`',
        ),
        (dict(second=dict(type='MinLoss', per='pixel')), "`second.per`.*'pixel'"),
        (dict(second=dict(type='ValidationWeighted')), '`second.metric` should be given'),
        (
            dict(kl=dict(wieght=1.0)),
            '`kl.wieght` should be an argument of Schedule: .*is it `weight`',
        ),
        (dict(kl=dict(key='a')), '`kl.key` should be an argument'),
        (dict(kl=dict(weight=-1.0)), '`kl.weight` should be a finite number >= 0.*=-1.0'),
        (dict(kl=dict(begin=3, stop=3)), '`kl.stop` should come after'),
        (dict(kl=dict(temperature=0.0)), '`kl.temperature` should be a finite number > 0'),
        (dict(kl=dict(temperature='2')), '`kl.temperature` should be a finite number > 0'),
        (
            dict(second_weight=-0.5),
            '`second_weight` should be a finite number >= 0, .*Found .*-0.5',
        ),
        (
            dict(second_weight=math.nan),
            '`second_weight` should be a finite number >= 0, .*Found .*nan',
        ),
    ],
    ids=str,
)
def test_values_that_are_impossible(options, message):
    with pytest.raises(ValueError, match=message):
        CollaborativeDistiller(segmenters(), **{'second': MIN_LOSS, **options})


def test_a_shift_is_refused_for_detectors():
    with pytest.raises(ValueError, match='`second.shift` should be False for sigmoid heads'):
        CollaborativeDistiller(detectors('atss gfl'), dict(type='MinLogit'))
