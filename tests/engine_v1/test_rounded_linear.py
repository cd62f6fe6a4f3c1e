"""Linears in lower precision: vLLM's kernels against the reference arithmetic, on what this CPU runs."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import sys
import weakref

import pytest
import torch
from torch import Tensor

from sdfp_vllm.engine.draft import rounded_linear
from sdfp_vllm.engine.draft.rounded_linear import RoundedLinear, refusal
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.rounding import ROUNDED, copy_bytes, reference_linear, round_weight

# vLLM's int4 kernel for CPUs takes half precision alone; it has no mxfp4 kernel for them.
RUNS = [
    ("int8", torch.float32),
    ("int8", torch.bfloat16),
    ("fp8", torch.float32),
    ("fp8", torch.bfloat16),
    ("int4", torch.bfloat16),
]
SHAPES = [(64, 64), (192, 576), (576, 1536), (33 * 32, 96)]
ROWS = (1, 2, 3, 5, 17, 64)
# Of the largest output: float32 differs by the order of sums; bfloat16 by one rounding of the output and,
# in int4, of each dequantised weight.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}

runs = pytest.mark.parametrize(("precision", "dtype"), RUNS, ids=str)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(got: Tensor, want: Tensor) -> float:
    assert got.dtype == want.dtype and got.shape == want.shape
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@runs
def test_the_kernel_computes_the_reference(precision, dtype, n, k, bias):
    weight = normal(n, k, dtype=dtype)
    b = normal(n, dtype=dtype, seed=1) if bias else None
    kept = weight.clone()
    linear = RoundedLinear(weight, b, precision, "here")
    assert torch.equal(weight, kept)
    rounded = round_weight(weight, precision)
    for rows in ROWS:
        x = normal(rows, k, dtype=dtype, seed=rows)
        assert off(linear(x), reference_linear(rounded, x, b)) <= TOLERANCE[dtype], rows
    assert linear.kernel.endswith("LinearKernel")
    assert linear.nbytes == copy_bytes(n, k, precision, dtype)


@runs
def test_inputs_of_any_layout(precision, dtype):
    weight, x = normal(64, 96, dtype=dtype), normal(8, 96, dtype=dtype, seed=1)
    linear = RoundedLinear(weight, None, precision, "here")
    want = linear(x)
    assert torch.equal(linear(x.view(2, 4, 96)), want.view(2, 4, 64))
    wide = torch.cat((x, x + 1), 1)
    assert torch.equal(linear(wide[:, :96]), want)
    assert torch.equal(linear(x.t().contiguous().t()), want)
    x[3] = 0
    assert not linear(x)[3].any()


@runs
def test_a_fault_in_codes_or_scales_would_show(precision, dtype):
    """The comparison above has the power to see a wrong scale of one output, or one wrong code."""
    weight = normal(64, 64, dtype=dtype)
    rounded = round_weight(weight, precision)
    x = torch.eye(64, dtype=dtype)
    good = reference_linear(rounded, x)
    assert off(RoundedLinear(weight, None, precision, "here")(x), good) <= TOLERANCE[dtype]
    largest = int(rounded.scale.float().amax(1).argmax())
    rounded.scale[largest] = rounded.scale[largest].float() * 1.05
    assert off(reference_linear(rounded, x), good) > TOLERANCE[dtype]
    if precision != "fp8":  # whose codes do not flip bit by bit into neighbours
        rounded = round_weight(weight, precision)
        rounded.codes[largest, 7] ^= 0x11
        assert off(reference_linear(rounded, x), good) > TOLERANCE[dtype]


@runs
def test_a_kernel_that_computes_something_else_is_refused(precision, dtype, monkeypatch):
    real, fault = rounded_linear._pack, rounded_linear._fault.__wrapped__
    assert fault(precision, dtype) is None

    def doubled(kernel, rounded, bias, dtype):
        return real(kernel, dataclasses.replace(rounded, scale=rounded.scale * 2), bias, dtype)

    monkeypatch.setattr(rounded_linear, "_pack", doubled)
    assert "100% off" in (fault(precision, dtype) or "")


@runs
def test_the_weight_is_not_kept(precision, dtype):
    weight, bias = normal(64, 64, dtype=dtype), normal(64, dtype=dtype)
    dead = [weakref.ref(weight.untyped_storage()), weakref.ref(bias.untyped_storage())]
    linear = RoundedLinear(weight, bias, precision, "here")
    x = normal(2, 64, dtype=dtype, seed=1)
    before = linear(x)
    weight.zero_()
    bias.zero_()
    assert torch.equal(linear(x), before)
    del weight, bias
    gc.collect()
    assert not any(ref() for ref in dead)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@runs
def test_refresh_reaches_whoever_holds_it(precision, dtype, reference):
    old, new = normal(192, 576, dtype=dtype), normal(192, 576, dtype=dtype, seed=1) * 3
    x = normal(5, 576, dtype=dtype, seed=2)
    bias = normal(192, dtype=dtype, seed=3)
    linear = RoundedLinear(old, bias, precision, "here", reference=reference)
    tensors = {name: id(tensor) for name, tensor in linear.named_parameters()}
    handler = getattr(linear._kernel, "dnnl_handler", None)
    captured = handler and handler.handler_tensor
    for weight, b in ((new, None), (old, bias * 2), (new, None)):
        kept = weight.clone()
        linear.refresh(weight, b)
        assert torch.equal(weight, kept)
        gc.collect()
        torch.full((1 << 16,), 1e30)  # would land on scales that had been freed
        bias = bias if b is None else b
        want = reference_linear(round_weight(weight, precision), x, bias)
        assert off(linear(x), want) <= TOLERANCE[dtype]
    assert {name: id(tensor) for name, tensor in linear.named_parameters()} == tensors
    assert handler is None or linear._kernel.dnnl_handler.handler_tensor is captured


def test_refresh_wants_the_same_shape_and_dtype():
    linear = RoundedLinear(normal(64, 64, dtype=torch.float32), None, "int8", "here")
    for other in (normal(64, 32, dtype=torch.float32), normal(64, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"here: holds \[64, 64\] torch.float32, given"):
            linear.refresh(other)


@runs
def test_compiles_whole_and_follows_a_refresh(precision, dtype):
    old, new = normal(64, 96, dtype=dtype), normal(64, 96, dtype=dtype, seed=1)
    linear = RoundedLinear(old, None, precision, "here")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: linear(x * 2) + 1, fullgraph=True, dynamic=True)
    for weight in (old, new):
        linear.refresh(weight)
        rounded = round_weight(weight, precision)
        for rows in (3, 8):
            x = normal(rows, 96, dtype=dtype, seed=rows)
            # Fused multiplications may round an input to the neighbouring code.
            assert off(compiled(x), reference_linear(rounded, x * 2) + 1) <= max(TOLERANCE[dtype], 1e-2)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], ids=str)
@runs
def test_the_default_dtype_does_not_matter_and_is_left_alone(precision, dtype, default):
    weight, x = normal(64, 64, dtype=dtype), normal(3, 64, dtype=dtype, seed=1)
    torch.set_default_dtype(default)
    try:
        got = RoundedLinear(weight, None, precision, "here")(x)
        want = reference_linear(round_weight(weight, precision), x)
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    assert off(got, want) <= TOLERANCE[dtype]


def test_another_dtype_of_input_is_refused():
    linear = RoundedLinear(normal(64, 64, dtype=torch.bfloat16), None, "int8", "here")
    with pytest.raises(ValueError, match=r"here: made for torch.bfloat16, given torch.float32"):
        linear(normal(1, 64, dtype=torch.float32))


# ---------------------------------------------------------------- where there is no kernel
@runs
def test_what_runs_is_not_refused(precision, dtype):
    assert [refusal(precision, dtype, n, k) for n, k in SHAPES] == [None] * 4


@pytest.mark.parametrize(
    ("precision", "dtype", "n", "k", "why", "instead"),
    [
        ("mxfp4", torch.bfloat16, 64, 64, "MXFP4", "Use int8 or fp8 or int4, which run here"),
        ("mxfp4", torch.float32, 64, 64, "MXFP4", "Use int8 or fp8, which run here"),
        ("int4", torch.float32, 64, 64, "Float", "Use int8 or fp8, which run here"),
        ("int4", torch.bfloat16, 64, 70, "70 inputs", "Use int8 or fp8, which run here"),
        ("int4", torch.bfloat16, 40, 64, "multiples of 32", "Use int8 or fp8, which run here"),
    ],
)
def test_a_precision_without_a_kernel_is_refused_by_name(precision, dtype, n, k, why, instead):
    with pytest.raises(SdfpError) as caught:
        RoundedLinear(normal(n, k, dtype=dtype), None, precision, "here")
    assert caught.value.where == f"--precision {precision}"
    assert f"weight [{n}, {k}]" in caught.value.what and why in caught.value.what
    assert caught.value.way_out.startswith(instead) and "--precision" in caught.value.way_out
    assert why in (refusal(precision, dtype, n, k) or "")


def test_a_kernel_that_is_disabled_is_not_used(monkeypatch):
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "CPUInt8ScaledMMLinearKernel")
    assert "disabled" in (refusal("int8", torch.float32, 64, 64) or "")


def test_a_vllm_without_the_symbols_is_named(monkeypatch):
    from sdfp_vllm.engine.upstream import linear as upstream_linear
    from sdfp_vllm.engine.upstream import releases

    releases.refuse_missing.cache_clear()  # another test of this process may have found all well
    monkeypatch.setitem(sys.modules, "vllm.model_executor.parameter", None)
    with pytest.raises(SdfpError, match=r"vllm\.model_executor\.parameter .* \(--precision full\)"):
        importlib.reload(upstream_linear)


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_runs_everything(precision, dtype):
    weight, x = normal(64, 96, dtype=dtype), normal(3, 96, dtype=dtype, seed=1)
    bias = normal(64, dtype=dtype, seed=2)
    linear = RoundedLinear(weight, bias, precision, "here", reference=True)
    assert torch.equal(linear(x), reference_linear(round_weight(weight, precision), x, bias))
    assert linear.kernel == "Reference" and linear.nbytes == copy_bytes(64, 96, precision, dtype)


def test_the_reference_refuses_what_cannot_be_rounded():
    with pytest.raises(SdfpError, match=r"--precision int4.*70 inputs"):
        RoundedLinear(normal(64, 70, dtype=torch.float32), None, "int4", "here", reference=True)
