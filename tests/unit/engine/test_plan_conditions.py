"""A plan that is served under other conditions than it was made for: exact, and said so once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdfp_vllm.common.machine import processor
from sdfp_vllm.engine import config
from tests.support.plans import make_plan


@pytest.mark.parametrize(
    ("planned", "dtype", "eager", "said"),
    [
        ("compiled", torch.float32, False, []),
        ("eager", torch.float32, True, []),
        (None, torch.float32, True, []),  # no engine said what it adds
        ("compiled", torch.float32, True, ["was made for a compiled engine, and this one is eager"]),
        ("eager", torch.float32, False, ["was made for an eager engine, and this one is compiled"]),
        ("compiled", torch.bfloat16, False, ["was made for float32, and the model is served in bfloat16"]),
    ],
)
def test_other_conditions_are_warned_of(monkeypatch, planned, dtype, eager, said):
    told: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *values: told.append(text % values))
    plan = make_plan()
    assert plan.costs is not None and plan.costs.dtype == "float32"
    here = {"engine": planned, "device": f"CPU ({processor()}), oneDNN kernels"}
    plan = plan.model_copy(update={"costs": plan.costs.model_copy(update=here), "worthwhile": True})
    config.warn_of_other_conditions(plan, "PLAN", SimpleNamespace(dtype=dtype, enforce_eager=eager))
    assert len(told) == len(said) and all(s in t for s, t in zip(said, told, strict=True))


def test_another_machine_is_warned_of(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *values: told.append(text % values))
    plan = make_plan()
    plan = plan.model_copy(
        update={
            "costs": plan.costs.model_copy(update={"device": "NVIDIA L4", "engine": None}),
            "worthwhile": True,
        }
    )
    config.warn_of_other_conditions(plan, "PLAN", SimpleNamespace(dtype=torch.float32, enforce_eager=True))
    (line,) = told
    assert "was measured on NVIDIA L4" in line and processor() in line and "--refresh-costs PLAN" in line
