"""Every row of docs/use/limits.md: a start-up error that names the flag or file and the way out.

The model folders here hold a config and no weights, so whatever is refused is refused before
a weight is looked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdfp_vllm.errors import PlanError, SdfpError
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import DraftView
from tests.support.engines import engine, runner, write_plan

pytestmark = pytest.mark.engine


def model_folder(folder: Path, like: Path, **changes: Any) -> Path:
    """A copy of `like` without weights, its config changed."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / name, folder)
    config = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture(scope="module")
def model(target, tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "target", target)


@pytest.fixture(scope="module")
def its_plan(model, tmp_path_factory) -> str:
    return write_plan(model, tmp_path_factory.mktemp("plan"), [0, 1], k=3)


@pytest.fixture(autouse=True)
def no_plans_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))


def configure(model: Path | str, *flags: str) -> Any:
    """What `vllm serve MODEL FLAGS` does up to the engine's configuration, which comes before any weight."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(model), "--dtype", "float32", *flags])
    return EngineArgs.from_cli_args(args).create_engine_config()


def refused(model: Path | str, *flags: str) -> SdfpError:
    with pytest.raises(SdfpError) as caught:
        configure(model, *flags)
    assert str(caught.value) == f"{caught.value.where}: {caught.value.what}. {caught.value.way_out}"
    return caught.value


def test_the_same_command_without_a_mistake_is_taken(model, its_plan):
    config = configure(model, "--speculative-model", its_plan, "--num-speculative-tokens", "2")
    speculative = config.speculative_config
    assert (speculative.method, speculative.view, speculative.num_speculative_tokens) == (
        "sdfp",
        KeepSet((0, 1)),
        2,
    )


# ---------------------------------------------------------------- features of the engine
@pytest.mark.parametrize(
    ("flags", "where", "way_out"),
    [
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size", "--tensor-parallel-size"),
        (
            ["--tensor-parallel-size", "2", "--decode-context-parallel-size", "2"],
            "--decode-context-parallel-size",
            "Leave it at 1",
        ),
        (
            ["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'],
            "--kv-transfer-config",
            "without a KV connector",
        ),
        (["--kv-offloading-size", "1"], "--kv-offloading-size", "Leave it out"),
        (["--enable-lora", "--enable-tower-connector-lora"], "--enable-tower-connector-lora", "Leave it out"),
        (["--enable-return-routed-experts"], "--enable-return-routed-experts", "Leave it off"),
        (["--offload-group-size", "2"], "--offload-group-size", "--cpu-offload-gb"),
        (["--offload-backend", "prefetch"], "--offload-group-size", "--cpu-offload-gb"),
        (["--ubatch-size", "2"], "--enable-dbo", "Leave both out"),
        (["--runner", "pooling"], "--runner", "without SDFP"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else None,
)
def test_feature(model, its_plan, flags, where, way_out):
    error = refused(model, "--speculative-model", its_plan, *flags)
    assert error.where == where and way_out in error.way_out


@pytest.mark.parametrize(
    ("asked", "flag"),
    [
        (dict(enable_eplb=True), "--enable-eplb"),
        (dict(prefill_context_parallel_size=2), "--prefill-context-parallel-size"),
    ],
    ids=["eplb", "prefill context"],
)
def test_feature_that_the_cpu_platform_refuses_by_itself(asked, flag):
    """So the check is asked directly."""
    from types import SimpleNamespace

    from sdfp_vllm.engine.refusals import refuse_unsupported

    parallel = SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=1, **asked)
    with pytest.raises(SdfpError, match=rf"{flag}: cannot be used with SDFP.*Leave it") as caught:
        refuse_unsupported(SimpleNamespace(), SimpleNamespace(), parallel)
    assert caught.value.where == flag


@pytest.mark.parametrize(
    ("experts", "ranks", "is_refused"), [(True, 2, True), (True, 1, False), (False, 2, False)]
)
def test_ranks_of_experts_that_would_wait_for_each_other(experts, ranks, is_refused):
    """vLLM's communicator on a CPU cannot run experts over ranks, so the check is asked directly.

    An idle rank's dummy batch runs one draft forward (`_dummy_run` -> `drafter.dummy_run`), a busy one's as many as it
    drafts; in each, experts of all ranks exchange their rows.
    """
    from types import SimpleNamespace

    from sdfp_vllm.engine.refusals import refuse_unsupported

    asked = (
        SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=ranks),
        SimpleNamespace(is_moe=experts, model="a model"),
    )
    if not is_refused:
        refuse_unsupported(SimpleNamespace(), *reversed(asked))
        return
    with pytest.raises(SdfpError, match=r"--data-parallel-size: .*Use --tensor-parallel-size"):
        refuse_unsupported(SimpleNamespace(), *reversed(asked))


def test_watermarks_are_refused_by_vllm(model, its_plan):
    with pytest.raises(ValueError, match="only autoregressive model-based"):
        configure(model, "--speculative-model", its_plan, "--watermark-config", '{"key": 1}')


def test_logits_processors_are_refused_by_vllm(target, plan):
    processors = ["vllm.v1.sample.logits_processor:MinPLogitsProcessor"]
    speculative = {"method": "sdfp", "model": plan}
    with (
        pytest.raises(ValueError, match="speculative decoding"),
        engine(target, speculative, logits_processors=processors),
    ):
        pass


# ---------------------------------------------------------------- models
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(canvas_length=8), "generates by denoising"),
        (dict(is_encoder_decoder=True), "is an encoder-decoder model"),
        (
            dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])),
            "or uses M-RoPE positions",
        ),
        (
            dict(
                architectures=["MambaForCausalLM"],
                model_type="mamba",
                state_size=16,
                conv_kernel=4,
                expand=2,
                time_step_rank=12,
                use_bias=False,
                use_conv_bias=True,
            ),
            "has layers with recurrent state",
        ),
        (
            dict(
                architectures=["FalconH1ForCausalLM"],
                model_type="falcon_h1",
                mamba_d_ssm=192,
                mamba_n_heads=6,
                mamba_d_head=32,
            ),
            "has layers with recurrent state",
        ),
    ],
    ids=["diffusion", "encoder-decoder", "mrope", "mamba", "hybrid"],
)
def test_model(target, tmp_path, changes, why):
    other = model_folder(tmp_path / "model", target, **changes)
    error = refused(other, "--speculative-model", "sdfp")
    assert error.where == "model" and why in error.what and error.way_out == "Serve it without SDFP."


def test_kept_layer_that_reads_another_layers_kv(target, plan, kept):
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        r = runner(llm)
        context = r.compilation_config.static_forward_context
        name = next(n for n in context if f".{kept[1]}." in n)
        context[name].kv_sharing_target_layer_name = next(iter(context))
        with pytest.raises(SdfpError, match=rf"decoder layer {kept[1]}: reads another layer's K/V"):
            r.drafter.load_model(r.model)


# ---------------------------------------------------------------- settings
@pytest.mark.parametrize("k", ["0", "-1"])
def test_no_draft_tokens(model, its_plan, k):
    error = refused(model, "--speculative-model", its_plan, "--num-speculative-tokens", k)
    assert error.where == "num_speculative_tokens"
    assert f"at least 1, got {k}" in error.what and "use the plan's" in error.way_out


@pytest.mark.parametrize("k", [True, 2.0, "2", [2]])
def test_draft_tokens_of_another_type(model, its_plan, k):
    settings = json.dumps({"method": "sdfp", "model": its_plan, "num_speculative_tokens": k})
    assert "whole number" in refused(model, "--speculative-config", settings).what


def test_more_draft_tokens_than_the_plan_knows(model, its_plan):
    error = refused(model, "--speculative-model", its_plan, "--num-speculative-tokens", "9")
    assert error.where == "num_speculative_tokens"
    assert "at most 8" in error.what and "--draft-tokens 9" in error.way_out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-speculative-tokens", "2"], {"num_speculative_tokens": 2}),
        (["--speculative-model", "sdfp"], {"model": "sdfp"}),
        (["--spec-method", "sdfp"], {"method": "sdfp"}),
    ],
)
def test_setting_given_twice(model, flags, named):
    settings = json.dumps({"method": "sdfp", **named})
    error = refused(model, "--speculative-config", settings, *flags)
    assert error.where == flags[0] and error.way_out == "Give it once."


@pytest.mark.parametrize("model_is", ["sdfp", "a plan"])
def test_another_method_with_our_model(model, its_plan, model_is):
    """Not handed to that method, which may ignore the model and never say so."""
    speculative_model = its_plan if model_is == "a plan" else "sdfp"
    error = refused(model, "--speculative-model", speculative_model, "--spec-method", "ngram")
    assert error.where == "speculative method 'ngram'" and "Leave the method out" in error.way_out


def test_flags_without_sdfp_are_upstreams(model):
    config = configure(model, "--spec-method", "ngram", "--num-speculative-tokens", "2")
    assert config.speculative_config.method == "ngram"


@pytest.mark.parametrize("name", ["draft_tensor_parallel_size", "prompt_lookup_max", "colour"])
def test_setting_without_a_meaning(model, its_plan, name):
    settings = json.dumps({"method": "sdfp", "model": its_plan, name: 1})
    error = refused(model, "--speculative-config", settings)
    assert name in error.where and "num_speculative_tokens" in error.way_out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft_sample_method", "lottery"),
        ("rejection_sample_method", "lottery"),
        ("rejection_sample_method", "synthetic"),  # not on a CPU
        ("num_speculative_tokens_per_batch_size", [[2, 3, 1]]),
        ("num_speculative_tokens_per_batch_size", [[1, 4]]),
        ("num_speculative_tokens_per_batch_size", "often"),
        ("enforce_eager", "perhaps"),
        ("precision", "int8"),
        ("precision", None),
        ("window", 0),
        ("window", "wide"),
        ("window", True),
        ("window", None),
        ("model", 7),
    ],
)
def test_setting_with_a_value_it_cannot_have(model, its_plan, name, value):
    settings = {"method": "sdfp", "model": its_plan, name: value}
    error = refused(model, "--speculative-config", json.dumps(settings))
    assert name in error.where


# ---------------------------------------------------------------- plans
def test_no_plan_yet(model):
    error = refused(model, "--speculative-model", "sdfp")
    assert str(model) in error.where
    assert f"`sdfp plan {model}`" in error.way_out


def test_plan_folder_that_is_not_there(model, tmp_path):
    settings = json.dumps({"method": "sdfp", "model": str(tmp_path / "nowhere")})
    error = refused(model, "--speculative-config", settings)
    assert str(tmp_path / "nowhere") in error.where and "sdfp plan MODEL" in error.way_out


def test_plan_for_another_model(model, target, tmp_path):
    layers = json.loads((target / "config.json").read_text())["num_hidden_layers"] + 1
    other = model_folder(tmp_path / "other", target, num_hidden_layers=layers)
    plan = write_plan(other, tmp_path / "plan", [0, 1], k=2)
    error = refused(model, "--speculative-model", plan)
    assert isinstance(error, PlanError) and plan in error.where
    assert f"num_layers is {layers} in the plan but {layers - 1} in the model" in error.what
    assert "sdfp plan MODEL" in error.way_out


def test_plan_for_other_weights_of_the_same_shape(target, plan, tmp_path):
    """A fine-tune, or another revision: same config, other numbers."""
    tuned = model_folder(tmp_path / "tuned", target)
    weights = bytearray((target / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tuned / "model.safetensors").write_bytes(weights)
    error = refused(tuned, "--speculative-model", plan)
    assert isinstance(error, PlanError) and "sha256 is" in error.what and "num_layers" not in error.what


def test_plan_for_another_revision(model, target, tmp_path, monkeypatch):
    """A model by its id, two revisions in the local cache of Hugging Face, a plan for one of them."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--model"
    for name, digit in (("main", "a"), ("older", "b")):
        snapshot = repository / "snapshots" / (digit * 40)
        model_folder(snapshot, target)
        weights = bytearray((target / "model.safetensors").read_bytes())
        weights[len(weights) // 2] ^= ord(digit)
        (snapshot / "model.safetensors").write_bytes(weights)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(digit * 40)
    plan = write_plan(repository / "snapshots" / ("a" * 40), tmp_path / "plan", [0, 1], k=2)
    config = configure("someone/model", "--speculative-model", plan)
    assert config.speculative_config.method == "sdfp"
    error = refused("someone/model", "--speculative-model", plan, "--revision", "older")
    assert isinstance(error, PlanError) and "sha256 is" in error.what
    assert "`sdfp plan MODEL`" in error.way_out


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[]", "is not a JSON object"),
        (lambda text: text.replace('"schema_version": 3', '"schema_version": 2'), "schema_version"),
        (lambda text: re.sub(r'"attention": \[\s*"full"', '"attention": [-4', text), "view.attention.0"),
        (lambda text: text.replace('"speedup": 1.1', '"speedup": NaN'), "prediction.speedup"),
        (lambda text: text.replace('"worthwhile"', '"worth_while"'), "worth"),
    ],
    ids=["cut", "list", "version", "layer", "nan", "field"],
)
def test_damaged_plan(model, its_plan, tmp_path, damage, says):
    text = (Path(its_plan) / "plan.json").read_text()
    assert damage(text) != text
    (tmp_path / "plan.json").write_text(damage(text))
    error = refused(model, "--speculative-model", str(tmp_path))
    assert isinstance(error, PlanError)
    assert str(tmp_path / "plan.json") in error.where and says in f"{error.where} {error.what}"
    assert "sdfp plan MODEL" in error.way_out


