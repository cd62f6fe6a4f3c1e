"""vLLM-Omni's own selector, base class, diffusers adapter and refresh logic, with the `dipgo` backend in them."""

from __future__ import annotations

import ast
import logging
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from vllm_omni.diffusion.cache import selector
from vllm_omni.diffusion.cache.base import CacheBackend
from vllm_omni.diffusion.cache.teacache import TeaCacheBackend
from vllm_omni.diffusion.data import DiffusionCacheConfig, DiffusionParallelConfig
from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from sdfp_vllm.dipgo import apply_dipgo, omni
from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.pipelines import load_pipeline
from sdfp_vllm.errors import PlanError, SdfpError
from tests.support.tiny_pipelines import STEPS, tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import count_executions, gates_of, make_plan

RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
_UPSTREAM = selector.get_cache_backend


@pytest.fixture(autouse=True)
def registered():
    omni.register()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny DiT, and a plan for it that skips about half of its blocks."""
    folder = tmp_path_factory.mktemp("model")
    sampler = tiny_sampler("dit")
    sampler.pipe.save_pretrained(folder)
    gates = gates_of(sampler, layout_of(sampler.denoiser, "block"))
    return folder, make_plan(sampler, gates, reuse="residual", order=1).save(folder / "plan")


def config(folder, plan, **changes):
    """What the adapter reads of vLLM-Omni's OmniDiffusionConfig."""
    settings = {
        "model": str(folder), "dtype": torch.float32, "output_type": "pt", "model_class_name": "DiTPipeline",
        "cache_backend": "dipgo", "cache_config": {"plan": str(plan)},
        "diffusers_load_kwargs": {"low_cpu_mem_usage": False},
        "diffusers_call_kwargs": {"class_labels": [3]}, "diffusers_pipeline_cls": None,
        "quantization_config": None, "diffusion_offload_config": None,
        "enable_layerwise_offload": False, "enable_cpu_offload": False,
        "vae_use_slicing": False, "vae_use_tiling": False, "enforce_eager": False,
        "enable_diffusion_pipeline_profiler": False, "parallel_config": DiffusionParallelConfig(),
        "diffusion_attention_config": SimpleNamespace(default=SimpleNamespace(backend="TORCH_SDPA")),
    }  # fmt: skip
    return SimpleNamespace(**(settings | changes))


def adapter(folder, plan, **changes):
    loaded = DiffusersAdapterPipeline(od_config=config(folder, plan, **changes), device=torch.device("cpu"))
    loaded.load_weights()
    loaded._pipeline.set_progress_bar_config(disable=True)
    return loaded


def request(steps=STEPS):
    settings = OmniDiffusionSamplingParams(num_inference_steps=steps, seed=3, guidance_scale=3.0)
    return OmniDiffusionRequest(prompt="three", sampling_params=settings, request_id="r")


def generate(pipeline, steps=STEPS):
    return pipeline.forward(DiffusionRequestBatch([request(steps)])).output


def runner_method(name):
    """A method of the real model runner, whose module needs the vLLM of vLLM-Omni's version to be imported."""
    source = Path(sys.modules["vllm_omni"].__path__[0], *RUNNER.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(source.read_text())
    runner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DiffusionModelRunner")
    method = next(n for n in runner.body if isinstance(n, ast.FunctionDef) and n.name == name)
    names = {"logger": logging.getLogger(RUNNER)}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, method], []), RUNNER, "exec"), names)
    return tree, method, names[name]


def test_selector_knows_dipgo_and_still_all_others(model):
    backend = selector.get_cache_backend("dipgo", {"plan": str(model[1])})
    assert isinstance(backend, CacheBackend) and not backend.is_enabled()
    assert isinstance(selector.get_cache_backend("tea_cache", {}), TeaCacheBackend)
    assert selector.get_cache_backend("none", {}) is None
    with pytest.raises(ValueError, match="Unsupported cache backend"):
        selector.get_cache_backend("no_such", {})


def test_registering_again_changes_nothing():
    before = selector.get_cache_backend, DiffusersAdapterPipeline._raise_unsupported_features
    omni.register()
    assert (selector.get_cache_backend, DiffusersAdapterPipeline._raise_unsupported_features) == before
    assert selector.get_cache_backend.__wrapped__ is _UPSTREAM


def test_a_runner_that_was_loaded_before_gets_it_too(monkeypatch):
    runner = ModuleType(RUNNER)
    runner.get_cache_backend = _UPSTREAM
    monkeypatch.setitem(sys.modules, RUNNER, runner)
    omni.register()
    assert runner.get_cache_backend is selector.get_cache_backend


def test_the_real_runner_does_with_a_backend_what_we_rely_on():
    tree, _, _ = runner_method("_refresh_cache_for_requests")
    by_value = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == selector.__name__]
    assert [a.name for n in by_value for a in n.names] == ["get_cache_backend"]
    load = ast.unparse(runner_method("load_model")[1])
    made = "self.cache_backend = get_cache_backend(self.od_config.cache_backend, self.od_config.cache_config)"
    assert made in load and "self.cache_backend.enable(self.pipeline)" in load.split(made)[1]


