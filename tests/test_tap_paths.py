import pytest
import torch
from torch import nn

from mmdistill_ext.tap_paths import Tap, find_tap
from mmdistill_ext.taps import Call, Taps


class Neck(nn.Module):
    def forward(self, inputs):
        return tuple(x * 2 for x in inputs)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
        self.neck = Neck()
        self.number = 3

    def encode(self, *, image):
        return dict(memory=self.backbone(image))

    def forward(self, image):
        features = self.encode(image=image)['memory']
        return dict(levels=self.neck((features, features + 1)), size=image.shape)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize(
    ('path', 'tap'),
    [
        ('neck', Tap('neck')),
        ('neck.1', Tap('neck', 'output', (1,))),
        ('neck.-1', Tap('neck', 'output', (-1,))),
        ('neck.output.0', Tap('neck', 'output', (0,))),
        ('neck.input.1', Tap('neck', 'input', (1,))),
        ('backbone.0', Tap('backbone.0')),  # a submodule comes before an index
        ('backbone.0.input', Tap('backbone.0', 'input')),
        ('encode.output.memory', Tap('encode', 'output', ('memory',))),
        ('encode.input.image', Tap('encode', 'input', ('image',))),
        ('output.levels.0', Tap('forward', 'output', ('levels', 0))),
        ('input', Tap('forward', 'input')),
    ],
)
def test_path_is_read_and_gives_what_it_says(model, path, tap):
    found = find_tap(model, path, 'tap')
    assert found == tap
    image = torch.randn(1, 3, 2, 2)
    with Taps(model, {tap.call: tap.call}) as taps:
        model(image)
    features = model.backbone(image)
    expected = {
        'neck': (2 * features, 2 * features + 2),
        'neck.1': 2 * features + 2,
        'neck.-1': 2 * features + 2,
        'neck.output.0': 2 * features,
        'neck.input.1': features + 1,
        'backbone.0.input': image,
        'encode.output.memory': features,
        'encode.input.image': image,
        'output.levels.0': 2 * features,
        'input': image,
    }
    if path in expected:
        torch.testing.assert_close(found.read(taps[tap.call]), expected[path])


def test_an_argument_has_its_name_however_it_was_given(model):
    features = torch.randn(1, 4, 2, 2)
    with Taps(model, dict(neck='neck')) as taps:
        model.neck([features])
        model.neck(inputs=[features])
    for call in taps.all('neck'):
        assert Tap('neck', 'input', ('inputs', 0)).read(call) is features


@pytest.mark.parametrize('path', ['neck.0', 'neck.input.1', 'output.levels.0', 'input'])
def test_it_is_written_as_it_is_read(model, path):
    assert str(find_tap(model, path, 'tap')) == path


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('', "`losses.a.tap` should be a dotted path such as 'neck.0'. Found ''"),
        (None, '`losses.a.tap` should be a dotted path.*Found None'),
        ('nekc.0', "`losses.a.tap`.*Found 'nekc.0': Model has no 'nekc', only: backbone, neck"),
        ('0', "`losses.a.tap`.*Model has no '0'"),
        ('neck.first', "`losses.a.tap`.*Model.neck has no 'first'"),
        ('number', '`losses.a.tap` should lead to a module or method.*int'),
    ],
)
def test_unknown_path_names_the_key_and_what_there_is(model, path, message):
    with pytest.raises(ValueError, match=message):
        find_tap(model, path, 'losses.a.tap')


@pytest.mark.parametrize(
    ('tap', 'message'),
    [
        (Tap('x', 'output', (2,)), "Tap 'x.2'.*Found no 2 in a tuple of 2"),
        (Tap('x', 'output', ('memory',)), "Tap 'x.memory'.*Found no 'memory'"),
        (Tap('x', 'output', (0, 5)), "Tap 'x.0.5'.*Found no 5 in a Tensor"),
        (Tap('x', 'input', ('image',)), "Tap 'x.input.image'.*Found no 'image' in a NoneType"),
    ],
)
def test_missing_part_is_named(tap, message):
    with pytest.raises(ValueError, match=message):
        tap.read(Call((), {}, (torch.zeros(2), torch.zeros(3))))


def test_what_is_changed_in_place_later_is_refused(model):
    with Taps(model, dict(conv='backbone.0', relu='backbone.1')) as taps:
        model(torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match="Tap 'backbone.0'.*in place"):
        Tap('backbone.0').read(taps['conv'])
    assert (Tap('backbone.1').read(taps['relu']) >= 0).all()
