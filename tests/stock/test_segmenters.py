"""Every head that mmseg ships: distilled, with FIT where its loss allows it, and together."""

import pytest

from tests.stock import segmenters
from tests.stock.segmenters import CONFIGS

# The loss of these heads is not one cross-entropy of their logits.
WITHOUT_FIT = ('bisenet',)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config(name):
    row = segmenters.row(name)
    assert row['units'] == ('points' if name.startswith('point_rend') else 'pixels')
    assert row['features'] == row['col'] == 'yes'
    print(row)
