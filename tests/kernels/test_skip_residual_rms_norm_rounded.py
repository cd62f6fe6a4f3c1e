"""skip_residual_rms_norm_rounded: the Triton kernel and the torch reference against float64 and against vLLM's ops."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch
import triton
import triton.language as tl

from sdfp_vllm.kernels import skip_residual_rms_norm as unrounded
from sdfp_vllm.kernels.skip_residual_rms_norm_rounded import reference, skip_residual_rms_norm_rounded
from sdfp_vllm.plan.bridge import Bridge
from tests.kernels.test_skip_residual_rms_norm import EPS, in_float64, make_bridge
from tests.support.tolerance import close, random_like, strided, unharmed

OPS = pytest.mark.parametrize("op", [skip_residual_rms_norm_rounded, reference], ids=["kernel", "reference"])
PRECISIONS = pytest.mark.parametrize("precision", ["int8", "fp8"])
LARGEST = {"int8": 127.0, "fp8": 448.0}
FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FLOOR = 1 / (448 * 512)
# How far y / scale may lie from float64's, in proportion: near a tie, a code may be either neighbour.
SLACK = 2e-5


def nearest(wanted: torch.Tensor, precision: str) -> torch.Tensor:
    """float64 rounded to the values of the precision, ties to even; by search, not by a cast."""
    if precision == "int8":
        return wanted.round()
    values = FP8_VALUES[:127].double()  # 0 to 448, by code, so that even codes are at even places
    size = wanted.abs().clamp(max=448.0)
    above = torch.searchsorted(values, size).clamp(1, 126)
    low, high = values[above - 1], values[above]
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return torch.where(up, high, low) * wanted.sign()


def expected_scales(normed: torch.Tensor, precision: str) -> torch.Tensor:
    scales = normed.abs().amax(1, keepdim=True) / LARGEST[precision]
    return scales.clamp(min=FLOOR) if precision == "fp8" else scales


def check_rounded(rows: torch.Tensor, scales: torch.Tensor, normed: torch.Tensor, precision: str) -> None:
    """Asserts that the rows and scales are those of the float64 `normed`."""
    assert rows.dtype is {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[precision]
    assert rows.shape == normed.shape and scales.shape == (len(normed), 1) and scales.dtype is torch.float32
    wide = expected_scales(normed, precision)
    torch.testing.assert_close(scales.double(), wide, rtol=1e-5, atol=0.0)
    wanted, got = normed / wide.clamp(min=1e-300), rows.float().double()
    low = nearest(wanted - SLACK * wanted.abs(), precision)
    high = nearest(wanted + SLACK * wanted.abs(), precision)
    assert ((got >= torch.minimum(low, high)) & (got <= torch.maximum(low, high))).all()
    # Nearly all are beyond doubt, so the bounds above mean something.
    assert (low != high).double().mean() < 0.02


@OPS
@PRECISIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "bias", "affine", "low-rank 1", "low-rank 5"])
@pytest.mark.parametrize(("rows", "hidden"), [(5, 123), (3, 96), (1, 577), (1, 1)])
def test_against_float64(op, rows, hidden, kind, dtype, precision):
    (branch, _), (residual, around) = strided(rows, hidden, dtype, 1), strided(rows, hidden, dtype, 2)
    weight, bridge = random_like(hidden, dtype=dtype, seed=4), make_bridge(kind, hidden, dtype)
    offset = 1.0 if rows == 3 else 0.0
    normed, h = in_float64(branch, residual, weight, bridge, offset)
    before = branch.clone()
    got, scales = op(branch, residual, weight, EPS, bridge, precision=precision, weight_offset=offset)
    check_rounded(got, scales, normed, precision)
    assert got.is_contiguous() and scales.is_contiguous()
    close(residual, h)
    assert unharmed(around, hidden) and torch.equal(branch, before)


@PRECISIONS
@pytest.mark.parametrize("hidden", [4096, 5120])
def test_rows_as_long_as_a_real_model(hidden, precision):
    branch, residual = (random_like(2, hidden, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    weight, bridge = (
        random_like(hidden, dtype=torch.bfloat16, seed=4),
        make_bridge("affine", hidden, torch.float32),
    )
    normed, h = in_float64(branch, residual, weight, bridge, 0.0)
    got, scales = skip_residual_rms_norm_rounded(branch, residual, weight, EPS, bridge, precision=precision)
    check_rounded(got, scales, normed, precision)
    close(residual, h)


@OPS
@PRECISIONS
def test_a_row_of_zeros_gives_zeros(op, precision):
    branch, weight = (
        random_like(3, 96, dtype=torch.float32, seed=1),
        random_like(96, dtype=torch.float32, seed=4),
    )
    residual = -branch
    residual[2] += 1.0
    rows, scales = op(branch, residual, weight, EPS, Bridge(torch.zeros(96)), precision=precision)
    assert (rows[:2].float() == 0).all() and (rows[2].float() != 0).any()
    assert scales[:2].flatten().tolist() == pytest.approx(
        [0.0 if precision == "int8" else FLOOR] * 2, rel=1e-6
    )


@OPS
def test_fp8_scales_stop_at_vllms_bound(op):
    branch, residual = torch.zeros(1, 96), torch.ones(1, 96)
    weight = torch.full((96,), 1e-6)
    rows, scales = op(branch, residual, weight, EPS, precision="fp8")
    assert scales.item() == pytest.approx(FLOOR, rel=1e-6)
    assert rows.float().unique().item() == nearest(torch.tensor(1e-6 / FLOOR).double(), "fp8")


def ties(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers halfway between two codes, the largest first, and the even one of the two."""
    if precision == "int8":
        wanted = torch.cat([torch.tensor([127.0]), torch.arange(-126, 126) + 0.5])
    else:
        values = FP8_VALUES[:127].float()
        wanted = torch.cat([values[-1:], (values[1:] + values[:-1]) / 2])
        wanted = torch.cat([wanted, -wanted])
    even = nearest(wanted.double(), precision)
    return wanted, even


