"""Where Triton is not installed, the kernels' launchers run their torch references."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # what an import of a package that is not there meets
import torch
from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.kernels import draft_begin, draft_step, embed_rms_norm, skip_residual_rms_norm
from sdfp_vllm.kernels.triton_support import HAS_TRITON
assert not HAS_TRITON
h, residual, weight = torch.ones(2, 8), torch.ones(2, 8), torch.ones(8)
out = skip_residual_rms_norm.skip_residual_rms_norm(h, residual, weight, 0.0, Bridge(torch.ones(8)))
assert (residual == 3).all() and torch.allclose(out, torch.ones(2, 8))
out, residual = embed_rms_norm.embed_rms_norm(torch.tensor([1, 0]), 2 * torch.eye(2, 8), weight, 0.0)
assert residual.tolist() == [[0, 2] + 6 * [0], [2] + 7 * [0]]
"""


def test_the_references_take_over():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
