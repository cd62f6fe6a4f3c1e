"""DecoderStack: the parts of every architecture, and logits on a subset of its layers."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.planner.rollout import Continuations, DraftRollout, greedy_continuations
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests.support.tiny_models import (
    ALL_ARCHITECTURES,
    ARCHITECTURES,
    LONE_BRANCHES,
    tiny_config,
    tiny_ids,
    tiny_model,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_branches_partition_every_layer_parameter(architecture):
    stack = DecoderStack(tiny_model(architecture))
    for i, layer in enumerate(stack.layers):
        attention = {id(p) for _, p in stack.attention_parameters(i)}
        mlp = {id(p) for _, p in stack.mlp_parameters(i)}
        assert attention and mlp and not attention & mlp
        assert attention | mlp == {id(p) for p in layer.parameters()}
        assert {id(p) for _, p in stack.layer_parameters(i)} == attention | mlp


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_belong_to_the_branch_they_feed(architecture):
    stack = DecoderStack(tiny_model(architecture))
    names = {n.split(".")[0] for n, _ in stack.attention_parameters(0)}
    expected = {"input_layernorm", "self_attn"}
    if architecture == "gemma3_text":
        expected.add("post_attention_layernorm")
    assert names == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_layers_kept_is_the_model(architecture):
    model = tiny_model(architecture)
    stack, ids = DecoderStack(model), tiny_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(stack.logits(ids, keep=range(stack.num_layers)), expected)
        assert torch.equal(stack.logits(ids), expected)


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_scaled_logits_of_the_head_are_the_models(architecture):
    model, ids = tiny_model(architecture), tiny_ids()
    stack = DecoderStack(model)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(stack.scaled(stack.head(hidden)), model(input_ids=ids).logits)


@pytest.mark.parametrize("keep", [[0, 3], [1, 2], [3], [1], []])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_subset_equals_a_model_built_with_only_those_layers(architecture, keep):
    """The reference is Hugging Face's own shorter model; layer types move with the kept layers."""
    model = tiny_model(architecture)
    stack, ids = DecoderStack(model), tiny_ids()
    shorter = copy.deepcopy(model)
    if getattr(model.config, "layer_types", None):
        shorter.config.layer_types = [model.config.layer_types[i] for i in keep]
        if hasattr(shorter.model, "has_sliding_layers"):
            shorter.model.has_sliding_layers = "sliding_attention" in shorter.config.layer_types
    shorter.model.layers = nn.ModuleList(shorter.model.layers[i] for i in keep)
    shorter.config.num_hidden_layers = len(keep)
    with torch.no_grad():
        expected = shorter(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(stack.logits(ids, keep=keep), expected)
        if len(keep) < stack.num_layers:
            assert not torch.allclose(expected, model(input_ids=ids).logits, atol=1e-3)


def test_subset_equals_a_llama_made_from_a_smaller_config():
    model = tiny_model("llama")
    built = LlamaForCausalLM(tiny_config("llama", num_hidden_layers=2)).eval()
    state = {
        k.replace("layers.1.", "layers.0.").replace("layers.3.", "layers.1."): v
        for k, v in model.state_dict().items()
        if "layers.0." not in k and "layers.2." not in k
    }
    built.load_state_dict(state, strict=True)
    ids = tiny_ids()
    with torch.no_grad():
        torch.testing.assert_close(DecoderStack(model).logits(ids, keep=[1, 3]), built(input_ids=ids).logits)


@pytest.mark.parametrize("architecture", LONE_BRANCHES)
def test_a_lone_branch_adds_what_it_adds_and_the_other_nothing(architecture):
    """The reference is the whole model with the outputs of the branches left out set to zero."""
    model = tiny_model(architecture)
    stack, ids = DecoderStack(model), tiny_ids()
    keep = KeepSet(layers=(0,), attention=(1, 3), mlp=(2,))
    hooks = [
        stack.branch_end(i, branch).register_forward_hook(
            lambda module, args, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0
        )
        for i, branch in ((1, "mlp"), (2, "attention"), (3, "mlp"))
    ]
    with torch.no_grad():
        expected = stack.logits(ids)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(stack.logits(ids, keep), expected)
        assert not torch.allclose(expected, stack.logits(ids), atol=1e-3)
        assert not torch.allclose(expected, stack.logits(ids, [0]), atol=1e-3)
    assert model.model.layers is stack.layers


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3"])
def test_layer_types_change_a_kept_layers_output(architecture):
    """Guards the tests above: sequences are long enough for masks and rotary embeddings to matter."""
    model, ids = tiny_model(architecture), tiny_ids()
    stack = DecoderStack(model)
    with torch.no_grad():
        right = stack.logits(ids, keep=[1])
        model.config.layer_types = ["full_attention", "sliding_attention"] * 2
        assert not torch.allclose(stack.logits(ids, keep=[1]), right, atol=1e-3)


def test_cached_decoding_with_a_subset_keeps_layer_indices():
    """Kept layers read the K/V that the full model wrote at their own index."""
    model, ids = tiny_model("llama"), tiny_ids(1, 8)
    stack = DecoderStack(model)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
        lengths = [cache.get_seq_length(i) for i in range(4)]
        with stack.keeping([0, 2]):
            model(input_ids=ids[:, 7:], past_key_values=cache, use_cache=True)
        assert lengths == [7] * 4 and [cache.get_seq_length(i) for i in range(4)] == [8, 7, 8, 7]


def test_model_is_whole_again_after_an_error():
    model = tiny_model("llama")
    stack = DecoderStack(model)
    with pytest.raises(RuntimeError), stack.keeping([0]):
        raise RuntimeError
    assert model.model.layers is stack.layers


@pytest.mark.parametrize("keep", [[1, 0], [0, 0], [4], [-1]])
def test_bad_keep_is_refused(keep):
    with pytest.raises(SdfpError, match="Name layers 0 to 3"):
        DecoderStack(tiny_model()).logits(tiny_ids(), keep=keep)


def test_other_architectures_are_refused_by_name():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(SdfpError, match="GPT2LMHeadModel"):
        DecoderStack(gpt2)


def test_layer_with_a_stray_parameter_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].gate = nn.Parameter(torch.ones(1))
    with pytest.raises(SdfpError, match=r"'gate' of layer 2"):
        DecoderStack(model)


