"""Kernels over packed weights and the latent cache, against references in float32, and their row invariance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from leanseek import native, ops

pytestmark = pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")
VARIANTS = list(native.usable_variants())
KINDS = ["fp8", "bf16", "fp32"]


@pytest.fixture(params=VARIANTS)
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    with native.use_variant(request.param):
        yield


def stored(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A weight of a kind, its scales, and what it stands for in float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if kind != "fp8":
        weight = weight.to(torch.bfloat16 if kind == "bf16" else torch.float32)
        return weight, None, weight.float()
    codes = (weight * 60).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scale = 10 ** torch.empty(blocks).uniform_(-4, 1, generator=generator)
    return codes, scale, ops.dequantize_blocks(codes, scale)


def packed_experts(
    gate_up: torch.Tensor, up_scale: torch.Tensor | None, down: torch.Tensor, down_scale: torch.Tensor | None
) -> tuple[ops.Packed, ops.Packed]:
    gate, up = gate_up.chunk(2, 1)
    scales = None if up_scale is None else up_scale.chunk(2, 1)
    return ops.pack_gated(gate, up, scales), ops.pack(down, down_scale)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 130, 300), (3, 7, 128), (16, 576, 256), (17, 64, 33), (40, 200, 130)]
)
@torch.no_grad()
def test_linear(variant: str, kind: str, m: int, n: int, k: int) -> None:
    weight, scale, exact = stored((n, k), kind)
    x = torch.randn(m, k)
    with native.use_variant(variant), ops.row_invariant():
        assert close(ops.packed_linear(x, ops.pack(weight, scale)), x @ exact.T)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", [*KINDS, "int8"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (130, 33), (64, 256)])
@torch.no_grad()
def test_unpacking_gives_the_weight_back(kind: str, rows: int, columns: int) -> None:
    """Bit for bit: packing converts nothing."""
    weight, scale, exact = stored((rows, columns), "fp32" if kind == "int8" else kind)
    if kind == "int8":
        weight, scale = ops.quantize_rows(weight)
        exact = ops.dense(weight, scale, torch.float32)
    assert torch.equal(ops.unpack(ops.pack(weight, scale))[0], exact)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (130, 33), (64, 256)])
@torch.no_grad()
def test_rows_in_eight_bits(variant: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    """Bit for bit as the reference, a row of zeros included."""
    weight = torch.randn(rows, columns).to(dtype)
    weight[rows // 2] = 0
    with native.use_variant(variant):
        codes, scale = ops.quantize_rows(weight)
    with ops.use("torch"):
        expected, exact = ops.quantize_rows(weight)
    assert torch.equal(codes, expected) and torch.equal(scale, exact)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_in_place(kind: str) -> None:
    """The same order in the weight's own memory, for a matrix, a stack and a stack of gates and ups."""
    for shape in ((192, 130), (3, 128, 256)):
        weight, scale, _ = stored(shape, kind)
        apart, own = ops.pack(weight, scale), weight.clone()
        within = ops.pack(own, scale, place=ops.Place.WITHIN)
        assert within.data.data_ptr() == own.data_ptr()
        assert torch.equal(within.data.float(), apart.data.float())
    scales = None if scale is None else (scale[:, :1], scale[:, :1])
    apart = ops.pack_gated(*weight.chunk(2, 1), scales)
    own = weight.clone()
    within = ops.pack_gated(*own.chunk(2, 1), scales, place=ops.Place.WITHIN)
    assert within.data.data_ptr() == own.data_ptr()
    assert torch.equal(within.data.float(), apart.data.float())


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("nope", "v", "rank"), [(64, 64, 128), (128, 128, 160), (8, 12, 24), (96, 64, 128)])
@torch.no_grad()
def test_heads_unpack_as_absorbed(kind: str, nope: int, v: int, rank: int) -> None:
    """W_UK turned and W_UV, also where an FP8 block lies across two heads."""
    weight, scale, exact = stored((3 * (nope + v), rank), kind)
    w_uk, w_uv = ops.pack_heads(weight, scale, 3, nope)
    whole = exact.view(3, nope + v, rank)
    assert torch.equal(ops.unpack(w_uk), whole[:, :nope].transpose(1, 2))
    assert torch.equal(ops.unpack(w_uv), whole[:, nope:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [*KINDS[:2], "int8"])
@pytest.mark.parametrize("m", [1, 4, 5, 12, 13, 300])
@torch.no_grad()
def test_rows_in_bf16(variant: str, kind: str, m: int) -> None:
    """BF16 times stored weights is exact but for the order of float32 sums."""
    weight, scale, exact = stored((200, 300), "fp32" if kind == "int8" else kind)
    if kind == "int8":
        weight, scale = ops.quantize_rows(weight)
        exact = ops.dense(weight, scale, torch.float32)
    x = torch.randn(m, 300).bfloat16()
    with native.use_variant(variant):
        got = ops.packed_linear(x, ops.pack(weight, scale))
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
    plain, scale = weight.float(), torch.ones(2, 2)
    bad = plain.isnan()
    assert bad.any(1).nonzero().flatten().tolist() == [0x7F, 0xFF]
    with ops.use("torch") if path == "torch" else native.use_variant(path), ops.row_invariant():
        packed = None if path == "torch" else ops.pack(weight, scale)
        for m in (1, 2, 4, 7, 130):
            x = torch.eye(130, dtype=dtype)[:m]
            out = ops.linear(x, weight, scale) if packed is None else ops.packed_linear(x, packed)
            expected = plain.T[:m].masked_fill(bad.any(1), torch.nan)  # NaN times zero
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.nan_to_num().float(), expected.nan_to_num())
    assert torch.equal(ops.dequantize_blocks(weight, scale).isnan(), bad)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_nan_code_stays_in_its_row_and_its_expert(variant: str) -> None:
    codes = torch.randint(0, 0x7F, (3, 192, 128), dtype=torch.uint8)
    codes[1, 100, 37], codes[2, 5, 0] = 0x7F, 0xFF
    gate, up = codes.view(torch.float8_e4m3fn).chunk(2, 1)
    down = torch.randn(3, 128, 96).to(torch.float8_e4m3fn)
    one = torch.full((3, 1, 1), 1e-3)
    with native.use_variant(variant):
        gated, down_packed = ops.pack_gated(gate, up, (one, one)), ops.pack(down, one)
        for n in (1, 4, 30):  # twice: what a panel holds is known the second time
            for _ in range(2):
                out = ops.packed_experts(torch.ones(n, 128), torch.tensor([[0], [1], [2]] * n)[:n], torch.ones(n, 1), gated, down_packed)  # fmt: skip
                assert [bool(row.isnan().any()) for row in out] == ([False, True, True] * n)[:n]
        head = ops.pack(codes[1].view(torch.float8_e4m3fn), torch.ones(2, 1))
        for n in (1, 5, 40):
            out = ops.packed_linear(torch.rand(n, 128) + 0.1, head)
            assert out.isnan().any(0).nonzero().flatten().tolist() == [100]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@torch.no_grad()
