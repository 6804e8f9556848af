"""One validation, the metrics of several networks."""

import cv2
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS, DefaultScope
from mmengine.structures import BaseDataElement, PixelData
from mmseg.structures import SegDataSample

from mmdistill_ext.evaluation import NetworksEvaluator
from mmdistill_ext.registry import EVALUATOR
from mmdistill_ext.units.joint import with_networks
from tests import tiny_seg
from tests.two_ranks import in_two_ranks


@METRICS.register_module()
class MeanOfPredictions(BaseMetric):
    """A metric that knows the classes of its data set."""

    def __init__(self, factor: float = 1.0, **arguments: object) -> None:
        super().__init__(**arguments)
        self.factor = factor

    def process(self, data_batch, data_samples):
        self.results += [self.factor * sample['value'] for sample in data_samples]

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results), classes=len(self.dataset_meta['classes']))


@pytest.fixture
def evaluator():
    def build(metrics):
        with DefaultScope.overwrite_default_scope('mmseg'):
            cfg = dict(type='mmdistill_ext.NetworksEvaluator', metrics=metrics)
            made = EVALUATOR.build(cfg)
        made.dataset_meta = dict(classes=tiny_seg.CLASSES)
        return made

    return build


def samples(ensemble: list[float], **networks: list[float]) -> list[BaseDataElement]:
    def elements(values):
        return [BaseDataElement(value=value) for value in values]

    return with_networks(elements(ensemble), {name: elements(x) for name, x in networks.items()})


MEAN = dict(type='MeanOfPredictions')


def test_every_network_is_scored_by_its_own_predictions(evaluator):
    made = evaluator(MEAN)
    made.process(samples([5.0, 6.0], a=[1.0, 2.0], b=[3.0, 4.0]))
    made.process(samples([7.0], a=[0.0], b=[-4.0]))
    assert made.evaluate(3) == {
        'a/mean': 1.0,
        'b/mean': 1.0,
        'ensemble/mean': 6.0,
        **{f'{name}/classes': 3 for name in ('a', 'b', 'ensemble')},
    }


def test_the_next_validation_begins_anew(evaluator):
    made = evaluator([MEAN])
    for value in (1.0, 3.0):
        made.process(samples([value], a=[value], b=[-value]))
        found = made.evaluate(1)
        assert [found[f'{name}/mean'] for name in ('a', 'b', 'ensemble')] == [value, -value, value]


def test_several_metrics_keep_their_prefixes(evaluator):
    made = evaluator([{**MEAN, 'prefix': 'one'}, {**MEAN, 'prefix': 'two', 'factor': 10.0}])
    made.process(samples([1.0], a=[2.0], b=[3.0]))
    found = made.evaluate(1)
    assert len(found) == 12
    assert (found['a/one/mean'], found['a/two/mean']) == (2.0, 20.0)
    assert (found['ensemble/one/mean'], found['ensemble/two/mean']) == (1.0, 10.0)


def test_metrics_that_are_built_already_are_not_shared(evaluator):
    metric = MeanOfPredictions()
    made = evaluator([metric])
    made.process(samples([1.0], a=[2.0], b=[3.0]))
    found = made.evaluate(1)
    assert [found[f'{name}/mean'] for name in ('a', 'b', 'ensemble')] == [2.0, 3.0, 1.0]
    assert made.metrics[0] is not made.networks['a'].metrics[0]


def test_the_predictions_of_one_model_are_refused(evaluator):
    made = evaluator(MEAN)
    message = r"`NetworksEvaluator` needs.*type='mmdistill_ext\.CollaborativeDistiller'.*of one"
    with pytest.raises(ValueError, match=message):
        made.process([BaseDataElement(value=1.0)])


def test_files_of_the_networks_do_not_mix(evaluator, tmp_path):
    """Metrics of a benchmark's own format write predictions, and some read them again."""
    metric = dict(type='IoUMetric', output_dir=str(tmp_path / 'out'), iou_metrics=['mIoU'])
    made = evaluator(metric)
    classes = dict(a=0, b=1, ensemble=2)

    def sample(index):
        found = tiny_seg.sample(torch.full((4, 5), 1))
        found.set_metainfo(dict(img_path='x.png'))
        return SegDataSample(
            metainfo=found.metainfo,
            gt_sem_seg=found.gt_sem_seg,
            pred_sem_seg=PixelData(data=torch.full((1, 4, 5), index)),
        )

    networks = {name: [sample(classes[name])] for name in ('a', 'b')}
    with DefaultScope.overwrite_default_scope('mmseg'):  # as in a run
        made.process(with_networks([sample(2)], networks))
    found = made.evaluate(1)
    assert found['b/aAcc'] == 100
    assert found['a/aAcc'] == found['ensemble/aAcc'] == 0
    for name, index in classes.items():
        image = cv2.imread(str(tmp_path / 'out' / name / 'x.png'), cv2.IMREAD_UNCHANGED)
        assert (image == index).all()


@pytest.mark.parametrize(
    ('key', 'path', 'expected'),
    [
        ('output_dir', 'out/masks/', 'out/masks/a'),
        ('outfile_prefix', 'out/coco', 'out/a/coco'),
        ('out_file_path', 'found.pkl', 'a/found.pkl'),
    ],
)
def test_every_kind_of_path_names_the_network(key, path, expected):
    from mmdistill_ext.evaluation import _of_network

    metric = {'type': 'X', key: path}
    assert _of_network([metric], 'a') == [{'type': 'X', key: expected}]
    assert metric[key] == path


def test_nothing_is_evaluated_without_metrics(evaluator):
    made = evaluator([])
    made.process(samples([1.0], a=[1.0], b=[2.0]))
    assert made.evaluate(1) == {}


def test_it_is_an_evaluator_of_the_framework(evaluator):
    assert isinstance(evaluator(MEAN), NetworksEvaluator)


def worker(rank):
    made = NetworksEvaluator(MEAN)
    made.dataset_meta = dict(classes=tiny_seg.CLASSES)
    if rank == 1:
        made.process(samples([5.0, 7.0], a=[1.0, 2.0], b=[3.0, 5.0]))
    return made.evaluate(2)


def test_a_process_without_images_does_not_keep_the_others_waiting():
    for found in in_two_ranks(worker):
        assert {key: found[key] for key in ('a/mean', 'b/mean', 'ensemble/mean')} == {
            'a/mean': 1.5,
            'b/mean': 4.0,
            'ensemble/mean': 6.0,
        }
