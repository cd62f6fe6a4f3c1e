"""Plans on vLLM-Omni's own Qwen-Image, Flux, SD3 and SDXL denoisers: the images of diffusers' hooks, and units left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from vllm_omni.diffusion.cache import selector

from sdfp_vllm.dipgo import apply_dipgo, omni
from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.fingerprint import pipeline_fingerprint
from sdfp_vllm.dipgo.layout import denoiser_of
from sdfp_vllm.dipgo.omni.checkpoint import checkpoint_fingerprint, described
from sdfp_vllm.dipgo.rows import RowSkipping
from sdfp_vllm.errors import PlanError, SdfpError
from tests.omni.native_modules import generate, own_pipeline, sampler_of, theirs, world
from tests.support.tiny_pipelines import STEPS
from tests.unit.dipgo.test_dipgo_runtime import gates_of, make_plan

KINDS = ("qwen", "flux", "sd3", "sdxl")
WAYS = [("block", "output", 0), ("block", "residual", 1), ("step", "output", 1)]
CLOSE = {"rtol": 2e-4, "atol": 2e-4}  # float32, other kernels


@pytest.fixture(scope="module", autouse=True)
def registered():
    omni.register()
    with world():
        yield


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A tiny diffusers pipeline, and vLLM-Omni's with the same weights beside their checkpoint."""
    return made(request.param, tmp_path_factory)


