"""The arithmetic of lower precision: known cases by hand, then float64 written another way."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.rounding import (
    ROUNDED,
    Rounded,
    copy_bytes,
    dequantised,
    group_size,
    reference_linear,
    round_weight,
    rounding_variance,
)

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
SHAPES = {  # odd ones where the precision takes them
    "int8": [(1, 1), (7, 13), (65, 70), (64, 128)],
    "fp8": [(1, 1), (7, 13), (65, 70), (64, 128)],
    "int4": [(1, 32), (5, 96), (33, 192), (64, 384)],
    "mxfp4": [(1, 32), (5, 96), (33, 192), (64, 384)],
}
CASES = [(precision, *shape) for precision in ROUNDED for shape in SHAPES[precision]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nibbles(codes: Tensor) -> Tensor:
    return torch.stack((codes % 16, codes // 16), -1).flatten(-2)


# ---------------------------------------------------------------- by hand
def test_int8_by_hand():
    rounded = round_weight(torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5], [0, 0, 0, 0, 0]]), "int8")
    assert rounded.codes.tolist() == [[127, -127, 0, 2, 2], [0] * 5]  # halves to even; a row of zeros
    assert rounded.scale.tolist() == [[1.0], [0.0]] and rounded.group == 5


def test_fp8_by_hand():
    rounded = round_weight(torch.tensor([[448.0, 17.0, -1.0625, 0.0], [0, 0, 0, 0]]), "fp8")
    assert rounded.scale[0].item() == 1.0 and rounded.codes.dtype == torch.float8_e4m3fn
    # Three bits of mantissa: between 16 and 18, and between 1 and 1.125, ties to even.
    assert rounded.codes.float().tolist() == [[448.0, 16.0, -1.0, 0.0], [0.0] * 4]


def test_int4_by_hand():
    row = torch.zeros(32)
    row[:4] = torch.tensor([7.0, -7.0, 3.0, -1.0])
    rounded = round_weight(torch.stack((row, torch.zeros(32))), "int4")
    assert nibbles(rounded.codes)[0, :6].tolist() == [15, 1, 11, 7, 8, 8]
    assert rounded.scale[0].item() == 1.0 and rounded.group == 32
    assert torch.equal(dequantised(rounded, torch.float32)[1], torch.zeros(32))


def test_int4_uses_code_minus_eight_where_it_helps():
    row = torch.zeros(32)
    row[:2] = torch.tensor([-8.0, 4.0])
    rounded = round_weight(row[None], "int4")
    assert rounded.scale.item() == 1.0
    assert torch.equal(dequantised(rounded, torch.float32)[0], row)


def test_mxfp4_by_hand():
    row = torch.zeros(32)
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    row[:10] = torch.tensor([6.0, -6.0, *ties, -0.76])
    rounded = round_weight(torch.stack((row, row / 8, torch.zeros(32))), "mxfp4")
    assert nibbles(rounded.codes)[0, :10].tolist() == [7, 15, 0, 2, 2, 4, 4, 6, 6, 8 + 2]
    assert rounded.scale.tolist() == [[127], [124], [0]]
    assert torch.equal(rounded.codes[0], rounded.codes[1])
    values = dequantised(rounded, torch.float32)
    assert values[0, :10].tolist() == [6, -6, 0, 1, 1, 2, 2, 4, 4, -1]
    assert torch.equal(values[1], values[0] / 8) and not values[2].any()


@pytest.mark.parametrize(
    ("largest", "exponent"), [(6.99, 127), (7.0, 128), (4.0, 127), (3.4, 126), (3.5, 127), (1e-40, 0)]
)
def test_mxfp4_shared_exponent_rounds_the_largest_first(largest, exponent):
    """vLLM and OCP MX: beyond 7 the largest would be nearer to 8 than to 6, so the block moves up."""
    row = torch.zeros(1, 32)
    row[0, 3] = largest
    assert round_weight(row, "mxfp4").scale.item() == exponent


@pytest.mark.parametrize(
    ("k", "group"), [(4096, 128), (576, 64), (96, 32), (33 * 32, 32), (70, None), (48, None)]
)
def test_group_size(k, group):
    assert group_size(k) == group


@pytest.mark.parametrize("precision", ["int4", "mxfp4"])
def test_inputs_that_do_not_divide_are_refused(precision):
    with pytest.raises(SdfpError, match=f"--precision {precision}: 70 inputs .* Choose int8 or fp8"):
        round_weight(normal(4, 70), precision)


# ---------------------------------------------------------------- against float64
def emulated(weight: Tensor, rounded: Rounded) -> Tensor:
    """The dequantised weight by the definition, element by element in float64."""
    scale = rounded.scale.double()
    if rounded.precision == "mxfp4":
        scale = torch.pow(2.0, scale - 127)
        nibble = nibbles(rounded.codes.long())
        values = torch.tensor(E2M1).double()[nibble % 8] * (1 - 2 * (nibble // 8))
    elif rounded.precision == "int4":
        values = nibbles(rounded.codes.long()).double() - 8
    else:
        values = rounded.codes.double()
    return values * scale.repeat_interleave(rounded.group, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("precision", "n", "k"), CASES)
def test_codes_stand_for_a_weight_within_the_error_bound(precision, n, k, dtype):
    weight = normal(n, k, dtype=dtype)
    weight[n // 2] = 0
    kept = weight.clone()
    rounded = round_weight(weight, precision)
    assert torch.equal(weight, kept)
    got = dequantised(rounded, torch.float64)
    torch.testing.assert_close(got, emulated(weight, rounded), rtol=1e-6, atol=0)
    assert not got[n // 2].any()
    w = weight.double()
    error = (got - w).abs()
    largest = w.unflatten(1, (-1, rounded.group)).abs().amax(-1).repeat_interleave(rounded.group, 1)
    bound = {
        "int8": largest / 254,  # half a step
        "fp8": torch.maximum(w.abs() / 16, largest / 448 / 1024),  # half a unit of 3 bits; half a subnormal
        "int4": largest / 7 * 1.77,  # the finest scale, before its rounding, cuts the largest at 5.25
        "mxfp4": torch.maximum(w.abs() / 4 * 1.01, largest / 8),  # half a unit of 1 bit; 7 is cut to 6
    }[precision]
    assert (error <= bound * 1.001 + 1e-30).all(), float((error - bound).max())


def test_the_int4_scale_has_the_least_error_of_the_candidates():
    weight = normal(40, 128)
    mine = (dequantised(round_weight(weight, "int4"), torch.float64) - weight).square().sum(1)
    largest = weight.abs().amax(1, keepdim=True)
    for share in (1.0, 0.9, 0.875, 0.75):
        scale = largest * (share / 7)
        plain = ((weight / scale).round().clamp(-8, 7) * scale - weight).double().square().sum(1)
        assert (mine <= plain * (1 + 1e-5)).all()


@pytest.mark.parametrize("precision", ROUNDED)
def test_chunks_do_not_show(precision, monkeypatch):
    weight, x = normal(37, 96), normal(3, 96, seed=1)
    whole = round_weight(weight, precision)
    product, variance = reference_linear(whole, x), rounding_variance(weight, precision)
    monkeypatch.setattr("sdfp_vllm.plan.rounding._CHUNK", 96 * 5)
    parts = round_weight(weight, precision)
    assert torch.equal(parts.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(dequantised(parts, torch.float32), dequantised(whole, torch.float32))
    torch.testing.assert_close(reference_linear(parts, x), product, rtol=1e-5, atol=1e-5)
    assert rounding_variance(weight, precision) == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("precision", "n", "k"), CASES)
def test_copy_bytes_are_those_stored(precision, n, k, dtype):
    rounded = round_weight(normal(n, k, dtype=dtype), precision)
    stored = rounded.codes.untyped_storage().nbytes() + rounded.scale.untyped_storage().nbytes()
    assert copy_bytes(n, k, precision, dtype) == stored
    assert copy_bytes(n, k, "full", dtype) == 0


@pytest.mark.parametrize(("precision", "n", "k"), CASES)
def test_variance_is_the_mean_squared_error(precision, n, k):
    weight = normal(n, k, dtype=torch.bfloat16)
    difference = emulated(weight, round_weight(weight, precision)) - weight.double()
    assert rounding_variance(weight, precision) == pytest.approx(float(difference.square().mean()), rel=1e-6)
    assert rounding_variance(weight, "full") == 0.0


def test_precisions_order_by_their_error():
    weight = normal(64, 512)
    errors = [rounding_variance(weight, p) for p in ("int8", "fp8", "int4", "mxfp4")]
    assert errors == sorted(errors) and errors[0] > 0


# ---------------------------------------------------------------- the product
def rounded_inputs(precision: str, x: Tensor) -> Tensor:
    """The inputs as the kernels see them, float64, by search instead of by formula."""
    wide = x.double()
    if precision == "int4":
        return wide
    if precision == "mxfp4":
        out = torch.empty_like(wide)
        grid = torch.tensor([*E2M1, *(-v for v in E2M1)]).double()
        for row, start in itertools.product(range(len(x)), range(0, x.shape[1], 32)):
            block = wide[row, start : start + 32]
            exponent = round_weight(block[None].float(), "mxfp4").scale.item() - 127
            odd = torch.arange(16) % 2 * 1e-12  # at equal distance the even code is nearer
            nearest = ((block[:, None] - grid * 2.0**exponent).abs() + odd).argmin(1)
            out[row, start : start + 32] = grid[nearest] * 2.0**exponent
        return out
    largest = wide.abs().amax(1, keepdim=True)
    if precision == "int8":
        scale = torch.where(largest > 0, largest / 127, 1)
        return (wide / scale).round() * scale
    scale = (largest / 448).clamp_min(1 / (448 * 512))
    return (wide / scale).float().to(torch.float8_e4m3fn).double() * scale


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("precision", "n", "k"), CASES)
def test_product_against_float64(precision, n, k, dtype, bias):
    weight, x = normal(n, k, dtype=dtype), normal(6, k, seed=1, dtype=dtype)
    x[2] = 0
    b = normal(n, seed=2, dtype=dtype) if bias else None
    rounded = round_weight(weight, precision)
    got = reference_linear(rounded, x, b)
    want = rounded_inputs(precision, x) @ emulated(weight, rounded).t()
    if b is not None:
        want += b.double()
    assert got.dtype == dtype and got.shape == (6, n)
    error = (got.double() - want).abs().max(1).values
    limit = (1 if dtype == torch.bfloat16 else 8) * torch.finfo(dtype).eps * want.abs().max()
    if dtype == torch.bfloat16 and precision in ("int8", "fp8"):
        # An input half-way between two codes, which is common here, may go either way in float64.
        limit = limit + x.double().abs().amax(1) * weight.double().abs().max() / (
            127 if precision == "int8" else 8
        )
    assert (error <= limit).all()
    assert torch.equal(reference_linear(rounded, x.view(2, 3, k), b), got.view(2, 3, n))


def test_int8_sums_are_exact():
    """Partial sums beyond 2^24, which float32 would round."""
    k = 4096
    weight = torch.full((1, k), 127.0)
    weight[0, 0] = 1.0
    x = torch.full((1, k), 127.0)
    x[0, 0] = 1.0
    assert reference_linear(round_weight(weight, "int8"), x).item() == float(127 * 127 * (k - 1) + 1)
