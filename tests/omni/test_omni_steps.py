"""vLLM-Omni's step-wise execution: its own batches of requests at different steps, with a plan on its Qwen-Image module."""

from __future__ import annotations

import ast
import copy

import pytest
import torch
from vllm_omni.diffusion.cache import selector
from vllm_omni.diffusion.worker.input_batch import InputBatch
from vllm_omni.diffusion.worker.utils import StepRequestState
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from sdfp_vllm.dipgo import omni
from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.errors import SdfpError
from tests.omni.native_modules import GUIDANCE, fresh, own_pipeline, sampler_of, world
from tests.omni.test_omni_backend import runner_method
from tests.support.tiny_pipelines import STEPS
from tests.unit.dipgo.test_dipgo_runtime import gates_of, make_plan

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32; longer rows of padding, sums of another size
WAYS = [("block", "output", 0), ("block", "residual", 1), ("step", "output", 1)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    omni.register()
    with world():
        yield


@pytest.fixture
def sampler():
    return sampler_of("qwen")


def serve(sampler, folder, granularity="block", reuse="residual", order=1):
    """vLLM-Omni's pipeline in step mode with a plan on it."""
    own = own_pipeline("qwen", sampler, folder)
    own.od_config.step_execution = True
    gates = gates_of(sampler, layout_of(sampler.denoiser, granularity), seed=5)
    plan = make_plan(sampler, gates, granularity, reuse, order).save(folder / "plan")
    backend = selector.get_cache_backend("dipgo", {"plan": str(plan)})
    backend.enable(own)
    return own, backend


def request(sampler, number, words=5, rows=1):
    """A request of its own noise and text, as the encoder would leave it."""
    generator = torch.Generator().manual_seed(number)
    (_, yes), (_, no) = sampler.first_calls[0]
    shape = yes["hidden_states"].shape[1:]
    texts = {
        name: call["encoder_hidden_states"].expand(rows, -1, -1)[:, : min(length, words)] * (1 + number)
        for name, call, length in (("prompt_embeds", yes, 5), ("negative_prompt_embeds", no, 3))
    }
    prompt = {
        "latents": torch.randn(rows, *shape, generator=generator), "img_shapes": yes["img_shapes"] * rows,
        "do_true_cfg": True, **texts,
        **{f"{name}_mask": torch.ones(text.shape[:2], dtype=torch.bool) for name, text in texts.items()},
        "txt_seq_lens": [texts["prompt_embeds"].shape[1]] * rows,
        "negative_txt_seq_lens": [texts["negative_prompt_embeds"].shape[1]] * rows,
    }  # fmt: skip
    sampling = OmniDiffusionSamplingParams(num_inference_steps=STEPS, true_cfg_scale=GUIDANCE)
    return StepRequestState(request_id=f"r{number}", sampling=sampling, prompt=prompt)


def alone(own, state):
    """The same request through the loop that serves it by itself."""
    own.scheduler = fresh(own.scheduler)
    own.scheduler.timesteps = own.scheduler.timesteps.clone()
    p = copy.deepcopy(state.prompt)
    return own(
        p["prompt_embeds"], p["prompt_embeds_mask"], p["negative_prompt_embeds"], p["negative_prompt_embeds_mask"],
        p["latents"], p["img_shapes"], p["txt_seq_lens"], p["negative_txt_seq_lens"], own.scheduler.timesteps, True,
        None, GUIDANCE,
    )  # fmt: skip


@torch.inference_mode()
def step(own, states, batch=None):
    """One step as the runner makes it (`_execute_stepwise_core`)."""
    batch = InputBatch.make_batch(states, cached_batch=batch)
    predicted = own.denoise_step(batch, states=states)
    for state, piece in zip(states, predicted.split([len(s.latents) for s in states]), strict=True):
        own.step_scheduler(state, piece)
    return batch


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_requests_at_different_steps_are_as_each_alone(sampler, way, tmp_path):
    own, _ = serve(sampler, tmp_path, *way)
    a, b, c = request(sampler, 0), request(sampler, 1, words=2), request(sampler, 2, words=4, rows=2)
    expected = [alone(own, state) for state in (a, b, c)]
    batch, started = None, set()
    for states in ([b], [a, b], [c, a, b], [a, c, b], [b, c, a], [a, c], [c]):
        for state in states:
            if state.request_id not in started:
                started.add(state.request_id)
                own.prepare_encode(state)
        batch = step(own, states, batch)
    for state, latents in zip((a, b, c), expected, strict=True):
        assert state.denoise_completed
        torch.testing.assert_close(state.latents, latents, **CLOSE)


def test_the_plan_is_what_makes_the_images(sampler, tmp_path):
    own, backend = serve(sampler, tmp_path)
    state = request(sampler, 0)
    planned = alone(own, state)
    backend._skipping.remove()
    assert not torch.allclose(alone(own, state), planned, **CLOSE)


def test_warm_up_runs_in_full_and_others_are_refused_before_they_join(sampler, tmp_path):
    own, _ = serve(sampler, tmp_path)
    times = own.scheduler.timesteps

    def prepared(number, steps):
        state = request(sampler, number)
        own.scheduler.timesteps = times[:steps]
        try:
            own.prepare_encode(state)
        finally:
            own.scheduler.timesteps = times
        return state

    warm_up = prepared(0, 2)
    ran = []
    handles = [
        block.txt_mlp.net[2].register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(own.transformer.transformer_blocks)
    ]
    for _ in range(2):
        step(own, [warm_up])
    assert ran == [0, 1, 2] * 4  # two steps of two calls
    for steps in (2, 3):
        with pytest.raises(SdfpError, match=f"is for {STEPS} steps, and this request asks for {steps}"):
            prepared(1, steps)
    for handle in handles:
        handle.remove()
    prepared(2, STEPS)


def test_the_runner_refuses_cache_backends_by_the_setting_that_is_taken_off(sampler, tmp_path):
    _, method, _ = runner_method("_execute_stepwise")
    said = ast.unparse(method)
    assert "if self.od_config.cache_backend not in (None, 'none'):" in said
    own, backend = serve(sampler, tmp_path)
    assert own.od_config.cache_backend is None and backend.is_enabled()


def test_the_runner_asks_the_pipeline_as_we_rely_on():
    core = ast.unparse(runner_method("_execute_stepwise_core")[1])
    assert "noise_pred = pipeline.denoise_step(input_batch, states=states)" in core
    prepare = runner_method("_prepare_batch_inputs")[1]
    tries = [ast.unparse(ast.Module(n.body, [])) for n in ast.walk(prepare) if isinstance(n, ast.Try)]
    assert any(
        "pipeline.prepare_encode(state)" in body for body in tries
    )  # a refusal ends this request alone
    assert "input_batch = InputBatch.make_batch(prepared_states" in ast.unparse(prepare)
