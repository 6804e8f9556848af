"""Every kind of detector that mmdet ships trains, or is refused at start by its key."""

import pytest

from tests.stock.detectors import STOCK
from tests.stock.outcomes import COLUMNS


@pytest.mark.parametrize('stock', STOCK, ids=lambda stock: stock.name)
def test_every_stock_detector_trains_or_is_refused_at_start(stock, tmp_path):
    for name, outcome in COLUMNS.items():
        refused = outcome(stock, tmp_path)  # raises on anything but a refusal by its key
        assert not (name == 'features' and refused), refused
