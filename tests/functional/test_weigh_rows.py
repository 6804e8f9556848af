import math

import pytest
import torch

from mmdistill_ext.functional.fit import weigh_rows

SHAPES = [((7,), (7,)), ((7, 4), (7,)), ((7, 4), (7, 4)), ((3, 5, 6), (3,)), ((0, 4), (0,))]


def make(shape, simple_shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(shape, generator=generator, dtype=dtype).requires_grad_()
    return rows, torch.rand(simple_shape, generator=generator) < 0.5


def expand(simple, rows):
    return simple.reshape(*simple.shape, *[1] * (rows.ndim - simple.ndim)).expand(rows.shape)


@pytest.mark.parametrize('weight', [0, 0.3, 1, 2.5])
@pytest.mark.parametrize(('shape', 'simple_shape'), SHAPES)
def test_sum_of_simple_rows_and_weighed_hard_ones(shape, simple_shape, weight):
    rows, simple = make(shape, simple_shape)
    chosen = expand(simple, rows)
    soft, hard = 3 * rows[chosen].sum(), 3 * rows[~chosen].sum()
    total, parts = weigh_rows(rows, simple, weight, 3)
    torch.testing.assert_close(total, soft + weight * hard)
    torch.testing.assert_close(parts, torch.stack((soft, hard)).detach())
    assert not parts.requires_grad
    (gradient,) = torch.autograd.grad(total, rows)
    torch.testing.assert_close(gradient, torch.where(chosen, 3.0, 3.0 * weight).to(rows.dtype))


@pytest.mark.parametrize('weight', [1, 1.0])
def test_a_weight_of_1_is_the_plain_sum_to_the_bit(weight):
    rows, simple = make((1000, 4), (1000,), torch.float32)
    scale = torch.tensor(0.3)
    total, _ = weigh_rows(rows, simple, weight, scale)
    assert torch.equal(total, scale * rows.sum())


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_hard_rows_of_weight_0_may_hold_anything(bad):
    rows, simple = make((7, 4), (7,))
    expected, _ = weigh_rows(rows, simple, 0)
    spoilt = rows.detach().masked_fill(~simple[:, None], bad).requires_grad_()
    found, parts = weigh_rows(spoilt, simple, 0)
    found.backward()
    assert torch.equal(found, expected)
    assert (spoilt.grad == simple[:, None].double()).all()
    assert parts[0] == expected
    assert not parts[1].isfinite()


def test_hard_rows_that_count_stay_visible():
    rows, simple = make((7,), (7,))
    spoilt = rows.detach().masked_fill(~simple, math.nan)
    assert weigh_rows(spoilt, simple, 0.5)[0].isnan()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(dtype):
    rows, simple = make((7, 4), (7,))
    found, _ = weigh_rows(rows.detach().to(dtype), simple, 0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), weigh_rows(rows, simple, 0.3)[0].detach(), rtol=0.02, atol=0
    )