@OPS
@PRECISIONS
def test_ties_go_to_even(op, precision):
    """Rows whose norm is exact: the residual is 1 everywhere and eps is 0, so y is the weight."""
    wanted, even = ties(precision)
    weight = wanted * 0.25
    rows, scales = op(
        torch.zeros(1, len(wanted)), torch.ones(1, len(wanted)), weight, 0.0, precision=precision
    )
    assert scales.item() == 0.25
    assert torch.equal(rows[0].double() if precision == "int8" else rows[0].float().double(), even)


@triton.jit
def encode(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, unrounded._e4m3(tl.load(x_ptr + at)))


def test_every_fp8_byte_is_torchs():
    """All values, the ties between them, the numbers next to both, either sign, and random ones of every size."""
    values = FP8_VALUES[:127].float()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    points = torch.cat([points, *(torch.nextafter(points, torch.tensor(t)) for t in (0.0, 463.0))])
    g = torch.Generator().manual_seed(0)
    spread = 448.0 * torch.rand(5000, generator=g) * 2.0 ** -torch.randint(0, 24, (5000,), generator=g)
    x = torch.cat([points, spread, torch.zeros(8192)])[:8192]
    x = torch.cat([x, -x])
    got = torch.zeros(len(x), dtype=torch.uint8)
    encode[(1,)](x, got, N=len(x))
    assert torch.equal(got, x.to(torch.float8_e4m3fn).view(torch.uint8))


@OPS
def test_int8_is_vllms(op):
    """The norm, then vLLM's own op for int8 with a scale per token, which it has on CPUs too."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "dynamic_scaled_int8_quant"):
        pytest.skip("this build of vLLM has no dynamic_scaled_int8_quant")
    from vllm._custom_ops import onednn_scaled_int8_quant

    branch, residual = (random_like(5, 128, dtype=torch.float32, seed=s) for s in (1, 2))
    weight, bridge = random_like(128, dtype=torch.float32, seed=4), make_bridge("affine", 128, torch.float32)
    normed = unrounded.reference(branch, residual.clone(), weight, EPS, bridge)
    want, want_scales, _ = onednn_scaled_int8_quant(normed)
    rows, scales = op(branch, residual, weight, EPS, bridge, precision="int8")
    torch.testing.assert_close(scales, want_scales, rtol=1e-5, atol=0.0)
    assert (rows != want).sum() <= 1 and (rows.int() - want.int()).abs().max() <= 1


@OPS
def test_fp8_is_vllms(op):
    """The norm, then vLLM's own torch code for fp8 with a scale per token."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    branch, residual = (random_like(5, 128, dtype=torch.float32, seed=s) for s in (1, 2))
    weight, bridge = random_like(128, dtype=torch.float32, seed=4), make_bridge("affine", 128, torch.float32)
    normed = unrounded.reference(branch, residual.clone(), weight, EPS, bridge)
    with set_current_vllm_config(VllmConfig()):
        want, want_scales = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN).forward_native(normed)
    rows, scales = op(branch, residual, weight, EPS, bridge, precision="fp8")
    torch.testing.assert_close(scales, want_scales, rtol=1e-5, atol=0.0)
    apart = (rows.view(torch.uint8).int() - want.view(torch.uint8).int()).abs()
    assert (apart != 0).sum() <= 1 and apart.max() <= 1