def test_layers_of_two_kinds_are_refused():
    model = tiny_model("llama")
    model.model.layers[1] = tiny_model("qwen3").model.layers[1]
    with pytest.raises(SdfpError, match="different kinds"):
        DecoderStack(model)


def test_load_target_round_trip(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded, ids = load_target(tmp_path), tiny_ids()
    assert not loaded.training and loaded.dtype is torch.float32
    assert load_target(tmp_path, dtype=torch.bfloat16).dtype is torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_load_target_obeys_gemma_2s_score_cap(tmp_path):
    """Text and K/V come from the model's own attention, drafts from ours, which caps."""
    config = Gemma2Config(**tiny_config("llama").to_dict(), attn_logit_softcapping=0.5)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    stack = DecoderStack(load_target(tmp_path))
    with torch.no_grad():
        for p in stack.model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    text = greedy_continuations(stack, tiny_ids(), 8)
    again = DraftRollout(stack, Continuations(text.ids, text.first, text.ends))
    for ours, theirs in zip(text.full, again.full, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_load_target_refuses_missing_folder(tmp_path):
    with pytest.raises(SdfpError, match="cannot be loaded"):
        load_target(tmp_path / "nowhere")


def test_load_target_refuses_truncated_weights(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SdfpError, match="cannot be loaded"):
        load_target(tmp_path)


def test_load_target_refuses_incomplete_weights(tmp_path):
    """A checkpoint with fewer layers than its config says would be filled with random weights."""
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    LlamaConfig(**tiny_config("llama").to_dict()).save_pretrained(tmp_path)
    with pytest.raises(SdfpError, match="missing or of the wrong shape"):
        load_target(tmp_path)
