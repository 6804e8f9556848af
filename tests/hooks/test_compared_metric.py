import pytest

from mmdistill_ext.hooks.compared_metric import ComparedMetric

NETWORKS = ('a', 'b', 'ensemble')


def compared(**named):
    return ComparedMetric({f'x.{key}': name for key, name in named.items()}, NETWORKS)


def of_all(*metrics):
    return {f'{name}/{metric}': 1.0 for name in NETWORKS for metric in metrics}


@pytest.mark.parametrize(
    ('metrics', 'expected'),
    [
        (('aAcc', 'mIoU'), 'mIoU'),
        (('coco/bbox_mAP_50', 'coco/bbox_mAP'), 'coco/bbox_mAP'),
        (('pascal_voc/mAP', 'pascal_voc/AP50'), 'pascal_voc/mAP'),
        (('mDice', 'mAcc'), 'mAcc'),
        ((), 'none'),
    ],
)
def test_the_usual_metric_is_found(metrics, expected):
    assert compared().choose(of_all(*metrics)) == expected
    assert compared().choose({**of_all(*metrics), 'other/AAA': 1.0}) == expected


def test_a_named_metric_goes_first():
    assert compared(first='aAcc', second='mIoU').choose(of_all('mIoU', 'aAcc')) == 'aAcc'
    assert compared(first='aAcc').choose({}) == 'aAcc'


def test_every_named_metric_has_to_be_there():
    with pytest.raises(ValueError, match=r"`x\.second` should be.*'mDice', there are \['mIoU'\]"):
        compared(first='mIoU', second='mDice').choose(of_all('mIoU'))
    with pytest.raises(ValueError, match=r"'mIoU', there are none \(see NetworksEvaluator\)"):
        compared(first='mIoU').choose({'mIoU': 1.0})


@pytest.mark.parametrize(
    ('name', 'prefixes', 'possible'),
    [
        ('mIoU', [None], True),
        ('a/mIoU', [None], False),
        ('part/mIoU', [None], True),
        ('mIoU', ['seg'], False),
        ('seg/mIoU', ['seg', 'det'], True),
        ('seg/mIoU', ['seg/val'], False),
        ('a/mIoU', [], True),
    ],
)
def test_a_name_has_the_prefix_of_a_metric(name, prefixes, possible):
    metric = compared(metric=name)
    if possible:
        return metric.check_prefixes(prefixes)
    with pytest.raises(ValueError, match=rf"`x\.metric`.*without a network's\. Found '{name}'"):
        metric.check_prefixes(prefixes)