def test_experts(variant: str, kind: str, tokens: int) -> None:
    gate_up, up_scale, exact_up = stored((6, 256, 200), kind)
    down, down_scale, exact_down = stored((6, 200, 128), kind, 1)
    x, weights = torch.randn(tokens, 200), torch.rand(tokens, 2)
    indices = torch.randn(tokens, 6).topk(2).indices
    packed = packed_experts(gate_up, up_scale, down, down_scale)
    with native.use_variant(variant), ops.row_invariant():
        got = ops.packed_experts(x, indices, weights, *packed)
    with ops.use("torch"):
        assert close(got, ops.experts(x, indices, weights, exact_up, exact_down))


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
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("narrow", [False, True])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(variant: str, kind: str, narrow: bool) -> None:
    """Bit for bit, for every number of rows that takes another path through the kernel."""
    weight, scale, _ = stored((200, 256), kind)
    gate_up, up_scale, _ = stored((6, 256, 200), kind)
    down, down_scale, _ = stored((6, 200, 128), kind, 1)
    packed, experts = ops.pack(weight, scale), packed_experts(gate_up, up_scale, down, down_scale)
    x, z, weights, indices = (
        torch.randn(37, 256, dtype=torch.bfloat16 if narrow else torch.float32),
        torch.randn(37, 200, dtype=torch.bfloat16 if narrow else torch.float32),
        torch.rand(37, 2),
        torch.randn(37, 6).topk(2).indices,
    )
    with native.use_variant(variant), ops.row_invariant():
        whole = ops.packed_linear(x, packed)
        routed = ops.packed_experts(z, indices, weights, *experts)
        for rows in (slice(0, 1), slice(3, 5), slice(1, 4), slice(7, 20), slice(30, 37)):
            assert torch.equal(ops.packed_linear(x[rows], packed), whole[rows])
            part = ops.packed_experts(z[rows], indices[rows], weights[rows], *experts)
            assert torch.equal(part, routed[rows])
