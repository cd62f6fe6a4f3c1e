"""The cost model: its arithmetic, and that measuring sees what it should."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

from sdfp_vllm.fit.cost import MeasuredCost, measure_cost
from sdfp_vllm.fit.stack import DecoderStack
from sdfp_vllm.integration import cpu_linear
from sdfp_vllm.integration.cpu_linear import engine_linear
from sdfp_vllm.keep import KeepSet


def cost(**changes) -> MeasuredCost:
    fields = {
        "rows": [1, 2, 3, 10],
        "layer": [1.0, 1.5, 2.0, 9.0],
        "attention": [0.25, 0.5, 0.75, 3.0],
        "head": [0.5, 0.5, 1.0, 8.0],
        "num_layers": 4,
        "max_rows": 3,
        "device": "here",
        "dtype": "float32",
        "threads": 1,
        "round_overhead_ms": 1.0,
        "draft_overhead_ms": 0.25,
    }
    fields |= changes
    if len(fields["attention"]) != len(fields["rows"]):  # a test of whole layers does not name it
        fields["attention"] = [ms / 4 for ms in fields["layer"]]
    return MeasuredCost(**fields)


def test_forward_is_linear_between_and_beyond_measured_rows():
    assert cost().forward_ms(4, 1) == 4.5
    assert cost().forward_ms(2, 2) == 3.5
    assert cost().forward_ms(1, 5) == pytest.approx(2 + 2 * 1.0 + 1 + 2 * 1.0)
    assert cost().forward_ms(1, 12) == pytest.approx(11.0 + 10.0)


def test_speedup_is_tokens_over_time():
    # Two draft steps of one layer and the head, verification of 3 rows, overheads.
    assert cost().round_ms(1, 2) == pytest.approx(2 * (1.5 + 0.25) + 9.0 + 1.0)
    assert cost().speedup(1, 2, 2.5) == pytest.approx(2.5 * 5.5 / 13.5)
    assert cost().speedup(3, 0, 1.0) == 1.0


def test_branches_cost_their_share_of_a_layer():
    keep = KeepSet((0,), attention=(1,), mlp=(2, 3))
    assert cost().forward_ms(keep, 1) == pytest.approx(1.0 + 0.25 + 2 * 0.75 + 0.5)
    assert cost().forward_ms(keep, 2) == pytest.approx(1.5 + 0.5 + 2 * 1.0 + 0.5)
    assert cost().round_ms(KeepSet((0, 2)), 2) == cost().round_ms(2, 2)
    whole = KeepSet(attention=(0,)), KeepSet(mlp=(0,))
    assert sum(cost().forward_ms(k, 3) for k in whole) == pytest.approx(cost().forward_ms(1, 3) + 1.0)
    assert cost().speedup(keep, 1, 2.0) == pytest.approx(2 * 5.5 / (3.25 + 0.25 + 6.5 + 1.0))


def test_the_plans_record_holds_the_contiguous_rows():
    model = cost().model()
    assert model.verify_ms == [4.5, 6.5, 9.0]
    assert (model.layer_ms, model.head_ms) == (1.0, 0.5)
    assert (model.attention_ms, model.mlp_ms) == (0.25, 0.75)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_measured(architecture):
    stack = DecoderStack(tiny_model(architecture))
    measured = measure_cost(stack, context=8, max_rows=3, batch_rows=(6,), seconds=0)
    assert measured.rows == [1, 2, 3, 6]
    assert min(measured.layer + measured.head + measured.attention) > 0
    assert all(a < b for a, b in zip(measured.attention, measured.layer, strict=True))
    assert measured.num_layers == stack.num_layers and measured.dtype == "float32"


def test_a_wider_layer_and_a_larger_vocabulary_cost_more():
    shape = {"hidden_size": 256, "head_dim": 64}
    small = DecoderStack(tiny_model("llama", intermediate_size=256, **shape))
    large = DecoderStack(tiny_model("llama", intermediate_size=8192, vocab_size=16384, **shape))
    a, b = (measure_cost(s, context=8, max_rows=2, batch_rows=(), seconds=0.3) for s in (small, large))
    assert b.layer[0] > 2 * a.layer[0]
    assert b.head[0] > 2 * a.head[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_engines_product_is_the_same_product(dtype):
    """On CPUs too where oneDNN has no product of half precision: vLLM falls back there, and so do we."""
    linear = torch.nn.Linear(64, 48, bias=False, dtype=dtype)
    x = torch.randn(5, 64, dtype=dtype)
    near = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(engine_linear(linear)(x), linear(x), atol=near, rtol=near)


def test_where_onednn_has_no_product_torchs_is_measured(monkeypatch):
    class NoProduct:
        @staticmethod
        def create_onednn_mm(weight, cache):
            raise RuntimeError("could not create a primitive descriptor for the matmul primitive")

    monkeypatch.setattr(cpu_linear, "_onednn", lambda: NoProduct)
    linear = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(2, 8)
    assert torch.equal(engine_linear(linear)(x), linear(x))
