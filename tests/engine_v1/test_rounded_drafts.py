"""Drafts on rounded weights in the engine: exact output, the offline job's drafts, and what is shared and what copied."""

from __future__ import annotations

import gc

import pytest
import torch

from sdfp_vllm.engine.draft.rounded_weights import copy_of
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.rounding import copy_bytes
from sdfp_vllm.plan.schema import DraftHead, StoredView
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests.support.engines import (
    assert_identical,
    engine,
    pacing_by_hand,
    runner,
    spec_counters,
    tokens,
    write_plan,
)
from tests.support.offline_drafts import NEW, K, assert_drafts_are_offline, drafts_of
from tests.support.quantised import quantise
from tests.support.tiny_models import tiny_model

pytestmark = pytest.mark.engine
LAYERS = 16
# Whole layers and lone branches, rounded and not: a rounded branch first and a full one last.
MIXED = DraftView.from_units(
    {
        ("attention", 0): "int8",
        ("attention", 2): "int8",
        ("mlp", 2): "full",
        ("attention", 5): "full",
        ("mlp", 5): "int8",
        ("mlp", 8): "int8",
        ("attention", 14): "int8",
        ("mlp", 14): "int8",
        ("attention", 15): "full",
    }
)
ALL_INT8 = DraftView.at(range(LAYERS), "int8")


def stored(view: KeepSet, head: str = "full", layers: int = LAYERS) -> StoredView:
    return StoredView.of(view, layers, head=DraftHead(precision=head))  # type: ignore[arg-type]


@pytest.mark.parametrize("paced", [False, True], ids=["fixed", "paced"])
def test_greedy_output_is_plain_vllms(target, prompts, plain_tokens, tmp_path, paced):
    pacing = {"pacing": pacing_by_hand(row_ms=0.01)} if paced else {}
    plan = write_plan(target, tmp_path, ALL_INT8, 4, view=stored(ALL_INT8, "int8"), **pacing)
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        got = tokens(llm, prompts)
        counters = spec_counters(llm)
    assert_identical(got, plain_tokens)
    accepted, drafted = counters["num_accepted_tokens"], counters["num_draft_tokens"]
    # Paced drafts are longer, some are copies, and fewer of them are accepted.
    assert (0.2 if paced else 0.5) * drafted < accepted < drafted


def test_drafts_are_the_offline_jobs(target, prompts, plain_tokens, tmp_path):
    """With the arithmetic of the engine's kernels, so what a plan promises is what serving gives."""
    stack = DecoderStack(load_target(target, torch.float32))
    plan = write_plan(target, tmp_path, MIXED, K)
    some = [p for p in prompts if 8 <= len(p) < 100][:4]
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        answers, rounds = drafts_of(llm, some)
    want = [plain_tokens[prompts.index(p)] for p in some]
    assert_identical([[a[0]] for a in answers], [[w[0][:NEW]] for w in want])
    without = KeepSet.from_branches(*([i for b, i in MIXED.units() if b == x] for x in ("attention", "mlp")))
    assert DraftView.of(without) != MIXED
    assert_drafts_are_offline(
        stack, MIXED, {}, some, answers, rounds, other_than=(KeepSet((2, 14)), None), turned=0.1
    )


def test_what_is_shared_is_the_targets_and_what_is_copied_is_counted_to_the_byte(target, prompts, tmp_path):
    plan = write_plan(target, tmp_path, MIXED, 3, view=stored(MIXED, "int8"))
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        tokens(llm, prompts[:2])
        model, draft = runner(llm).model, runner(llm).drafter.model
        copies, expected = {}, 0
        for i, layer in enumerate(model.model.layers):
            for branch, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
                wanted = branch in MIXED.branches(i) and MIXED.precision(i, branch) == "int8"
                for linear in module.modules():
                    held = copy_of(linear)
                    if held is not None:
                        assert wanted, f"{branch} of layer {i} has a copy that no draft uses"
                        copies[id(held)] = held
                        expected += copy_bytes(held.out_features, held.in_features, "int8")
                    elif wanted and hasattr(linear, "quant_method") and hasattr(linear, "prefix"):
                        raise AssertionError(f"{linear.prefix} has no copy")
        assert expected and sum(held.nbytes for held in copies.values()) == expected
        # Norms, attention (with its cache), embedding: the very modules; parameters: the target's own.
        owned = {id(p) for p in model.parameters()}
        assert {id(p) for p in draft.parameters()} <= owned
        ours = {m.layer_name: m for m in draft.modules() if hasattr(m, "layer_name")}
        theirs = {m.layer_name: m for m in model.modules() if hasattr(m, "layer_name")}
        assert ours and all(theirs[name] is module for name, module in ours.items())
        assert ours.keys() == {n for n in theirs if int(n.split(".")[2]) in (0, 2, 5, 14, 15)}


def test_full_precision_by_setting_takes_no_copy(target, prompts, plain_tokens, tmp_path):
    plan = write_plan(target, tmp_path, MIXED, 3, view=stored(MIXED, "int8"))
    with engine(target, {"method": "sdfp", "model": plan, "precision": "full"}) as llm:
        assert_identical(tokens(llm, prompts[:8]), plain_tokens[:8])
        model = runner(llm).model
        assert not any(copy_of(m) for m in model.modules())
        config = llm.llm_engine.vllm_config.speculative_config
        assert config.view == MIXED.keep and config.plan.extra_bytes == 0
    with (
        pytest.raises(SdfpError, match=r"speculative_config\['precision'\].*is 'int8'"),
        engine(target, {"method": "sdfp", "model": plan, "precision": "int8"}),
    ):
        pass


