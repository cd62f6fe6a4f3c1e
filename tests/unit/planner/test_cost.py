"""The cost model: its arithmetic, and that measuring sees what it should."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.engine.draft import cpu_linear
from sdfp_vllm.engine.draft.cpu_linear import engine_linear
from sdfp_vllm.engine.draft.rounded_linear import refusal
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.cost import measure_costs
from sdfp_vllm.planner.rounded import usable_precisions
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.tiny_models import ARCHITECTURES, tiny_model


def cost(**changes) -> Costs:
    """`layer` and `attention` are times at full precision, the MLP takes the rest; `rounded` a precision's share of them."""
    fields = {
        "rows": [1, 2, 3, 10],
        "layer": [1.0, 1.5, 2.0, 9.0],
        "attention": [0.25, 0.5, 0.75, 3.0],
        "head": [0.5, 0.5, 1.0, 8.0],
        "rounded": {},
        "num_layers": 4,
        "device": "here",
        "dtype": "float32",
        "threads": 1,
        "round_overhead_ms": 1.0,
        "draft_overhead_ms": 0.25,
    }
    fields |= changes
    layer, attention, head = (fields.pop(name) for name in ("layer", "attention", "head"))
    if len(attention) != len(fields["rows"]):  # a test of whole layers does not name it
        attention = [ms / 4 for ms in layer]
    mlp = [whole - part for whole, part in zip(layer, attention, strict=True)]
    shares = {"full": 1.0, **fields.pop("rounded")}
    for name, column in (("attention", attention), ("mlp", mlp), ("head", head)):
        fields[name] = {p: [share * ms for ms in column] for p, share in shares.items()}
    return Costs(**fields)


def first(layers: int) -> KeepSet:
    return KeepSet.of(range(layers))


def test_forward_is_linear_between_and_beyond_measured_rows():
    assert cost().target_ms(1) == 4.5
    assert cost().step_ms(first(2), 2) == 3.5
    assert cost().step_ms(first(1), 5) == pytest.approx(2 + 2 * 1.0 + 1 + 2 * 1.0)
    assert cost().step_ms(first(1), 12) == pytest.approx(11.0 + 10.0)
    assert cost().target_ms(5) == pytest.approx(4 * 4.0 + 3.0)


def test_speedup_is_tokens_over_time():
    # Two draft steps of one layer and the head, verification of 3 rows, overheads.
    assert cost().round_ms(first(1), 2) == pytest.approx(2 * (1.5 + 0.25) + 9.0 + 1.0)
    assert cost().speedup(first(1), 2, 2.5) == pytest.approx(2.5 * 5.5 / 13.5)
    assert cost().speedup(first(3), 0, 1.0) == 1.0


def test_branches_cost_their_share_of_a_layer():
    keep = KeepSet((0,), attention=(1,), mlp=(2, 3))
    assert cost().step_ms(keep, 1) == pytest.approx(1.0 + 0.25 + 2 * 0.75 + 0.5)
    assert cost().step_ms(keep, 2) == pytest.approx(1.5 + 0.5 + 2 * 1.0 + 0.5)
    assert cost().round_ms(KeepSet((0, 2)), 2) == cost().round_ms(first(2), 2)
    whole = KeepSet(attention=(0,)), KeepSet(mlp=(0,))
    assert sum(cost().step_ms(k, 3) for k in whole) == pytest.approx(cost().step_ms(first(1), 3) + 1.0)
    assert cost().speedup(keep, 1, 2.0) == pytest.approx(2 * 5.5 / (3.25 + 0.25 + 6.5 + 1.0))


def test_the_plans_record_is_the_costs_themselves():
    measured = cost(rounded={"int8": 0.5}, draft_head=[0.25] * 4)
    assert Costs.model_validate_json(measured.model_dump_json()) == measured
    assert [measured.target_ms(m) for m in (1, 2, 3)] == [4.5, 6.5, 9.0]
    assert (measured.attention["full"][0], measured.mlp["full"][0], measured.head["full"][0]) == (
        0.25,
        0.75,
        0.5,
    )
    assert measured.attention["int8"] == [0.125, 0.25, 0.375, 1.5]


def test_each_branch_costs_what_its_precision_does():
    measured = cost(rounded={"int8": 0.5, "int4": 0.25})
    assert measured.precisions == ["full", "int8", "int4"]
    whole = DraftView.at(first(4), "int8")
    assert measured.layers_ms(whole, 1) == pytest.approx(2.0)
    assert measured.layers_ms(whole, 3) == pytest.approx(4.0)
    mixed = DraftView.at(
        KeepSet((0, 1), mlp=(2,)), {("attention", 0): "int8", ("mlp", 0): "int4", ("mlp", 2): "int8"}
    )
    want = (0.125 + 0.75 / 4) + 1.0 + 0.375
    assert measured.layers_ms(mixed, 1) == pytest.approx(want)
    assert measured.step_ms(mixed, 1) == pytest.approx(want + 0.5)  # the head is the full one
    assert measured.target_ms(1) == cost().target_ms(1)  # the target does not round
    assert measured.layers_ms(DraftView.of(first(2)), 2) == measured.layers_ms(first(2), 2)


def test_what_the_engine_adds_to_a_layer_is_paid_by_target_and_draft():
    measured = cost(layer_overhead_ms=0.5, rounded={"int8": 0.5})
    assert measured.target_ms(1) == pytest.approx(4.5 + 4 * 0.5)
    assert measured.layers_ms(first(2), 1) == pytest.approx(2 * 1.5)
    assert measured.layers_ms(DraftView.at(first(2), "int8"), 1) == pytest.approx(2 * 1.0)
    assert measured.layers_ms(KeepSet(attention=(0,)), 1) == pytest.approx(
        0.25 + 0.25
    )  # half of it for a branch
    assert measured.plain_ms() == pytest.approx(6.5 + 1.0)


