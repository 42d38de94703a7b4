"""Kernels over packed weights and the latent cache, against references in float32, and their row invariance."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from leanseek import native, ops
from leanseek.native import panels
from leanseek.native.panels import HALF, KINDS, PANEL, Panels, Place

pytestmark = pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")
VARIANTS = list(native.usable_variants())
FORMS = ["fp8", "bf16", "fp32"]


@pytest.fixture(params=VARIANTS)
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    with native.use_variant(request.param):
        yield


def stored(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[ops.StoredWeight, torch.Tensor]:
    """A weight of a kind, and what it stands for in float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if kind == "int8":
        rows = ops.quantize_rows(weight)
        return rows, rows.dense(torch.float32)
    if kind != "fp8":
        weight = weight.to(torch.bfloat16 if kind == "bf16" else torch.float32)
        return weight, weight.float()
    scale = 10 ** torch.empty(ops.FP8_BLOCKS.scale_shape(shape)).uniform_(-4, 1, generator=generator)
    blocks = ops.QuantizedWeight((weight * 60).to(torch.float8_e4m3fn), scale, ops.FP8_BLOCKS)
    return blocks, blocks.dense(torch.float32)


def copied(weight: ops.StoredWeight) -> ops.StoredWeight:
    return copy.deepcopy(weight) if isinstance(weight, ops.QuantizedWeight) else weight.clone()


def unpack(packed: Panels) -> torch.Tensor:
    """The weight [count, rows, columns] in float32. `pack_gated` comes back in its panels' order."""
    panels = packed.data.shape[1]
    n = torch.arange(PANEL)
    place = n // 32 * 32 + n % 16 // 4 * 8 + n % 32 // 16 * 4 + n % 4 if packed.data.element_size() == 1 else n
    if packed.kind == KINDS[ops.INT8_ROWS]:
        assert packed.scale is not None
        wide = (packed.data & 127).float() * torch.where(packed.data > 127, -1.0, 1.0)
        wide = wide[..., place, :] * packed.scale[:, None, :, None]
    else:
        wide = packed.data.float()[..., place, :]
        if packed.scale is not None:  # [.., blocks, 2] -> one for each pair of columns and row
            each = packed.scale.repeat_interleave(64, 2)[:, :, : wide.shape[2]].repeat_interleave(HALF, 3)
            wide = wide * each[..., None]
    flat = wide.transpose(2, 3).reshape(packed.count, panels * PANEL, -1)
    return flat[:, : packed.rows, : packed.columns]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 130, 300), (3, 7, 128), (16, 576, 256), (17, 64, 33), (40, 200, 130)]
)
@torch.no_grad()
def test_linear(variant: str, kind: str, m: int, n: int, k: int) -> None:
    weight, exact = stored((n, k), kind)
    x = torch.randn(m, k)
    with native.use_variant(variant):
        assert close(panels.linear(x, panels.pack(weight)), x @ exact.T)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", [*FORMS, "int8"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (130, 33), (64, 256)])
@torch.no_grad()
def test_unpacking_gives_the_weight_back(kind: str, rows: int, columns: int) -> None:
    """Bit for bit: packing converts nothing."""
    weight, exact = stored((rows, columns), kind)
    assert torch.equal(unpack(panels.pack(weight))[0], exact)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (130, 33), (64, 256)])
