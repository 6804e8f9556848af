import pytest
import torch
from mmengine.structures import PixelData

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.tapped_forward import tapped_forward
from mmdistill_ext.isolation import training_flags
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.features.location_weights import LocationWeights, touched_cells
from tests import tiny_dense, tiny_det, tiny_seg, tiny_zoo

SIZE = (64, 96)


@pytest.fixture(scope='module')
def segmenter():
    return build_model({'_scope_': 'mmseg', **tiny_seg.model(8)}).eval()


@pytest.fixture(scope='module')
def detector():
    return tiny_det.build(tiny_det.retina(), 0).eval()


def plain_cells(boxes, grid, size):
    """Cell by cell: does a box have a common area with it?"""
    height, width = size[0] / grid[0], size[1] / grid[1]
    out = torch.zeros(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            for x1, y1, x2, y2 in boxes.tolist():
                wide = min(x2, (column + 1) * width) - max(x1, column * width)
                high = min(y2, (row + 1) * height) - max(y1, row * height)
                out[row, column] = max(out[row, column], float(wide > 0 and high > 0))
    return out


def test_cells_are_those_that_a_box_touches():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(6, 4, generator=generator) * 60
    boxes = torch.cat((corners[:, :2], corners[:, :2] + corners[:, 2:] / 2), 1)
    for grid in ((8, 12), (5, 7), (1, 1)):
        expected = plain_cells(boxes, grid, SIZE)
        assert torch.equal(touched_cells(boxes, grid, SIZE), expected)
    assert not touched_cells(boxes[:0], (8, 12), SIZE).any()


def test_thin_box_touches_its_cells():
    box = torch.tensor([[9.0, 17.0, 9.5, 17.5]])
    assert touched_cells(box, (8, 12), SIZE).nonzero().tolist() == [[2, 1]]


def test_labels_of_a_detector_are_its_boxes_without_padding(detector):
    _, samples = tiny_det.batch(detector)
    weights = LocationWeights('labels', detector, detector, 'k')
    found = weights(torch.zeros(3, 5, 8, 12), samples, SIZE, {})
    boxes = [sample.gt_instances.bboxes for sample in samples]
    expected = torch.stack([plain_cells(x, (8, 12), SIZE) for x in boxes])
    for image, (height, width) in enumerate(tiny_det.SIZES):
        expected[image, -(-height // 8) :] = 0
        expected[image, :, -(-width // 8) :] = 0
    assert torch.equal(found[:, 0], expected)
    assert not found[1].any()
    assert found[0].any()


def test_padding_does_not_count_where_nothing_else_weighs(detector):
    _, samples = tiny_det.batch(detector)
    found = LocationWeights(None, detector, detector, 'k')(
        torch.zeros(3, 5, 8, 12), samples, SIZE, {}
    )
    assert found[2, 0].sum() == 5 * 7  # of 40 x 56 pixels
    assert found[0, 0].sum() == 8 * 12


def test_without_padding_all_count_alike(segmenter):
    samples = tiny_seg.samples(torch.zeros(2, 32, 40, dtype=torch.long))
    weights = LocationWeights(None, segmenter, segmenter, 'k')
    assert weights(torch.zeros(2, 5, 4, 5), samples, (32, 40), {}) is None


def test_labels_of_a_segmenter_are_pixels_that_are_not_ignored(segmenter):
    labels = torch.zeros(1, 32, 40, dtype=torch.long)
    labels[0, :8] = 255
    labels[0, 8:16, :4] = 255
    samples = [tiny_seg.sample(labels[0])]
    samples[0].gt_sem_seg = PixelData(data=labels)
    weights = LocationWeights('labels', segmenter, segmenter, 'k')
    found = weights(torch.zeros(1, 5, 4, 5), samples, (32, 40), {})
    assert found[0, 0, :, 0].tolist() == [0, 0.5, 1, 1]
    assert found[0, 0, :, 1].tolist() == [0, 1, 1, 1]


def calls(model, path, *batch):
    with torch.no_grad(), Taps(model, {path: path}) as taps:
        model(*batch, mode='tensor')
    return {path: taps.all(path)}


def test_scores_of_a_segmenter_are_its_largest_probability(segmenter):
    inputs = torch.randn(2, 3, 32, 40)
    samples = tiny_seg.samples(torch.zeros(2, 32, 40, dtype=torch.long))
    weights = LocationWeights('teacher_score', segmenter, segmenter, 'k')
    assert weights.teacher_calls == {'decode_head': 1}
    recorded = calls(segmenter, 'decode_head', inputs, samples)
    found = weights(torch.zeros(2, 5, 4, 5), samples, (32, 40), recorded)
    with torch.no_grad():
        expected = segmenter(inputs, mode='tensor').softmax(1).amax(1, keepdim=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('softmax', [False, True])
def test_scores_of_a_detector_are_those_of_the_nearest_level(softmax):
    detector = tiny_det.build(tiny_det.retina(softmax=softmax), 0).eval()
    inputs, samples = tiny_det.batch(detector)
    for sample in samples:
        sample.set_metainfo(dict(img_shape=SIZE))
    weights = LocationWeights('teacher_score', detector, detector, 'k')
    recorded = calls(detector, 'bbox_head', inputs, samples)
    level = recorded['bbox_head'][0].output[0][1]  # stride 16
    scores = level.unflatten(1, (3, -1))
    scores = scores.softmax(2)[:, :, :3] if softmax else scores.sigmoid()
    found = weights(torch.zeros(3, 5, 4, 6), samples, SIZE, recorded)
    torch.testing.assert_close(found, scores.amax((1, 2)).unsqueeze(1))


@pytest.mark.parametrize('name', ['tood', 'autoassign', 'sabl', 'guided', 'reppoints'])
def test_scores_of_a_detector_are_those_that_it_predicts_with(name):
    """TOOD gives no logits, AutoAssign's classes count with the objectness."""
    detector = tiny_det.build(tiny_dense.FAMILIES[name](), 0).eval()
    inputs, samples = tiny_det.batch(detector)
    for sample in samples:
        sample.set_metainfo(dict(img_shape=SIZE))
    weights = LocationWeights('teacher_score', detector, detector, 'k')
    trains = name == 'reppoints'
    assert weights.teacher_training == (('bbox_head',) if trains else ())
    with training_flags([detector.bbox_head] if trains else []):
        recorded = tapped_forward(detector, inputs, samples, {'bbox_head': 1})
    output = recorded['bbox_head'][0].output
    scores = output[0][1]  # stride 16
    scores = scores if name == 'tood' else scores.sigmoid()
    if name == 'autoassign':
        scores = scores * output[2][1].sigmoid()
    found = weights(torch.zeros(3, 5, 4, 6), samples, SIZE, recorded)
    torch.testing.assert_close(found, scores.amax(1, keepdim=True), rtol=1e-4, atol=1e-6)


def test_scores_of_a_two_stage_detector_are_its_rpns():
    model = build_model({'_scope_': 'mmdet', **tiny_zoo.config('faster')})
    assert LocationWeights('teacher_score', model, model, 'k').teacher_calls == {'rpn_head': 1}


@pytest.mark.parametrize(
    ('by', 'message'),
    [
        ('boxes', "`losses.a.weight_by`.*labels, teacher_score.*'boxes'"),
        ('teacher_score', "`losses.a.weight_by`='teacher_score' needs a teacher.*Sequential"),
        ('labels', "`losses.a.weight_by`='labels' needs a student.*Sequential"),
    ],
)
def test_what_cannot_be_had_is_refused(by, message):
    model = torch.nn.Sequential()
    with pytest.raises(ValueError, match=message):
        LocationWeights(by, model, model, 'losses.a.weight_by')
