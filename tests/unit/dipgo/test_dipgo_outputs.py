"""The denoiser's outputs as they are heard, and what forecasts of them err by."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.dipgo import outputs as module
from sdfp_vllm.dipgo.forecast import coefficients
from sdfp_vllm.dipgo.outputs import Outputs
from tests.support.tiny_pipelines import tiny_sampler

SEEDS = [11, 12, 13]


def heard(sampler, at_once=None):
    """What it listens to, and all outputs of every step by themselves."""
    sampler.at_once = at_once
    given = []
    handle = sampler.denoiser.register_forward_hook(lambda *call: given.append(call[2][0].clone()))
    with Outputs(sampler).listening() as outputs, torch.no_grad():
        sampler.latents(SEEDS)
    handle.remove()
    branches = sampler.rhythm.branches
    per_run = sampler.calls * branches
    steps = [
        torch.cat([g.flatten() for i, g in enumerate(given) if i % per_run // branches == step])
        for step in range(sampler.calls)
    ]
    return outputs, torch.stack(steps)


@pytest.mark.parametrize("kind", ["dit", "sd", "qwen"])
@pytest.mark.parametrize("at_once", [None, 1])
def test_errors_are_those_of_forecasts_of_all_outputs(kind, at_once):
    outputs, values = heard(tiny_sampler(kind), at_once)
    for kind_, step, computed in (("0", 3, (1, 0)), ("1", 3, (1, 0)), ("2", 4, (3, 1, 0)), ("h", 4, (0,))):
        factors = coefficients(kind_, step, computed)
        error = (
            sum(f * values[s] for f, s in zip(factors, computed[: len(factors)], strict=False)) - values[step]
        )
        assert outputs.errors("absolute")(step, kind_, computed) == pytest.approx(
            float(error.abs().mean()), rel=1e-4
        )
        assert outputs.errors("squared")(step, kind_, computed) == pytest.approx(
            float(error.square().mean()), rel=1e-4
        )


def test_some_elements_stand_for_all(monkeypatch):
    sampler = tiny_sampler("sd")
    everything, _ = heard(sampler)
    monkeypatch.setattr(module, "_PER_ROW", 64)
    some, _ = heard(sampler)
    for step in (2, 4):
        ratio = some.errors("squared")(step, "0", (0,)) / everything.errors("squared")(step, "0", (0,))
        assert ratio == pytest.approx(1, abs=0.3) and ratio != 1


def test_listening_ends():
    sampler = tiny_sampler("dit")
    with Outputs(sampler).listening():
        pass
    assert not sampler.denoiser._forward_hooks