def test_plan_with_a_precision_that_has_no_kernel_here(model, tmp_path):
    """vLLM has no mxfp4 kernel for CPUs; the same branches draft at full precision where that is asked for."""
    plan = write_plan(model, tmp_path, DraftView.at([0, 1], {("mlp", 1): "mxfp4"}), k=2)
    error = refused(model, "--speculative-model", plan)
    assert error.where.endswith("precision mxfp4") and str(model) in error.where
    assert "sdfp plan MODEL" in error.way_out and '{"precision": "full"}' in error.way_out
    settings = {"method": "sdfp", "model": plan, "precision": "full"}
    speculative = configure(model, "--speculative-config", json.dumps(settings)).speculative_config
    assert speculative.view == KeepSet((0, 1)) and speculative.plan.extra_bytes == 0
    settings["precision"] = "planned"
    again = refused(model, "--speculative-config", json.dumps(settings))
    assert str(again) == str(error)


# ---------------------------------------------------------------- as a user meets them
@pytest.mark.parametrize(
    ("speculative", "settings", "says"),
    [
        ({"method": "sdfp"}, {}, r"has no plan yet .*`sdfp plan "),
        ({"method": "sdfp", "num_speculative_tokens": 0}, {}, "num_speculative_tokens: must be"),
        ({"method": "sdfp"}, {"kv_offloading_size": 1}, "--kv-offloading-size: cannot be used with SDFP"),
    ],
)
def test_llm_raises_it_as_it_is(model, its_plan, speculative, settings, says):
    from vllm import LLM

    if "num_speculative_tokens" in speculative:
        speculative = {**speculative, "model": its_plan}
    with pytest.raises(SdfpError, match=says):
        LLM(str(model), dtype="float32", speculative_config=speculative, **settings)


def test_vllm_serve_ends_with_it(model):
    """The last line a user sees is the error, with the command that mends it; nothing stays behind."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    done = subprocess.run(
        [*command, "--dtype", "float32", "--speculative-model", "sdfp"],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "PlanError" in last and f"`sdfp plan {model}`" in last