@PRECISIONS
def test_an_empty_batch_is_nothing(precision):
    empty, bridge = torch.empty(0, 96), make_bridge("bias", 96, torch.float32)
    rows, scales = skip_residual_rms_norm_rounded(
        empty, empty.clone(), torch.ones(96), EPS, bridge, precision=precision
    )
    assert rows.shape == (0, 96) and scales.shape == (0, 1)


@PRECISIONS
def test_torch_compile_sees_one_op_that_writes_the_residual(precision):
    bridge = make_bridge("affine", 96, torch.float32)

    def enter(branch, residual, weight):
        residual = residual * 1.0
        rows, scales = skip_residual_rms_norm_rounded(
            branch, residual, weight, EPS, bridge, precision=precision
        )
        return rows.float() * scales, residual

    arguments = [random_like(3, 96, dtype=torch.float32, seed=s) for s in (1, 2)] + [torch.ones(96)]
    compiled = torch.compile(enter, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*arguments), enter(*arguments), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(residual=torch.zeros(2, 96)), r"residual has shape \[2, 96\]"),
        (dict(residual=torch.zeros(96, 3).T), "residual must be contiguous"),
        (dict(weight=torch.zeros(95)), "weight has shape"),
        (dict(bridge=Bridge(torch.zeros(95))), "bridge.shift has shape"),
        (dict(precision="int4"), "precision 'int4'"),
        (
            dict(branch=torch.zeros(1, 32769), residual=torch.zeros(1, 32769), weight=torch.zeros(32769)),
            "32768",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = dict(branch=torch.zeros(3, 96), residual=torch.zeros(3, 96), weight=torch.zeros(96), eps=EPS)
    with pytest.raises(ValueError, match=message):
        skip_residual_rms_norm_rounded(**(fits | dict(precision="int8") | change))


@pytest.mark.parametrize(
    ("precision", "wrong", "right"),
    [
        ("int8", "tl.div_rn(largest, 127.0)", "tl.div_rn(largest, 128.0)"),
        ("int8", "largest = tl.max(tl.abs(out)", "largest = tl.max(out"),
        ("int8", "+ 12582912.0) - 12582912.0", "+ 0.0)"),
        ("int8", "tl.store(row_scale_ptr + row,", "tl.store(row_scale_ptr,"),
        ("fp8", "tl.div_rn(largest, 448.0)", "tl.div_rn(largest, 440.0)"),
        ("fp8", "0x7FFFF + ((size >> 20) & 1)", "0x80000"),
        ("fp8", "size < 0x3C800000, small, normal", "size < 0x3C800000, 0, normal"),
        ("fp8", "((bits >> 24) & 0x80)", "0"),
        ("fp8", "1.0 / (448.0 * 512.0)", "0.0"),
    ],
)
def test_a_mutated_kernel_fails(precision, wrong, right, tmp_path, monkeypatch):
    """The comparisons above can fail: each of these mistakes in the kernel makes one."""
    source = inspect.getsource(unrounded)
    assert source.count(wrong) == 1
    # An op of the same name is registered already.
    source = source.replace(wrong, right).replace("sdfp_vllm::skip", "sdfp_vllm_rounded_mutant::skip")
    path = tmp_path / "mutant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(unrounded, "_kernel", mutant._kernel)
    with pytest.raises(AssertionError):
        test_against_float64(skip_residual_rms_norm_rounded, 5, 123, "low-rank 5", torch.float32, precision)
        test_ties_go_to_even(skip_residual_rms_norm_rounded, precision)
        test_a_row_of_zeros_gives_zeros(skip_residual_rms_norm_rounded, precision)