def made(kind, tmp_path_factory):
    sampler = sampler_of(kind)
    return kind, sampler, own_pipeline(kind, sampler, tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return made("qwen", tmp_path_factory)


def plan_of(sampler, granularity="block", reuse="output", order=0, seed=5):
    gates = gates_of(sampler, layout_of(sampler.denoiser, granularity), seed=seed)
    return make_plan(sampler, gates, granularity, reuse, order)


def backend_of(plan, folder):
    return selector.get_cache_backend("dipgo", {"plan": str(plan.save(folder / "plan"))})


def count_own(denoiser, layout):
    """Counts runs below the plan's hooks, in a submodule that only a running unit reaches."""
    ran = Counter()
    for i, module in enumerate(layout.modules(denoiser)):
        # No normalisation, no timestep's embedding: those have no `bias` of two dimensions' layers.
        inner = [m for m in module.modules() if hasattr(m, "quant_method") or isinstance(m, nn.Conv2d)][-1]
        inner.register_forward_hook(lambda *_, i=i: ran.update([i]))
    return ran


def test_the_two_classes_give_the_same_latents(pair):
    kind, sampler, own = pair
    expected = theirs(sampler)
    assert expected.std() > 0.1
    torch.testing.assert_close(generate(kind, own, sampler), expected, **CLOSE)


def test_a_checkpoint_has_the_fingerprint_of_its_loaded_pipeline(pair):
    _, sampler, own = pair
    folder = Path(own.od_config.model)
    modules = described(folder)
    assert all(p.is_meta for p in next(iter(modules.values())).parameters())
    assert checkpoint_fingerprint(folder, modules) == pipeline_fingerprint(sampler.pipe)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_images_are_those_of_diffusers_hooks_and_closed_units_do_not_run(pair, way, tmp_path):
    kind, sampler, own = pair
    if way[1] == "residual" and not layout_of(sampler.denoiser, "block").residual:
        pytest.skip("a U-Net's blocks change their input's shape")
    full = generate(kind, own, sampler)
    plan = plan_of(sampler, *way)
    with apply_dipgo(sampler.pipe, plan):
        expected = theirs(sampler)
    layout = layout_of(sampler.denoiser, way[0])
    backend = backend_of(plan, tmp_path)
    backend.enable(own)
    ran = count_own(denoiser_of(own)[1], layout)
    try:
        for _ in range(2):  # the second begins anew
            ran.clear()
            backend.refresh(own, STEPS)
            torch.testing.assert_close(generate(kind, own, sampler), expected, **CLOSE)
            calls = 1 if kind == "flux" else 2  # guidance in a call of its own; Flux has none here
            assert [ran[i] for i in range(len(layout.units))] == (calls * plan.gates.sum(0)).tolist()
    finally:
        backend._skipping.remove()
    assert not torch.allclose(expected, full, **CLOSE)
    assert torch.equal(generate(kind, own, sampler), full)


@pytest.mark.parametrize("kind", ["qwen", "sd3", "sdxl"])
def test_requests_with_and_without_guidance_take_turns(kind, tmp_path_factory, tmp_path):
    """The calls of a step are counted anew in each generation."""
    kind, sampler, own = made(kind, tmp_path_factory)
    backend = backend_of(plan_of(sampler), tmp_path)
    backend.enable(own)
    guided, bare = generate(kind, own, sampler), generate(kind, own, sampler, guided=False)
    assert not torch.allclose(guided, bare, **CLOSE)
    for _ in range(2):
        assert torch.equal(generate(kind, own, sampler), guided)
        assert torch.equal(generate(kind, own, sampler, guided=False), bare)


def test_a_generation_that_was_broken_off_leaves_nothing_behind(qwen, tmp_path):
    kind, sampler, own = qwen
    backend = backend_of(plan_of(sampler), tmp_path)
    backend.enable(own)
    try:
        whole = generate(kind, own, sampler)
        for calls in (1, 2, 3, 4):
            left = [calls]

            def stop(*_, left=left):
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt

            handle = own.transformer.register_forward_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                generate(kind, own, sampler)
            handle.remove()
            assert torch.equal(generate(kind, own, sampler), whole)
    finally:
        backend._skipping.remove()


def test_warm_up_and_other_numbers_of_steps(qwen, tmp_path):
    kind, sampler, own = qwen
    backend = backend_of(plan_of(sampler), tmp_path)
    full = generate(kind, own, sampler)
    backend.enable(own)
    try:
        backend.refresh(own, 2)
        assert torch.equal(generate(kind, own, sampler), full)
        backend.refresh(own, STEPS)
        assert not torch.allclose(generate(kind, own, sampler), full, **CLOSE)
        with pytest.raises(SdfpError, match=f"is for {STEPS} steps"):
            backend.refresh(own, 2)
    finally:
        backend._skipping.remove()


def test_another_schedule_is_refused_at_the_first_call(qwen, tmp_path):
    kind, sampler, own = qwen
    backend = backend_of(plan_of(sampler), tmp_path)
    backend.enable(own)
    times = own.scheduler.timesteps
    try:
        own.scheduler.timesteps = times * 0.9
        with pytest.raises(SdfpError, match="the timesteps differ"):
            generate(kind, own, sampler)
    finally:
        own.scheduler.timesteps = times
        backend._skipping.remove()


def test_refusals_name_what_does_not_fit(qwen, tmp_path):
    _, sampler, own = qwen
    plan = plan_of(sampler)
    probes = {"probes": [2 * probe for probe in plan.fingerprint.probes]}
    other = plan.model_copy(update={"fingerprint": plan.fingerprint.model_copy(update=probes)})
    with pytest.raises(PlanError, match=r"made for another model.*the weights differ"):
        backend_of(other, tmp_path).enable(own)

    own.od_config.enable_layerwise_offload = True
    with pytest.raises(SdfpError, match="layer-wise offloading"):
        backend_of(plan, tmp_path).enable(own)
    own.od_config.enable_layerwise_offload = False

    with pytest.raises(PlanError, match="has attention, MLP or guidance by itself"):
        backend_of(make_plan(sampler, None, "branch", "residual"), tmp_path).enable(own)

    own.transformer.transformer_blocks.append(nn.Identity())
    with pytest.raises(PlanError, match=r"differ in transformer_blocks\.3"):
        backend_of(plan, tmp_path).enable(own)
    del own.transformer.transformer_blocks[3]

    model, own.od_config.model = own.od_config.model, "nobody/nothing"
    with pytest.raises(SdfpError, match="no folder and not in the hub's cache"):
        backend_of(plan, tmp_path).enable(own)
    own.od_config.model = model

    backend = backend_of(plan, tmp_path)
    backend.enable(own)
    assert isinstance(backend._skipping, RowSkipping)
    backend._skipping.remove()


def test_a_checkpoint_without_diffusers_classes_or_weights_is_refused(tmp_path):
    with pytest.raises(SdfpError, match="no denoiser"):
        described(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(SdfpError, match="NoSuchModel"):
        described(tmp_path)


def test_without_weights_in_safetensors_it_is_refused(qwen, tmp_path):
    _, sampler, _ = qwen
    sampler.denoiser.save_pretrained(tmp_path / "transformer", safe_serialization=False)
    with pytest.raises(SdfpError, match="no safetensors file"):
        checkpoint_fingerprint(tmp_path, described(tmp_path))