def test_a_draft_head_stands_in_for_the_full_one_in_draft_steps_alone():
    measured = cost(draft_head=[0.125, 0.25, 0.25, 1.0])
    assert measured.step_ms(first(1), 1) == pytest.approx(1.125)
    assert measured.step_ms(first(1), 2) == pytest.approx(1.75)
    assert measured.target_ms(1) == 4.5
    assert measured.round_ms(first(1), 2) == pytest.approx(2 * (1.125 + 0.25) + 9.0 + 1.0)
    assert cost(draft_head=[0.0] * 4).step_ms(first(1), 1) == 1.0


def test_bridges_are_reckoned_with_over_every_run_that_could_be_skipped():
    measured = cost(bridge_ms=0.125)
    assert measured.step_ms(first(1), 1) == pytest.approx(1.5 + 2 * 0.125)
    assert measured.step_ms(first(3), 1) == pytest.approx(3.5 + 0.125)  # one layer is left out: one run


def test_the_bound_is_the_speedup_were_all_drafts_accepted():
    measured = cost()
    by_hand = [measured.speedup(first(1), k, k + 1) for k in (1, 2, 3)]
    assert measured.bound(first(1), 3) == max(by_hand)
    assert measured.bound(first(1), 1) == by_hand[0] == pytest.approx(2 * 5.5 / (1.75 + 6.5 + 1.0))


def test_draft_steps_are_padded_to_the_rows_that_are_fastest():
    slow = cost(layer=[1.0, 3.0, 2.0, 9.0], attention=[0.25, 0.75, 0.5, 2.25])
    assert slow.draft_ms(first(2), batch=2) == pytest.approx(slow.step_ms(first(2), 3) + 0.25)
    assert slow.draft_ms(first(2)) == pytest.approx(slow.step_ms(first(2), 1) + 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [2, 3, 4, 10]}, "rows must ascend from 1"),
        ({"rows": [1, 3, 2, 10]}, "rows must ascend from 1"),
        ({"draft_head": [1.0]}, "draft_head needs one time for each of rows"),
        ({"round_overhead_ms": -1.0}, "round_overhead_ms"),
        ({"num_layers": 0}, "num_layers"),
        ({"rounded": {"int3": 0.5}}, "int3"),
        ({"layer": [1.0, 1.5, float("nan"), 9.0]}, "finite"),
    ],
)
def test_costs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cost(**changes)


@pytest.mark.parametrize("branch", ["attention", "mlp", "head"])
def test_every_branch_has_a_time_for_each_row_and_one_at_full_precision(branch):
    good = cost(rounded={"int8": 0.5}).model_dump()
    with pytest.raises(ValueError, match=f"{branch} must have the times at full precision"):
        Costs(**good | {branch: {"int8": good[branch]["int8"]}})
    with pytest.raises(ValueError, match=f"{branch} needs one time for each of rows"):
        Costs(**good | {branch: good[branch] | {"int8": [1.0]}})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_measured(architecture):
    stack = DecoderStack(tiny_model(architecture))
    measured = measure_costs(stack, context=8, max_rows=3, batch_rows=(6,), seconds=0)
    assert measured.rows == [1, 2, 3, 6]
    columns = measured.attention, measured.mlp, measured.head
    assert all(set(column) == {"full"} and min(column["full"]) > 0 for column in columns)
    assert measured.num_layers == stack.num_layers and measured.dtype == "float32"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_precision_asked_for_is_measured_where_there_is_something_to_round(architecture):
    if why := refusal("int8", torch.float32, 64, 64):
        pytest.skip(why)
    stack = DecoderStack(tiny_model(architecture))
    precisions = usable_precisions([torch.empty(64, 64)], torch.float32, "int8")
    measured = measure_costs(stack, precisions=precisions, context=8, max_rows=2, batch_rows=(), seconds=0)
    columns = measured.attention, measured.mlp, measured.head
    assert all(list(column) == ["full", "int8"] and min(column["int8"]) > 0 for column in columns)
    experts = architecture in ("gpt_oss", "mixtral", "qwen3_moe")
    assert (
        measured.mlp["int8"] == measured.mlp["full"]
    ) == experts  # they run as they are, and cost what they do
    assert stack.can_round("attention") and stack.can_round("mlp") != experts


def test_a_wider_layer_and_a_larger_vocabulary_cost_more():
    shape = {"hidden_size": 256, "head_dim": 64}
    small = DecoderStack(tiny_model("llama", intermediate_size=256, **shape))
    large = DecoderStack(tiny_model("llama", intermediate_size=8192, vocab_size=16384, **shape))
    a, b = (measure_costs(s, context=8, max_rows=2, batch_rows=(), seconds=0.3) for s in (small, large))
    assert b.layers_ms(first(1), 1) > 2 * a.layers_ms(first(1), 1)
    assert b.head["full"][0] > 2 * a.head["full"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_engines_product_is_the_same_product(dtype):
    """On CPUs too where oneDNN has no product of half precision: vLLM falls back there, and so do we."""
    linear = torch.nn.Linear(64, 48, bias=False, dtype=dtype)
    x = torch.randn(5, 64, dtype=dtype)
    near = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(engine_linear(linear.weight)(x), linear(x), atol=near, rtol=near)


def test_where_onednn_has_no_product_torchs_is_measured(monkeypatch):
    class NoProduct:
        @staticmethod
        def create_onednn_mm(weight, cache):
            raise RuntimeError("could not create a primitive descriptor for the matmul primitive")

    monkeypatch.setattr(cpu_linear, "_onednn", lambda: NoProduct)
    linear = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(2, 8)
    assert torch.equal(engine_linear(linear.weight)(x), linear(x))
