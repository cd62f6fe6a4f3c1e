"""Fails once vLLM has mended what we mend, so that the mends can go."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.engine

_UPSTREAM = """
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
getattr(current_platform, "register_triton_kernel_overrides", lambda: None)()
from vllm.v1.sample import rejection_sampler as r
x, cu = torch.tensor([1.5, 2.5]), torch.tensor([2, 5], dtype=torch.int32)
good = torch.tensor([1.5, 1.5, 2.5, 2.5, 2.5])
print("expand", "MENDED" if all(torch.equal(r.expand_batch_to_tokens(x, cu, 5), good) for _ in range(5)) else "BROKEN")
try:
    r.apply_top_k_top_p(torch.empty(0, 8), torch.empty(0, dtype=torch.int32), None)
    print("top_k", "MENDED")
except RuntimeError:
    print("top_k", "BROKEN")
from vllm.lora.ops.torch_ops import lora_ops
out = torch.zeros(1, 2)
lora_ops.bgmv_shrink(torch.ones(1, 3), torch.ones(2, 1, 2, 3), out, torch.tensor([-1]), 1.0)
print("no adapter", "BROKEN" if out.any() else "MENDED")
"""


@pytest.fixture(scope="module")
def upstream() -> str:
    """What vLLM as shipped does on this CPU, in a process that never saw our mends."""
    done = subprocess.run([sys.executable, "-c", _UPSTREAM], capture_output=True, text=True)
    return done.stdout + done.stderr[-2000:]


def test_cpu_expand_kernel_still_drops_its_result(upstream):
    """vLLM #55005. When this fails: drop `patches.mend_cpu_expand_kernel` for the versions that work."""
    assert "expand BROKEN" in upstream, upstream


def test_cpu_top_k_still_raises_on_a_step_without_drafts(upstream):
    """When this fails: drop `patches.mend_cpu_top_k_of_no_rows` for the versions that work."""
    assert "top_k BROKEN" in upstream, upstream


def test_cpu_lora_kernels_still_run_an_adapter_for_rows_without_one(upstream):
    """When this fails: drop `draft/adapter_rows.py`."""
    assert "no adapter BROKEN" in upstream, upstream


def test_rows_without_an_adapter_get_nothing():
    from sdfp_vllm.engine.draft.adapter_rows import mend_cpu_rows_without_adapter

    mend_cpu_rows_without_adapter()
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    index, weights = torch.tensor([-1, 0, 1]), torch.stack([torch.ones(1, 2, 3), 2 * torch.ones(1, 2, 3)])
    for module in (lora_ops, punica_cpu):
        out = torch.zeros(3, 2)
        module.bgmv_shrink(torch.ones(3, 3), weights, out, index, 1.0)
        assert out[:, 0].tolist() == [0, 3, 6]
        module.bgmv_expand(torch.ones(3, 3), weights, out, index, add_inputs=True)
        assert out[:, 0].tolist() == [0, 6, 12]
        module.bgmv_expand_slice(torch.ones(3, 3), weights, out, index, 0, 2, add_inputs=True)
        assert out[:, 1].tolist() == [0, 9, 18]


def test_the_mends_work():
    from sdfp_vllm.engine.patches import mend_cpu_expand_kernel, mend_cpu_top_k_of_no_rows

    mend_cpu_expand_kernel()
    mend_cpu_top_k_of_no_rows()
    from vllm.v1.sample import rejection_sampler

    cu = torch.tensor([2, 2, 5], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32, torch.int64):
        x = torch.tensor([1, 7, 0], dtype=dtype)
        got = rejection_sampler.expand_batch_to_tokens(x, cu, 5)
        assert got.dtype == dtype and got.tolist() == [1, 1, 0, 0, 0]
        got = rejection_sampler.expand_batch_to_tokens(x, cu, 5, replace_from=0, replace_to=1)
        assert got.tolist() == [1] * 5
    none = rejection_sampler.apply_top_k_top_p(torch.empty(0, 8), torch.empty(0, dtype=torch.int32), None)
    assert none.shape == (0, 8)
