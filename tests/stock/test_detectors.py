"""Every kind of detector that mmdet ships trains, or is refused at start by its key."""

import pytest

from tests.stock.coverage import published
from tests.stock.detectors import STOCK
from tests.stock.outcomes import row

PUBLISHED = published('detectors')


@pytest.mark.parametrize('stock', STOCK, ids=lambda stock: stock.name)
def test_every_stock_detector_does_what_the_page_says(stock):
    """Whatever is no refusal by a config key is raised."""
    outcome = row(stock)
    assert outcome['features'] == 'yes'
    said = PUBLISHED[stock.config]
    assert {name: said[name] for name in outcome} == outcome
