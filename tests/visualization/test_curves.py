import warnings

import cv2
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from mmdistill_ext.visualization.curves import COLORS, draw_losses, plot_fit, plot_networks

ROW = dict(train_gt_loss=0.9, val_gt_loss=1.1, error=-0.2, weight=0.63, simple_share=0.8)
HISTORY = [
    dict(ROW, iter=20 * i, train_gt_loss=1 / i, train_gt_loss_eval=0.8 / i) for i in range(1, 30)
]
FIRST = dict(iter=20, val_gt_loss=1.0, weight=1.0)  # before any training step with the fit loss


def shows(image, color):
    wanted = [int(COLORS[color][i : i + 2], 16) for i in (1, 3, 5)]
    return (image == wanted).all(2).any()


@pytest.mark.parametrize(
    ('history', 'colors'),
    [
        (HISTORY, ['train', 'val', 'weight']),
        ([dict(ROW, iter=20)], ['train', 'val', 'weight']),
        ([FIRST], ['val', 'weight']),
        ([FIRST, dict(iter=40, train_gt_loss=1.0, simple_share=0.5)], ['train', 'val', 'weight']),
    ],
    ids=['all', 'one', 'first', 'parts'],
)
def test_a_whole_picture_is_written_and_returned(history, colors, tmp_path):
    path = tmp_path / 'vis_data' / 'fit.png'
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        image = plot_fit(history, path)
    assert [file.name for file in path.parent.iterdir()] == ['fit.png']
    written = cv2.imread(str(path))
    assert image.dtype == np.uint8
    assert written.shape == image.shape
    assert np.array_equal(written[..., ::-1], image)
    assert [color for color in ('train', 'val', 'weight') if shows(image, color)] == colors
    assert pyplot.get_fignums() == []


def test_the_losses_are_drawn_over_the_iterations():
    axes = Figure().subplots()
    draw_losses(axes, [FIRST, dict(ROW, iter=40)])
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        'training, as trained': [[40, 0.9]],
        'validation, eval mode': [[20, 1.0], [40, 1.1]],
    }
    draw_losses(axes, HISTORY)
    assert len(axes.lines) == 5


def test_an_older_picture_stays_when_drawing_fails(tmp_path, monkeypatch):
    path = tmp_path / 'fit.png'
    plot_fit([FIRST, dict(ROW, iter=40)], path)
    before = path.read_bytes()

    def fail(figure, file, **kwargs):
        file.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(Figure, 'savefig', fail)
    with pytest.raises(OSError, match='disk full'):
        plot_fit(HISTORY, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_networks_and_their_ensemble_are_drawn(tmp_path):
    scores = [dict(a=0.1, b=None, ensemble=0.2), dict(a=0.3, b=0.2, ensemble=0.4)]
    history = {
        at: dict(metric='mIoU', scores=found, weights=dict(a=0.25, b=0.75))
        for at, found in zip((100, 200), scores, strict=True)
    }
    image = plot_networks(history, tmp_path / 'networks.png')
    assert np.array_equal(cv2.imread(str(tmp_path / 'networks.png'))[..., ::-1], image)
    for color in ((31, 119, 180), (255, 127, 14), (68, 68, 68)):
        assert (image == color).all(2).any()
    fewer = plot_networks({200: history[200]}, tmp_path / 'one.png')
    assert not np.array_equal(fewer, image)