@torch.no_grad()
def test_rows_in_eight_bits(variant: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    """Bit for bit as the reference, a row of zeros included."""
    weight = torch.randn(rows, columns).to(dtype)
    weight[rows // 2] = 0
    with native.use_variant(variant):
        found = ops.quantize_rows(weight)
    with ops.use("torch"):
        expected = ops.quantize_rows(weight)
    assert torch.equal(found.data, expected.data) and torch.equal(found.scale, expected.scale)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", FORMS)
@torch.no_grad()
def test_in_place(kind: str) -> None:
    """The same order in the weight's own memory, for a matrix, a stack and a stack of gates and ups."""
    cases = (((192, 130), panels.pack), ((3, 128, 256), panels.pack), ((3, 256, 256), panels.pack_gated_stack))
    for shape, pack in cases:
        weight, _ = stored(shape, kind)
        apart, own = pack(weight), copied(weight)
        within = pack(own, Place.WITHIN)
        assert within.data.data_ptr() == own.data.data_ptr() == pack(own, Place.THERE).data.data_ptr()
        assert torch.equal(within.data.float(), apart.data.float())


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", FORMS)
@torch.no_grad()
def test_gates_and_ups_are_packed_alike_apart_and_stacked(kind: str) -> None:
    (gate, _), (up, _) = stored((128, 130), kind), stored((128, 130), kind, 1)
    both: ops.StoredWeight
    if isinstance(gate, ops.QuantizedWeight) and isinstance(up, ops.QuantizedWeight):
        scale = torch.cat((gate.scale, up.scale))[None]
        both = ops.QuantizedWeight(torch.cat((gate.data, up.data))[None], scale, gate.format)
    else:
        both = torch.cat((gate.data, up.data))[None]
    one, other = panels.pack_gated(gate, up), panels.pack_gated_stack(both)
    assert torch.equal(unpack(one), unpack(other))
    rows = unpack(one)[0].unflatten(0, (-1, 2, HALF))
    assert torch.equal(rows[:, 0].flatten(0, 1), ops.dense(gate, torch.float32))
    assert torch.equal(rows[:, 1].flatten(0, 1), ops.dense(up, torch.float32))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(("nope", "v", "rank"), [(64, 64, 128), (128, 128, 160), (8, 12, 24), (96, 64, 128)])
@torch.no_grad()
def test_heads_unpack_as_absorbed(kind: str, nope: int, v: int, rank: int) -> None:
    """W_UK turned and W_UV, also where an FP8 block lies across two heads."""
    weight, exact = stored((3 * (nope + v), rank), kind)
    w_uk, w_uv = panels.pack_heads(weight, 3, nope)
    whole = exact.view(3, nope + v, rank)
    assert torch.equal(unpack(w_uk), whole[:, :nope].transpose(1, 2))
    assert torch.equal(unpack(w_uv), whole[:, nope:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [*FORMS[:2], "int8"])
@pytest.mark.parametrize("m", [1, 4, 5, 12, 13, 300])
@torch.no_grad()
def test_rows_in_bf16(variant: str, kind: str, m: int) -> None:
    """BF16 times stored weights is exact but for the order of float32 sums."""
    weight, exact = stored((200, 300), kind)
    x = torch.randn(m, 300).bfloat16()
    with native.use_variant(variant):
        got = panels.linear(x, panels.pack(weight))
    want = x.double() @ exact.double().T
    magnitude = x.double().abs() @ exact.double().abs().T
    assert ((got - want).abs() <= 2.0**-8 * want.abs() + 1e-5 * magnitude).all()


@pytest.mark.parametrize("path", [*VARIANTS, "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_fp8_code_is_exact(path: str, dtype: torch.dtype) -> None:
    """Subnormals too, and NaN is NaN in its own row alone: a product with the identity returns each code's value."""
    codes = torch.arange(256, dtype=torch.uint8)
    weight = codes.view(torch.float8_e4m3fn)[:, None].repeat(1, 130).contiguous()
    weight[:, 1::2] = 0.0  # so that a NaN is not in every sum
    plain, blocks = weight.float(), ops.QuantizedWeight(weight, torch.ones(2, 2), ops.FP8_BLOCKS)
    bad = plain.isnan()
    assert bad.any(1).nonzero().flatten().tolist() == [0x7F, 0xFF]
    with ops.use("torch") if path == "torch" else native.use_variant(path), ops.row_invariant():
        packed = None if path == "torch" else panels.pack(blocks)
        for m in (1, 2, 4, 7, 130):
            x = torch.eye(130, dtype=dtype)[:m]
            out = ops.linear(x, blocks) if packed is None else panels.linear(x, packed)
            expected = plain.T[:m].masked_fill(bad.any(1), torch.nan)  # NaN times zero
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.nan_to_num().float(), expected.nan_to_num())
    assert torch.equal(blocks.dense(torch.float32).isnan(), bad)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_nan_code_stays_in_its_row(variant: str) -> None:
    codes = torch.randint(0, 0x7F, (192, 128), dtype=torch.uint8)
    codes[100, 37] = 0x7F
    with native.use_variant(variant):
        head = panels.pack(
            ops.QuantizedWeight(codes.view(torch.float8_e4m3fn), torch.full((2, 1), 1e-3), ops.FP8_BLOCKS)
        )
        for n in (1, 1, 5, 5, 40):  # twice: what a panel holds is known the second time
            out = panels.linear(torch.rand(n, 128) + 0.1, head)
            assert out.isnan().any(0).nonzero().flatten().tolist() == [100]


def cache_case(dtype: torch.dtype, heads: int, width: int, lengths: list[int], new: list[int]):  # type: ignore[no-untyped-def]
    page = 16
    per = max(lengths) // page + 1
    pages = torch.randperm(len(lengths) * per).view(len(lengths), per)
    cache = torch.randn(pages.numel() * page, width).to(dtype)
    positions = torch.cat([torch.arange(length - n, length) for length, n in zip(lengths, new, strict=True)])
    offsets = torch.tensor([0, *new]).cumsum(0)
    index = ops.CacheIndex(positions, positions, offsets, torch.tensor(lengths), pages, page)
    return torch.randn(sum(new), heads, width), cache, index


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width", "value"), [(1, 12, 8), (6, 40, 32), (16, 576, 512), (20, 70, 65)])
@torch.no_grad()
def test_latent_attention(variant: str, dtype: torch.dtype, heads: int, width: int, value: int) -> None:
    """Ragged sequences, decode and chunks, contexts on both sides of a chunk of keys."""
    q, cache, index = cache_case(dtype, heads, width, [1, 40, 513, 1100], [1, 7, 2, 1])
    with native.use_variant(variant):
        got = ops.latent_attention(q, cache, index, 0.2, value)
    with ops.use("torch"):
        assert close(got, ops.latent_attention(q, cache, index, 0.2, value))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("heads", [1, 6, 16, 20])
@torch.no_grad()
def test_latent_attention_in_bf16(variant: str, heads: int) -> None:
    """Query, cache and softmax weights in BF16 against the same values in float64."""
    q, cache, index = cache_case(torch.bfloat16, heads, 576, [1, 40, 513, 1100], [1, 7, 2, 1])
    q = (q / 8).bfloat16()
    with native.use_variant(variant):
        got = ops.latent_attention(q, cache, index, 0.2, 512).double()
    with ops.use("torch"):
        want = ops.latent_attention(q.double(), cache.double(), index, 0.2, 512)
    assert float((got - want).abs().max()) <= 2.0**-7 * float(want.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("narrow", [False, True])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(variant: str, kind: str, narrow: bool) -> None:
    """Bit for bit, for every number of rows that takes another path through the kernel."""
    packed = panels.pack(stored((200, 256), kind)[0])
    x = torch.randn(37, 256, dtype=torch.bfloat16 if narrow else torch.float32)
    with native.use_variant(variant):
        whole = panels.linear(x, packed)
        for rows in (slice(0, 1), slice(3, 5), slice(1, 4), slice(7, 20), slice(30, 37)):
            assert torch.equal(panels.linear(x[rows], packed), whole[rows])
