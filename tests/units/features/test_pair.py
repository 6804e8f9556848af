import pytest
import torch
from torch import nn

from mmdistill_ext.tap_paths import Tap
from mmdistill_ext.taps import Call, Taps
from mmdistill_ext.units.features.location_weights import LocationWeights
from mmdistill_ext.units.features.pair import FeaturePair, read, resize
from mmdistill_ext.units.features.probe import Probe

CONV = dict(type='Conv1x1')


class Levels(nn.Module):
    """Gives maps of some channels at some strides."""

    def __init__(self, *levels):
        super().__init__()
        self.levels = levels

    def forward(self, x):
        size = x.shape[2:]
        return tuple(
            torch.randn(len(x), c, *(-(-side // stride) for side in size))
            for c, stride in self.levels
        )


def pair(connector=None, grid='student', any_channels=False, patches=lambda size: None):
    weights = LocationWeights(None, None, None, 'losses.a.weight_by')
    taps = Tap('forward'), Tap('forward')
    return FeaturePair(*taps, connector, grid, weights, patches, any_channels, 'losses.a')


def probe(*levels, size=(64, 96)):
    return Probe(size, dict(forward=[Call((), {}, Levels(*levels)(torch.zeros(1, 3, *size)))]))


def matched(mine, theirs, **kwargs):
    made = pair(**kwargs)
    made.match(probe(*mine), probe(*theirs))
    return made


def step(made, mine, theirs, size=(64, 96), batch=2, connectors=None):
    model, x = Levels(*mine), torch.zeros(batch, 3, *size)
    with Taps(model, dict(forward='forward')) as taps:
        model(x)
    teacher = dict(forward=[Call((), {}, Levels(*theirs)(x))])
    return made(taps, teacher, [], size, connectors), taps, teacher


@pytest.mark.parametrize('grid', ['student', 'teacher'])
def test_features_meet_on_one_grid(grid):
    mine, theirs = [(4, 8)], [(6, 16)]
    made = matched(mine, theirs, connector=CONV, grid=grid)
    (found,), taps, teacher = step(made, mine, theirs, connectors=made.connectors)
    size = (8, 12) if grid == 'student' else (4, 6)
    assert found.student.shape == found.teacher.shape == (2, 6, *size)
    own = made.connectors[0](taps['forward'].output[0])
    torch.testing.assert_close(found.student, resize(own, size))
    torch.testing.assert_close(found.teacher, resize(teacher['forward'][0].output[0], size))


def test_every_level_has_its_own_connector():
    levels = [(4, 8), (8, 16), (16, 32)]
    made = matched(levels, [(6, 8), (6, 16), (6, 32)], connector=[CONV, dict(type='Norm')])
    assert [part[0].in_channels for part in made.connectors] == [4, 8, 16]
    assert made.teacher_calls == dict(forward=1)
    found, *_ = step(made, levels, [(6, 8), (6, 16), (6, 32)], connectors=made.connectors)
    assert [x.student.shape[1] for x in found] == [6, 6, 6]


def test_without_a_connector_nothing_is_to_be_trained():
    made = matched([(4, 8)], [(4, 8)])
    assert made.connectors is None


def test_what_is_matched_is_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(
        'mmdistill_ext.units.features.pair.print_log', lambda text, **_: lines.append(text)
    )
    matched([(4, 8)], [(6, 16)], connector=CONV)
    assert lines == [
        "losses.a: student 'output' [0] (4 channels at stride 8x8) through Conv1x1 is matched to "
        "teacher 'output' [0] (6 channels at stride 16x16), on the student's grid."
    ]


@pytest.mark.parametrize(
    ('mine', 'theirs', 'kwargs', 'message'),
    [
        ([(4, 8)], [(6, 8)], {}, '`losses.a`.*connector such as.*Conv1x1.*Found 4 at .*, 6 at'),
        ([(4, 8)], [(4, 8), (4, 16)], {}, '`losses.a`.*as many levels. Found 1 .*2 '),
        ([(4, 8)], [(6, 8)], dict(connector=dict(type='Norm')), '`losses.a.connector`.*6'),
    ],
)
def test_what_does_not_fit_is_refused_at_start(mine, theirs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        matched(mine, theirs, **kwargs)


def test_unknown_grid_is_refused():
    with pytest.raises(ValueError, match="`losses.a.grid`.*student, teacher.*'both'"):
        pair(grid='both')


def test_losses_that_take_any_channels_need_no_connector():
    assert matched([(4, 8)], [(6, 8)], any_channels=True).connectors is None


def test_rois_are_refused():
    rois = Probe((64, 96), dict(forward=[Call((), {}, torch.zeros(50, 4, 7, 7))]))
    with pytest.raises(ValueError, match=r'`losses.a.tap`.*each image.*\(50, 4, 7, 7\)'):
        pair().match(rois, probe((4, 8)))


def test_tap_that_is_not_called_is_refused():
    with pytest.raises(ValueError, match="`losses.a.tap` should be called.*'forward'"):
        pair().match(Probe((64, 96), dict(forward=[])), probe((4, 8)))


def test_several_calls_are_levels():
    calls = [Call((), {}, torch.zeros(2, 4, 8, 8)), Call((), {}, torch.zeros(2, 4, 4, 4))]
    assert [x.shape[2] for x in read(Tap('x'), calls, None)] == [8, 4]


def test_tokens_become_a_map_without_what_stands_before_them():
    tokens = torch.randn(2, 1 + 2 * 3, 5)
    (found,) = read(Tap('x'), [Call((), {}, tokens)], (2, 3))
    assert found.shape == (2, 5, 2, 3)
    assert torch.equal(found[:, :, 1, 2], tokens[:, 6])
    assert torch.equal(found[:, :, 0, 0], tokens[:, 1])


def test_tokens_without_a_grid_and_vectors_stay_in_a_row():
    assert read(Tap('x'), [Call((), {}, torch.zeros(2, 7, 5))], None)[0].shape == (2, 5, 7, 1)
    assert read(Tap('x'), [Call((), {}, torch.zeros(2, 5))], None)[0].shape == (2, 5, 1, 1)


@pytest.mark.parametrize('value', [dict(a=torch.zeros(1)), None, [torch.zeros(1), 3]])
def test_something_else_than_tensors_is_refused(value):
    with pytest.raises(ValueError, match=r"Tap 'x' should lead to a tensor.*add an index"):
        read(Tap('x'), [Call((), {}, value)], None)


def test_resizing_averages_down_and_interpolates_up():
    features = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(resize(features, (2, 2))[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert resize(features, (8, 6)).shape == (1, 1, 8, 6)
    assert resize(features, (4, 4)) is features
