"""Formats and scales against torch's own casts and against tables: every rounding here is exact or it is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leanseek.checkpoint import blocks as stored
from leanseek.ops.formats import E4M3, E5M6, Counts, counts, encode, quantize, spread, tile_scale

BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # every value of it
ONE = torch.ones(())


def test_every_bf16_value_is_rounded_as_torch_rounds_it() -> None:
    finite, dtype = BF16[BF16.isfinite()], torch.float8_e4m3fn
    expected = finite.float().clamp(-E4M3.largest, E4M3.largest).to(dtype)
    assert torch.equal(encode(finite, ONE, E4M3).to(dtype).view(torch.uint8), expected.view(torch.uint8))  # -0 too


def test_e5m6_takes_the_nearest_value_of_its_table_ties_to_even() -> None:
    table = torch.tensor(
        [m * 2.0**-20 for m in range(64)] + [(64 + m) * 2.0 ** (e - 6) for e in range(-14, 16) for m in range(64)]
    )
    x = torch.cat((torch.rand(4000).double() * 70000, torch.rand(4000).double() * 1e-4)).float()
    x = torch.cat((x, table, (table[1:] + table[:-1]) / 2))  # ties are exact in float32
    above = torch.searchsorted(table, x.clamp(max=E5M6.largest)).clamp(1, len(table) - 1)
    low, high = table[above - 1].double(), table[above].double()
    middle = (low + high) / 2
    up = (x.double() > middle) | ((x.double() == middle) & (above % 2 == 0))  # an even place is an even mantissa
    assert torch.equal(encode(x, ONE, E5M6), torch.where(up, high, low).float())


@given(st.floats(min_value=2.0**-140, max_value=2.0**120))
def test_a_power_of_two_scale_is_the_least_that_does_not_saturate(amax: float) -> None:
    x = torch.tensor(amax)
    scale = float(tile_scale(x, power_of_two=True))
    ratio = float(x / 448)
    assert math.frexp(scale)[0] == 0.5
    assert scale >= ratio
    assert scale / 2 < ratio or scale == 2.0**-126  # ue8m0 as IEEE has it: no subnormal scales here


def test_a_tile_of_zeros_has_scale_one_and_stays_zero() -> None:
    q, scales = quantize(torch.zeros(3, 200), (1, 128), power_of_two=False)
    assert torch.equal(scales, torch.ones(3, 2))
    assert not q.any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_becomes_nan_and_spoils_no_other_value(bad: float) -> None:
    x = torch.randn(2, 256)
    clean = quantize(x.index_fill(1, torch.tensor([5]), 0.0), (1, 128), power_of_two=True)
    x[:, 5] = bad
    q, scales = quantize(x, (1, 128), power_of_two=True)
    assert q[:, 5].isnan().all()
    assert int(q.isnan().sum()) == 2
    assert torch.equal(scales, clean[1])
    assert torch.equal(q.nan_to_num(), clean[0])


def test_the_last_tiles_are_smaller_and_have_scales_of_their_own() -> None:
    x = torch.ones(130, 300)
    x[129, 299] = 448.0
    q, scales = quantize(x, (128, 128), power_of_two=False)
    assert scales.shape == (2, 3)
    assert scales[1, 2] == 1.0
    assert torch.allclose(q * spread(scales, (128, 128), x.shape), x, rtol=1e-6)


def test_counters_say_what_was_lost() -> None:
    x = torch.tensor([[448.0, 449.0, 2.0**-11, 0.0, math.nan, 1.0]])
    assert counts(x, torch.ones(1, 1)) == Counts(saturated=2, underflowed=1, total=6)


def test_stored_blocks_are_the_published_ones() -> None:
    """export and convert write amax / 448 in float32, whatever training uses."""
    weight = torch.randn(200, 130) * 0.02
    codes, scales = stored.quantize_blocks(weight)
    assert scales[0, 0] == weight[:128, :128].abs().max() / 448
    expected = (weight[:128, :128] / scales[0, 0]).to(torch.float8_e4m3fn)
    assert torch.equal(codes[:128, :128].view(torch.uint8), expected.view(torch.uint8))
