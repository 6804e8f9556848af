"""Every kind of detector that mmdet ships trains, or is refused at start by its key."""

import pytest

from tests.stock.coverage import published
from tests.stock.detectors import STOCK
from tests.stock.outcomes import check

PUBLISHED = published('detectors')


@pytest.mark.parametrize('stock', STOCK, ids=lambda stock: stock.name)
def test_every_stock_detector_does_what_the_page_says(stock):
    """Whatever is no refusal by a config key is raised."""
    check(stock, PUBLISHED[stock.config])


def test_the_page_has_every_stock_detector():
    assert list(PUBLISHED) == [stock.config for stock in STOCK]
