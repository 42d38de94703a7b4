"""What `leanseek doctor` says of each op is what the op would do."""

from __future__ import annotations

import pytest
import torch

from leanseek import native, ops
from leanseek.bench import survey
from leanseek.ops import dispatch, products

CPU = torch.device("cpu")


def found(op: str, use: str, kind: str) -> survey.Path:
    return next(p for p in survey.survey(CPU) if (p.op, p.use, p.kind) == (op, use, kind))


def test_every_op_is_asked_for() -> None:
    by_use = {use: {p.op for p in survey.survey(CPU) if p.use == use} for use in ("training", "loading", "serving")}
    for name, op in dispatch.OPS.items():
        assert name in by_use["training"] | by_use["loading"] | by_use["serving"]
        assert not op.backends(True) or name in by_use["serving"] | by_use["loading"]


@pytest.mark.skipif(not native.usable_variants(), reason=f"no kernels here: {native.status().detail}")
def test_kernels_and_what_they_do_not_take() -> None:
    for op, use, kind in (
        ("grouped_product", "training", "float32"),
        ("latent_attention", "serving", "bfloat16"),
        ("sample", "serving", "float32"),
        ("quantize_rows", "loading", "bfloat16"),
    ):
        assert found(op, use, kind).backends == ("native", "native"), op
        assert not found(op, use, kind).declined
    assert not found("linear", "training", "bfloat16").declined  # there is no other


def test_what_a_kernel_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = dispatch.Implementation(
        "native", lambda: None, lambda x, weight: isinstance(weight, torch.Tensor), dispatch.Priority.KERNEL
    )
    monkeypatch.setitem(ops.linear._forms, False, [alike])
    declined = found("linear", "training", "fp8 weights")
    assert declined.backends == ("torch", "torch") and declined.declined
    assert found("linear", "training", "float32").backends == ("native", "native")


def test_the_reference_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(survey, "multiplies", products.multiplies)
    with ops.use("torch"):
        assert {p.backends for p in survey.survey(CPU)} == {("torch", "torch")}
        assert found("linear", "serving", "bfloat16").widened and not found("linear", "serving", "float32").widened
        assert not found("rms_norm", "serving", "bfloat16").widened
    assert "bfloat16 products" in survey.reasons(CPU)
    assert survey.reasons(CPU)["GPU kernels"] == "no CUDA device"


def test_rows_decide_where_a_kernel_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    many = dispatch.Implementation("gpu", lambda: None, lambda x, *_: x.shape[0] > 1, dispatch.Priority.KERNEL)
    monkeypatch.setitem(ops.rms_norm._forms, False, [many])
    assert found("rms_norm", "training", "float32").backends == ("torch", "gpu")
