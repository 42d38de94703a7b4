"""Helpers shared by every FP8 kernel: a tile's scale, and rounding to E4M3 and BF16.

On the GPU a cast is one instruction that rounds to nearest even and saturates. Triton's interpreter casts differently
(ties away from zero, lost carries, no NaN; BF16 is truncated). Under the interpreter we therefore first round in FP32
to a value that the target represents exactly.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton types a kernel's arguments)
from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
E5M6_MAX = tl.constexpr(65024.0)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def known(v):
    """v as float32, with NaN in place of infinities: a maximum ignores NaN, and its E4M3 code is NaN as well."""
    v = v.to(tl.float32)
    return v + v * 0.0


@triton.jit
def largest(v, axis: tl.constexpr):
    """max |v| along an axis of `known` values, so that a lone infinity or NaN does not spoil its tile's scale."""
    return tl.max(tl.abs(v), axis)


@triton.jit
def tile_scale(amax, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr = E4M3_MAX):
    """amax / 448, or the next power of two (ue8m0); 1 for a tile of zeros."""
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    if POWER_OF_TWO:  # any nonzero mantissa carries into the exponent
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def divide(v, scale, POWER_OF_TWO: tl.constexpr):
    """v / scale with IEEE rounding; scale broadcasts to v's shape."""
    if POWER_OF_TWO:  # multiplying by 1 / scale is exact then, and ten times cheaper
        q = v * (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        q = tl.div_rn(v, tl.broadcast_to(scale, v.shape))
    return q


@triton.jit
def encode(v, scale, POWER_OF_TWO: tl.constexpr):
    """v / scale as E4M3 codes, for `known` v; NaN where v is NaN. scale broadcasts to v's shape."""
    q = divide(v, scale, POWER_OF_TWO)
    return _code(q).to(tl.uint8).to(tl.float8e4nv, bitcast=True) if INTERPRETED else q.to(tl.float8e4nv)


@triton.jit
def encode_four(a, b, c, d):
    """Four float32 quotients as E4M3 codes in one int32, a's in the lowest byte."""
    if INTERPRETED:
        packed = _code(a) | (_code(b) << 8) | (_code(c) << 16) | (_code(d) << 24)
    else:
        packed = tl.inline_asm_elementwise(
            "{.reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
            " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high};}",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return packed


@triton.jit
def _code(q):
    """The bits of q's E4M3 code in an int32, for the interpreter."""
    bits = on_grid(q, E4M3_MAX, 3, -6).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    return tl.where(q == q, bits, 0x7F)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """float32 v as `dtype` (float32 or BF16), rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        v = tl.where(v == v, (bits & -65536).to(tl.float32, bitcast=True), v)
    return v.to(dtype)


@triton.jit
def on_grid(q, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr):
    """q saturated at LARGEST and rounded to nearest even, to MANTISSA bits after its leading power of two, which counts
    as at least 2^SMALLEST."""
    q = tl.minimum(tl.maximum(q, -LARGEST), LARGEST)
    least: tl.constexpr = (127 + SMALLEST) << 23
    power = tl.maximum(q.to(tl.int32, bitcast=True) & 0x7F800000, least).to(tl.float32, bitcast=True)
    magic = power * (1.5 * 2.0 ** (23 - MANTISSA))  # its last bit is the step between neighbours at q
    rounded = ((q + magic) - magic).to(tl.int32, bitcast=True)
    return (rounded | (q.to(tl.int32, bitcast=True) & -2147483648)).to(
        tl.float32, bitcast=True
    )  # keeps the sign of -0 too
