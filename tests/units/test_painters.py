import pytest
import torch

from mmdistill_ext.units.base import Contrast
from mmdistill_ext.units.painters import BoxRegions, Level, Levels

SIZE, IMAGES = (12, 16), 2
BOXES = [
    (0, (1.4, 2.0, 9.6, 8.5)),
    (0, (5.0, 5.0, 16.0, 12.0)),
    (1, (-7.3, -2.0, 4.5, 3.5)),  # over the edges
    (1, (10.0, 6.0, 40.0, 30.0)),
    (1, (5.0, 5.0, 5.3, 9.0)),  # thinner than a pixel
    (0, (8.0, 8.0, 2.0, 2.0)),  # inside out
    (1, (30.0, 2.0, 35.0, 6.0)),  # outside
]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wins, valid = (torch.rand(shape, generator=generator) < p for p in (0.5, 0.8))
    return wins & valid, valid


def decide(votes):
    """Maps of wins and validity, from the won and the lost votes at each pixel."""
    won, known = torch.zeros(2, IMAGES, *SIZE, dtype=torch.bool)
    for place, found in votes.items():
        known[place] = len(found) > 0
        won[place] = 2 * sum(found) > len(found)
    return won, known


def pixels(box):
    """Rows and columns of the pixels in a box, rounded and cut at the edges."""
    left, right = (round(min(max(x, 0), SIZE[1])) for x in box[::2])
    top, bottom = (round(min(max(y, 0), SIZE[0])) for y in box[1::2])
    return range(top, bottom), range(left, right)


def vote(look_up):
    """Ask each box about each of its pixels; None is no vote."""
    votes = {}
    for number, (image, box) in enumerate(BOXES):
        rows, columns = pixels(box)
        for y in rows:
            for x in columns:
                place = (y - rows.start) / len(rows), (x - columns.start) / len(columns)
                found = look_up(number, *place)
                if found is not None:
                    votes.setdefault((image, y, x), []).append(found)
    return decide(votes)


def test_units_that_are_boxes_cover_them_and_most_decide():
    images = torch.tensor([image for image, _ in BOXES])
    units = torch.tensor([4, 0, 1, 5, 3, 2, 6])
    region = BoxRegions(SIZE, IMAGES, (images, units), torch.tensor([box for _, box in BOXES]))
    shares = set()
    for seed in range(8):
        wins, valid = draw(IMAGES, 7, seed=seed)

        def look_up(number, *_, wins=wins, valid=valid):
            place = images[number], units[number]
            return wins[place].item() if valid[place] else None

        maps = Contrast(wins, valid, region).maps()
        assert list(maps) == ['']
        won, known = vote(look_up)
        assert torch.equal(maps[''][0], won)
        assert torch.equal(maps[''][1], known)
        assert known.sum() < known.numel()
        shares.add((won.sum() / known.sum()).item())
    assert len(shares - {0, 1}) > 2


def test_maps_in_boxes_are_enlarged_to_them():
    wins, valid = draw(len(BOXES), 3, 4)
    images = torch.tensor([image for image, _ in BOXES])
    region = BoxRegions(SIZE, IMAGES, (images,), torch.tensor([box for _, box in BOXES]))

    def look_up(number, y, x):
        place = number, int(y * 3 + 1e-6), int(x * 4 + 1e-6)
        return wins[place].item() if valid[place] else None

    won, known = region(wins, valid)['']
    expected = vote(look_up)
    assert torch.equal(won, expected[0])
    assert torch.equal(known, expected[1])
    assert 0 < won.sum() < known.sum() < known.numel()


@pytest.mark.parametrize('known', [2, 3])
def test_a_tie_goes_to_the_student(known):
    """The teacher needs most of the votes."""
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).repeat(known, 1)
    index = torch.zeros(known, dtype=torch.long), torch.arange(known)
    wins = torch.arange(known)[None] < (known + 1) // 2
    won, _ = BoxRegions(SIZE, 1, index, boxes)(wins, torch.ones_like(wins))['']
    assert won.any() == (known == 3)


def test_no_boxes_give_empty_maps():
    none = torch.zeros(0, dtype=torch.long)
    region = BoxRegions(SIZE, IMAGES, (none, none), torch.zeros(0, 4))
    won, known = region(*draw(IMAGES, 5))['']
    assert won.shape == known.shape == (IMAGES, *SIZE)
    assert not won.any()
    assert not known.any()


def test_levels_have_a_map_each_in_which_the_priors_of_a_place_decide():
    levels = Levels([Level(2, 3, 3, 4), Level(1, 2, 1, 8)])
    wins, valid = draw(IMAGES, 2 * 3 * 3 + 2)
    maps = Contrast(wins, valid, levels).maps()
    assert list(maps) == ['_stride4', '_stride8']
    unit = 0
    for level, (won, known) in zip(levels, maps.values(), strict=True):
        size = (level.height * level.stride, level.width * level.stride)
        assert won.shape == known.shape == (IMAGES, *size)
        for place in range(level.height * level.width):
            votes = [(wins[:, i], valid[:, i]) for i in range(unit, unit + level.priors)]
            unit += level.priors
            own, count = (sum(x.int() for x in part) for part in zip(*votes, strict=True))
            y, x = (n * level.stride for n in divmod(place, level.width))
            area = (slice(None), slice(y, y + level.stride), slice(x, x + level.stride))
            shape = won[area].shape
            assert torch.equal(won[area], (2 * own > count)[:, None, None].expand(shape))
            assert torch.equal(known[area], (count > 0)[:, None, None].expand(shape))
    assert unit == wins.shape[1]
    assert any(0 < won.sum() < known.sum() for won, known in maps.values())


def test_pixels_are_a_map_already():
    wins, valid = draw(IMAGES, *SIZE)
    ((suffix, (won, known)),) = Contrast(wins, valid).maps().items()
    assert suffix == ''
    assert won is wins
    assert known is valid
