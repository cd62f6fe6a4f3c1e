from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.support.bigram import bigram, exact  # noqa: F401
from tests.support.fixtures import kept, plain_tokens, plan, prompts, target  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def interpretable_log1p() -> Iterator[None]:
    """The interpreter has no CUDA device library, from which vLLM's rejection sampler takes log1p."""
    import triton.language as tl
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    device = rejection_sampler_utils.tldevice
    rejection_sampler_utils.tldevice = SimpleNamespace(log1p=lambda x: tl.log(1.0 + x))
    yield
    rejection_sampler_utils.tldevice = device
