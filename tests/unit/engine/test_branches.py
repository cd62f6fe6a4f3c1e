"""A branch is cut only from a layer of known shape, and what is rounded is a twin of the target's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import DraftView

pytest.importorskip("vllm")
from sdfp_vllm.engine.draft.branches import AttentionBranch, MlpBranch, seen
from sdfp_vllm.engine.draft.rounded_linear import RoundedLinear
from sdfp_vllm.engine.draft.rounded_weights import _COPY
from sdfp_vllm.engine.draft.twins import copies_of, twin


def layer(*children: str) -> nn.Module:
    module = nn.Module()
    for name in children:
        setattr(module, name, nn.Linear(2, 2))
    return module


PRE_NORM = ("input_layernorm", "self_attn", "post_attention_layernorm")


@pytest.mark.parametrize("feed_forward", ["mlp", "block_sparse_moe"])
def test_branches_share_the_layers_modules(feed_forward):
    whole = layer(*PRE_NORM, feed_forward)
    attention, mlp = seen(whole, 3, KeepSet(attention=(3,))), seen(whole, 3, KeepSet(mlp=(3,)))
    assert isinstance(attention, AttentionBranch) and isinstance(mlp, MlpBranch)
    assert attention.norm is whole.input_layernorm and attention.module is whole.self_attn
    assert mlp.norm is whole.post_attention_layernorm and mlp.module is getattr(whole, feed_forward)


@pytest.mark.parametrize(
    "children",
    [
        (*PRE_NORM, "mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),  # Gemma
        (*PRE_NORM, "mlp", "ada_rms_norm_t_cond"),  # a Mistral that scales by another input
        PRE_NORM,
    ],
)
def test_other_shapes_are_refused_by_name(children):
    with pytest.raises(SdfpError, match=r"decoder layer 3 \(Module\).*--selector fit"):
        seen(layer(*children), 3, KeepSet(attention=(3,)))


def test_a_whole_layer_at_full_precision_is_the_layer_itself():
    for children in ((*PRE_NORM, "mlp"), ("of", "any", "shape")):
        whole = layer(*children)
        assert seen(whole, 3, KeepSet((3,))) is whole


# ---------------------------------------------------------------- twins
class Linear(nn.Linear):
    """Called as a linear of vLLM is: its product is its `quant_method`'s."""

    class Method:
        def apply(self, layer, x, bias=None):
            return nn.functional.linear(x, layer.weight, bias)

    def __init__(self, bias: bool = True):
        super().__init__(32, 32, bias=bias)
        self.quant_method = self.Method()

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias)


def rounding(linear: nn.Module) -> RoundedLinear:
    """As `rounded_weights.take_copy` leaves a linear."""
    made = RoundedLinear(linear.weight.detach(), None, "int8", "here", reference=True)
    linear.__dict__[_COPY] = made
    return made


def block(*names: str) -> nn.Module:
    module = nn.Module()
    for name in names:
        setattr(module, name, Linear())
    return module


def pre_norm_layer(feed_forward: str = "mlp") -> nn.Module:
    made = nn.Module()
    made.input_layernorm, made.post_attention_layernorm = nn.LayerNorm(32), nn.LayerNorm(32)
    made.self_attn = block("qkv_proj", "o_proj")
    setattr(made, feed_forward, block("gate_up_proj", "down_proj"))
    return made


@torch.no_grad()
def test_a_twin_shares_all_but_the_product():
    module = block("qkv_proj", "o_proj")
    copy = rounding(module.qkv_proj)
    made, x = twin(module), torch.randn(3, 32)
    assert made is not module and made.o_proj is module.o_proj
    assert made.qkv_proj is not module.qkv_proj and made.qkv_proj.weight is module.qkv_proj.weight
    torch.testing.assert_close(made.qkv_proj(x), copy(x) + module.qkv_proj.bias)
    assert not torch.equal(made.qkv_proj(x), module.qkv_proj(x))
    assert torch.equal(
        module.qkv_proj(x), nn.functional.linear(x, module.qkv_proj.weight, module.qkv_proj.bias)
    )
    assert list(made.parameters()) == list(module.parameters())  # nothing is the twin's own


def test_nothing_to_round_has_no_twin():
    module = block("qkv_proj", "o_proj")
    assert twin(module) is module


@pytest.mark.parametrize("feed_forward", ["mlp", "block_sparse_moe"])
def test_a_layer_runs_each_branch_at_its_precision(feed_forward):
    whole = pre_norm_layer(feed_forward)
    copies = {name: rounding(linear) for name, linear in whole.named_modules() if isinstance(linear, Linear)}
    ffn = getattr(whole, feed_forward)
    both = seen(whole, 3, DraftView.at(KeepSet((3,)), "int8"))
    assert both.self_attn is not whole.self_attn and getattr(both, feed_forward) is not ffn
    assert both.input_layernorm is whole.input_layernorm
    assert copies_of(both) == sum(copy.nbytes for copy in copies.values())
    one = seen(whole, 3, DraftView.at(KeepSet((3,)), {("attention", 3): "int8"}))
    assert one.self_attn is not whole.self_attn and getattr(one, feed_forward) is ffn
    assert copies_of(one) == copies["self_attn.qkv_proj"].nbytes + copies["self_attn.o_proj"].nbytes
    alone = seen(whole, 3, DraftView.at(KeepSet(mlp=(3,)), "int8"))
    assert isinstance(alone, MlpBranch) and alone.norm is whole.post_attention_layernorm
    assert alone.module is not ffn and copies_of(alone) == copies_of(both) - copies_of(one)
    assert whole.self_attn.qkv_proj.quant_method.__class__ is Linear.Method  # the target is as it was
    assert copies_of(whole) == 0


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_a_branch_without_copies_is_refused_by_name(branch):
    """A quantised model's linears, and experts, are not copied while they are loaded."""
    view = DraftView.at(KeepSet((3,)), {(branch, 3): "int8"})
    with pytest.raises(SdfpError, match=f"decoder layer 3.*no {branch} weights.*int8.*--precision full"):
        seen(pre_norm_layer(), 3, view)
