"""A branch is cut only from a layer of known shape."""

from __future__ import annotations

import pytest
from torch import nn

from sdfp_vllm.errors import SdfpError

pytest.importorskip("vllm")
from sdfp_vllm.runtime.branches import AttentionBranch, MlpBranch, branch_of


def layer(*children: str) -> nn.Module:
    module = nn.Module()
    for name in children:
        setattr(module, name, nn.Linear(2, 2))
    return module


PRE_NORM = ("input_layernorm", "self_attn", "post_attention_layernorm")


@pytest.mark.parametrize("feed_forward", ["mlp", "block_sparse_moe"])
def test_branches_share_the_layers_modules(feed_forward):
    whole = layer(*PRE_NORM, feed_forward)
    attention, mlp = branch_of(whole, 3, "attention"), branch_of(whole, 3, "mlp")
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
        branch_of(layer(*children), 3, "attention")
