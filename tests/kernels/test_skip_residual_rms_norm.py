"""skip_residual_rms_norm: the Triton kernel and the torch reference against float64."""

from __future__ import annotations

import inspect

import pytest
import torch

from sdfp_vllm.kernels import skip_residual_rms_norm as module
from sdfp_vllm.kernels.skip_residual_rms_norm import reference, skip_residual_rms_norm
from sdfp_vllm.plan.bridge import Bridge
from tests.support.tolerance import close, random_like, strided, unharmed

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["none", "bias", "affine", "low-rank 1", "low-rank 5", "low-rank 64"]
SLOW_KINDS = ("none", "affine", "low-rank 5")
SHAPES = [(1, 64), (3, 96), (5, 96), (123, 96), (1, 4096), (3, 5120)]


def make_bridge(kind: str, hidden: int, dtype: torch.dtype) -> Bridge | None:
    if kind == "none":
        return None
    shift = random_like(hidden, dtype=dtype, seed=10)
    if kind == "bias":
        return Bridge(shift)
    if kind == "affine":
        return Bridge(shift, scale=random_like(hidden, dtype=dtype, seed=11))
    rank = int(kind.split()[1])
    down, up = (random_like(rank, hidden, dtype=dtype, seed=s, scale=hidden**-0.5) for s in (12, 13))
    return Bridge(shift, mean=random_like(hidden, dtype=dtype, seed=14), down=down, up=up)


def in_float64(branch, residual, weight, bridge: Bridge | None, offset: float):
    """The formula, written out; independent of the package's own reference."""
    h = branch.double() + residual.double()
    if bridge is not None:
        b = {k: t.double() for k, t in bridge.tensors().items()}
        if "scale" in b:
            h = h * b["scale"]
        if "down" in b:
            h = h + torch.einsum("th,rh,rk->tk", h - b["mean"], b["down"], b["up"])
        h = h + b["shift"]
    return h / (h.pow(2).mean(1, keepdim=True) + EPS).sqrt() * (weight.double() + offset), h


@pytest.mark.parametrize("op", [skip_residual_rms_norm, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_against_float64(op, rows, hidden, kind, dtype):
    slow = hidden > 1000 or rows > 100
    if slow and op is skip_residual_rms_norm and (kind not in SLOW_KINDS or dtype is torch.float16):
        pytest.skip("seconds under the interpreter; the same code runs at the other shapes")
    (branch, _), (residual, around) = strided(rows, hidden, dtype, 1), strided(rows, hidden, dtype, 2)
    out, around_out = strided(rows, hidden, dtype, 3)
    out.fill_(float("nan"))
    weight = random_like(hidden, dtype=dtype, seed=4)
    bridge = make_bridge(kind, hidden, dtype)
    offset = 1.0 if rows == 3 else 0.0
    normed, h = in_float64(branch, residual, weight, bridge, offset)
    before = branch.clone()
    got = op(branch, residual, weight, EPS, bridge, weight_offset=offset, out=out)
    assert got.data_ptr() == out.data_ptr()
    close(residual, h)
    close(out, normed)
    assert unharmed(around, hidden) and unharmed(around_out, hidden)
    assert torch.equal(branch, before)


def test_float32_bridges_serve_a_half_precision_model():
    branch, residual = (random_like(3, 96, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    weight = random_like(96, dtype=torch.float32, seed=4)
    bridge = make_bridge("low-rank 5", 96, torch.float32)
    normed, h = in_float64(branch, residual, weight, bridge, 0.0)
    close(skip_residual_rms_norm(branch, residual, weight, EPS, bridge), normed)
    close(residual, h)


def test_an_empty_batch_is_nothing():
    empty = torch.empty(0, 96)
    out = skip_residual_rms_norm(
        empty, empty.clone(), torch.ones(96), EPS, make_bridge("bias", 96, torch.float32)
    )
    assert out.shape == (0, 96)


def test_torch_compile_sees_one_op_that_writes_the_residual():
    bridge = make_bridge("affine", 96, torch.float32)

    def enter(branch, residual, weight):
        residual = residual * 1.0
        normed = skip_residual_rms_norm(branch, residual, weight, EPS, bridge)
        return normed, residual

    arguments = [random_like(3, 96, dtype=torch.float32, seed=s) for s in (1, 2)] + [torch.ones(96)]
    compiled = torch.compile(enter, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*arguments), enter(*arguments), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(residual=torch.zeros(2, 96)), r"residual has shape \[2, 96\]"),
        (dict(residual=torch.zeros(3, 96, dtype=torch.float16)), "residual is torch.float16"),
        (dict(residual=torch.zeros(96, 3).T), "residual must be contiguous"),
        (dict(weight=torch.zeros(95)), "weight has shape"),
        (dict(weight=torch.zeros(96, dtype=torch.int32)), "weight is torch.int32"),
        (dict(bridge=Bridge(torch.zeros(95))), "bridge.shift has shape"),
        (dict(bridge=Bridge(torch.zeros(192)[::2])), "bridge.shift must be contiguous"),
        (dict(out=torch.zeros(3, 97)), "out has shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = dict(branch=torch.zeros(3, 96), residual=torch.zeros(3, 96), weight=torch.zeros(96), eps=EPS)
    with pytest.raises(ValueError, match=message):
        skip_residual_rms_norm(**(fits | change))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("h += tl.load(shift_ptr", "h -= tl.load(shift_ptr"),
        ("/ hidden + eps", "/ BLOCK + eps"),
        ("(r[:, None] < RANK) & inside", "(r[:, None] < RANK - 1) & inside"),
        ("centred = h - tl.load(mean_ptr", "centred = h + tl.load(mean_ptr"),
        ("tl.store(own, h.to", "tl.store(own, (h * 1.01).to"),
    ],
)
def test_a_mutated_kernel_fails(wrong, right, tmp_path, monkeypatch):
    """The comparison above can fail: each of these mistakes in the kernel makes it."""
    source = inspect.getsource(module)
    assert source.count(wrong) == 1
    # An op of the same name is registered already.
    source = source.replace(wrong, right).replace("sdfp_vllm::skip", "sdfp_vllm_mutant::skip")
    path = tmp_path / "mutant.py"
    path.write_text(source)
    import importlib.util

    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    with pytest.raises(AssertionError):
        test_against_float64(mutant.skip_residual_rms_norm, 3, 96, "low-rank 5", torch.float32)
