"""Fails once vLLM has mended what we mend, so that the mend can go."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.engine


def test_cpu_expand_kernel_still_drops_its_result():
    """`expand_batch_to_tokens` on CPU, float32, as upstream ships it (vLLM #55005).

    When this fails: remove `patches.mend_cpu_expand_kernel` for the versions that work.
    """
    import subprocess
    import sys

    code = """
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
getattr(current_platform, "register_triton_kernel_overrides", lambda: None)()
from vllm.v1.sample import rejection_sampler as r
x = torch.tensor([1.5, 2.5]); cu = torch.tensor([2, 5], dtype=torch.int32)
good = torch.tensor([1.5, 1.5, 2.5, 2.5, 2.5])
results = [torch.equal(r.expand_batch_to_tokens(x, cu, 5), good) for _ in range(5)]
print("MENDED" if all(results) else "BROKEN")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BROKEN" in out.stdout, out.stdout + out.stderr[-2000:]


def test_the_mend_expands():
    from sdfp_vllm.integration.patches import mend_cpu_expand_kernel

    mend_cpu_expand_kernel()
    from vllm.v1.sample import rejection_sampler

    cu = torch.tensor([2, 2, 5], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32, torch.int64):
        x = torch.tensor([1, 7, 0], dtype=dtype)
        got = rejection_sampler.expand_batch_to_tokens(x, cu, 5)
        assert got.dtype == dtype and got.tolist() == [1, 1, 0, 0, 0]
        got = rejection_sampler.expand_batch_to_tokens(x, cu, 5, replace_from=0, replace_to=1)
        assert got.tolist() == [1] * 5