def test_entry_point_is_the_group_that_vllm_omni_loads():
    from vllm_omni.plugins import OMNI_DEFAULT_PLUGINS_GROUP

    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = project.split(f'[project.entry-points."{OMNI_DEFAULT_PLUGINS_GROUP}"]\n')[1]
    module, name = section.splitlines()[0].split('"')[1].split(":")
    assert getattr(import_module(module), name) is omni.register


@pytest.mark.parametrize("gone", ["selector", "adapter"])
def test_a_symbol_that_is_gone_is_named_and_ends_nothing(gone, monkeypatch, caplog):
    where, name = {
        "selector": (selector, "get_cache_backend"),
        "adapter": (DiffusersAdapterPipeline, "_raise_unsupported_features"),
    }[gone]
    monkeypatch.delattr(where, name)
    with caplog.at_level(logging.ERROR, "sdfp_vllm"):
        omni.register()
    assert name in caplog.text and "0.30.0" in caplog.text


def test_served_images_are_those_of_the_plan_and_units_are_left_out(model):
    folder, plan = model
    pipe = load_pipeline(folder)
    sampler = SimpleNamespace(pipe=pipe, denoiser=pipe.transformer)
    layout = layout_of(pipe.transformer, "block")
    pipe.set_progress_bar_config(disable=True)

    def here():
        return pipe(
            class_labels=[3], num_inference_steps=STEPS, guidance_scale=3.0, output_type="pt",
            generator=torch.Generator().manual_seed(3),
        ).images  # fmt: skip

    full = here()
    apply_dipgo(pipe, plan)
    ran, _ = count_executions(sampler, layout)
    ours = here()
    assert not torch.equal(ours, full)

    served = adapter(folder, plan)
    backend = selector.get_cache_backend("dipgo", {"plan": str(plan)})
    backend.enable(served)
    assert backend.is_enabled()
    counted, _ = count_executions(SimpleNamespace(denoiser=served._pipeline.transformer), layout)
    for _ in range(2):  # the second generation starts anew
        counted.clear()
        backend.refresh(served, STEPS)
        assert torch.equal(generate(served), ours)
        assert counted == ran


def test_warm_up_runs_in_full_and_the_plan_is_back_after_it(model):
    folder, plan = model
    plain = adapter(folder, plan, cache_backend="none")
    served = adapter(folder, plan)
    backend = selector.get_cache_backend("dipgo", {"plan": str(plan)})
    backend.enable(served)
    _, _, refresh = runner_method("_refresh_cache_for_requests")
    runner = SimpleNamespace(cache_backend=backend, pipeline=served)
    settings = config(folder, plan)

    refresh(runner, [request(2)], od_config=settings)
    assert torch.equal(generate(served, 2), generate(plain, 2))
    refresh(runner, [request()], od_config=settings)
    assert not torch.equal(generate(served), generate(plain))
    for steps in (2, 7):
        with pytest.raises(SdfpError, match=f"is for {STEPS} steps, and this request asks for {steps}"):
            refresh(runner, [request(steps)], od_config=settings)


def test_a_request_without_steps_is_refused_at_its_first_denoiser_call(model):
    """The runner cannot tell the backend then, and the pipeline's default is another number."""
    folder, plan = model
    served = adapter(folder, plan)
    selector.get_cache_backend("dipgo", {"plan": str(plan)}).enable(served)
    with pytest.raises(SdfpError, match="does not fit this generation"):
        generate(served, None)


def test_vllm_omnis_own_pipelines_are_refused(model):
    backend = selector.get_cache_backend("dipgo", {"plan": str(model[1])})
    own = type("QwenImagePipeline", (), {"transformer": torch.nn.Linear(1, 1)})()
    with pytest.raises(SdfpError, match=r"QwenImagePipeline is one of vLLM-Omni's own.*load_format"):
        backend.enable(own)
    assert not backend.is_enabled()


@pytest.mark.parametrize("given", [None, {}, {"plan": 3}, DiffusionCacheConfig()])
def test_a_config_without_a_plan_is_refused(given):
    with pytest.raises(SdfpError, match="cache_config names no plan"):
        selector.get_cache_backend("dipgo", given)


def test_a_missing_plan_is_refused_before_weights_are_loaded(model, tmp_path):
    with pytest.raises(PlanError, match="sdfp dipgo search"):
        DiffusersAdapterPipeline(od_config=config(model[0], tmp_path / "none"), device=torch.device("cpu"))


def test_the_adapter_still_refuses_other_backends_and_keeps_our_setting(model):
    with pytest.raises(NotImplementedError, match="tea_cache"):
        DiffusersAdapterPipeline(od_config=config(*model, cache_backend="tea_cache"), device=None)
    settings = config(*model, enforce_eager=True)
    with pytest.raises(NotImplementedError, match="Eager"):
        DiffusersAdapterPipeline(od_config=settings, device=None)
    assert settings.cache_backend == "dipgo"
