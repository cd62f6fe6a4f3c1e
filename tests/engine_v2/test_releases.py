"""A vLLM whose V2 model runner is another one than we draft in is refused before a weight is read."""

from __future__ import annotations

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs

from sdfp_vllm.engine import register
from sdfp_vllm.engine.upstream import releases
from sdfp_vllm.errors import SdfpError


def test_another_v2_runner_is_refused_with_the_way_to_v1(monkeypatch, target, plan):
    register()
    args = EngineArgs(
        model=str(target), dtype="float32", speculative_config={"method": "sdfp", "model": plan}
    )
    args.create_engine_config()
    monkeypatch.setattr(vllm, "__version__", "{}.{}.0".format(*releases.FIRST))
    with pytest.raises(SdfpError, match=r"another V2 model runner.*VLLM_USE_V2_MODEL_RUNNER=0"):
        args.create_engine_config()


def test_the_table_is_right_for_the_installed_runner():
    releases.refuse_missing.cache_clear()
    releases.refuse_missing("v2")
    releases.refuse_missing("adapters_v2")
