"""The compiled kernels on a GPU, against the same accounts as under the interpreter. `make test-gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdfp_vllm.kernels.draft_begin import draft_begin
from sdfp_vllm.kernels.draft_step import DraftWorkspace, KvSlots, draft_step
from sdfp_vllm.kernels.embed_rms_norm import embed_rms_norm
from sdfp_vllm.kernels.skip_residual_rms_norm import skip_residual_rms_norm
from sdfp_vllm.plan.bridge import Bridge
from tests.kernels.test_draft_begin import a_round, check_round
from tests.kernels.test_draft_step import a_step, check_step
from tests.kernels.test_skip_residual_rms_norm import EPS, KINDS, in_float64, make_bridge
from tests.support.tolerance import close, random_like

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def moved(value: Any, device: str) -> Any:
    """A copy of `value` with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, KvSlots):
        tables = tuple(t.to(device) for t in value.block_tables)
        return KvSlots(tables, value.block_sizes, value.slot_mapping.to(device))
    return value


@pytest.mark.parametrize(("rows", "all_rows", "groups"), [(1, 1, 1), (13, 300, 3), (0, 4, 1)])
def test_draft_begin(rows: int, all_rows: int, groups: int):
    r = moved(a_round(rows, all_rows, groups), "cuda")
    draft_begin(**r)
    check_round(moved(r, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 100), (37, 9000), (128, 151936)])
def test_draft_step(rows: int, vocab: int, dtype: torch.dtype):
    before = a_step(rows, vocab, dtype=dtype)
    s = moved(before, "cuda")
    draft_step(**s, workspace=DraftWorkspace(rows, vocab, "cuda"))
    check_step(moved(s, "cpu"), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (5, 96), (123, 4096), (3, 5120), (64, 8192)])
def test_skip_residual_rms_norm(rows: int, hidden: int, kind: str, dtype: torch.dtype):
    branch, residual = (random_like(rows, hidden, dtype=dtype, seed=s) for s in (1, 2))
    weight, bridge = random_like(hidden, dtype=dtype, seed=4), make_bridge(kind, hidden, dtype)
    want, stream = in_float64(branch, residual, weight, bridge, 1.0)
    on_gpu = bridge and Bridge(**moved(bridge.tensors(), "cuda"))
    residual = residual.cuda()
    out = skip_residual_rms_norm(branch.cuda(), residual, weight.cuda(), EPS, on_gpu, weight_offset=1.0)
    close(residual.cpu(), stream)
    close(out.cpu(), want)


@pytest.mark.parametrize("hidden", [96, 4096])
def test_embed_rms_norm(hidden: int):
    ids, table = torch.tensor([3, 0, 99, 100, -1]), random_like(100, hidden, dtype=torch.bfloat16, seed=0)
    weight = random_like(hidden, dtype=torch.bfloat16, seed=1)
    out, residual = embed_rms_norm(ids.cuda(), table.cuda(), weight.cuda(), EPS)
    known = torch.where(((ids >= 0) & (ids < 100))[:, None], table[ids.clamp(0, 99)], 0.0)
    assert torch.equal(residual.cpu(), known)
    want = known.double() / (known.double().square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
    close(out.cpu(), want)