def test_the_precision_is_part_of_the_configs_hash_and_its_repr(target, tmp_path):
    from vllm import EngineArgs

    views = [DraftView.at((2, 14), "full"), DraftView.at((2, 14), "int8"), MIXED]
    configs = []
    for n, view in enumerate(views):
        plan = write_plan(target, tmp_path / str(n), view, K)
        args = EngineArgs(str(target), dtype="float32", speculative_config={"method": "sdfp", "model": plan})
        configs.append(args.create_engine_config().speculative_config)
    assert len({c.compute_hash() for c in configs}) == 3
    assert "2 14, in int8" in repr(configs[1])


def test_a_precision_without_a_kernel_is_refused_before_weights_are_loaded(target, tmp_path):
    plan = write_plan(target, tmp_path, DraftView.at((2, 14), "mxfp4"), 3)
    with (
        pytest.raises(SdfpError, match=r"precision mxfp4: cannot run here.*--precision full"),
        engine(target, {"method": "sdfp", "model": plan}),
    ):
        pass


def test_a_target_that_is_quantised_itself_has_nothing_to_round(target, prompts, tmp_path):
    model = quantise(target, tmp_path / "model", "w8a8")
    plan = write_plan(model, tmp_path / "plan", DraftView.at((2, 14), "int8"), 3)
    with (
        pytest.raises(SdfpError, match=r"has no attention weights that could be rounded.*--precision full"),
        engine(model, {"method": "sdfp", "model": plan}),
    ):
        pass
    with engine(model, {"method": "sdfp", "model": plan, "precision": "full"}) as llm:
        tokens(llm, prompts[:2])
        assert spec_counters(llm)["num_draft_tokens"] > 0


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3_moe", "gemma3_text"])
def test_biases_experts_and_sandwich_norms(architecture, tmp_path):
    """Qwen2's fused q, k, v have a bias; of a mixture of experts attention alone is rounded."""
    sizes = dict(hidden_size=64, intermediate_size=64, head_dim=32, num_attention_heads=2)
    changes = sizes | dict(num_key_value_heads=1, max_position_embeddings=256)
    if architecture == "gemma3_text":
        changes |= dict(query_pre_attn_scalar=32, sliding_window=32)
    else:
        changes |= dict(use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 4)
    if architecture == "qwen3_moe":
        changes |= dict(moe_intermediate_size=64)
    made = tiny_model(architecture, seed=0, **changes)
    if architecture == "qwen2":  # a bias that is missed must be noticed
        with torch.no_grad():
            for layer in made.model.layers:
                layer.self_attn.q_proj.bias.fill_(1.0)
    made.save_pretrained(tmp_path / "model")
    layers = fingerprint(tmp_path / "model").num_layers
    keep = KeepSet.of(range(layers))
    rounded = {u: "int8" for u in keep.units() if u[0] == "attention" or architecture != "qwen3_moe"}
    view = DraftView.at(keep, rounded)  # type: ignore[arg-type]
    plan = write_plan(tmp_path / "model", tmp_path / "plan", view, 3)
    prompts = [[(11 * i + 7 * j) % 57 + 3 for j in range(n)] for i, n in enumerate((2, 9, 33, 70))]
    settings = dict(max_model_len=192, skip_tokenizer_init=True)
    with engine(tmp_path / "model", **settings) as llm:
        want = tokens(llm, prompts)
    with engine(tmp_path / "model", {"method": "sdfp", "model": plan}, **settings) as llm:
        assert_identical(tokens(llm, prompts), want)
        counters = spec_counters(llm)
    # Random weights have no confident choices, yet rounding to 8 bits turns few of them.
    assert counters["num_accepted_tokens"] > 0.6 * counters["num_draft_tokens"]


def test_weights_loaded_anew_reach_the_copies(target, prompts, tmp_path):
    """As reinforcement learning does: other weights under the same names, into the running engine."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    for file in target.iterdir():
        if file.suffix == ".json":
            (other / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: t + 0.02 * t.float().std() * torch.randn(t.shape, generator=generator).to(t.dtype)
        if t.ndim == 2
        else t
        for name, t in load_file(target / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    plan = write_plan(target, tmp_path / "plan", ALL_INT8, 3, view=stored(ALL_INT8, "int8"))
    with engine(
        target
    ) as llm:  # not one started with the others: on a CPU vLLM keeps the tied head of the first
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        want = tokens(llm, prompts[:8])
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        before = tokens(llm, prompts[:8])
        model = runner(llm).model
        linear = model.model.layers[3].mlp.down_proj
        x = torch.randn(4, linear.input_size)
        old = copy_of(linear)(x)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        llm.reset_prefix_cache()
        new = copy_of(linear)(x)
        drafted = spec_counters(llm)["num_draft_tokens"], spec_counters(llm)["num_accepted_tokens"]
        after = tokens(llm, prompts[:8])
        counters = spec_counters(llm)
    assert before != want and not torch.equal(old, new)
    assert_identical(after, want)
    exact = x @ weights["model.layers.3.mlp.down_proj.weight"].float().T
    assert (new - exact).abs().max() < 0.02 * exact.abs().max() < (old - exact).abs().max()
    rate = (counters["num_accepted_tokens"] - drafted[1]) / (counters["num_draft_tokens"] - drafted[0])
    assert rate > 0.6
    gc.collect()
