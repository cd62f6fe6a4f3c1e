"""The demo's figures: rates, ratios, the bound; and that the table says what they are."""

import io

import pytest
from rich.console import Console

from sdfp_vllm.demo import report
from sdfp_vllm.demo.run import DemoSettings, run_demo, time_spread
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure import EngineSpec, Measurement, Turn, TurnMeasurement, run_engine
from sdfp_vllm.pacing.record import CONFIDENCE_EDGES, Pacing
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import Fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import Chances, DraftHead, Prediction, Provenance, SkipPlan, StoredView
from sdfp_vllm.plan.view import DraftView


def measurement(seconds=(1.0, 1.5), decode_seconds=(0.8, 1.2), last=10, **drafts) -> Measurement:
    """Two prompts, a turn each, five tokens each; `drafts` are those of the second."""
    ids = [[1, 2, 3, 4, 5], [6, 7, 8, 9, last]]
    turns = [
        TurnMeasurement(token_ids=[i], texts=[t], seconds=s, decode_seconds=d, **(drafts if t == "b" else {}))
        for i, t, s, d in zip(ids, "ab", seconds, decode_seconds, strict=True)
    ]
    return Measurement(turns=turns, start_seconds=9.0, kv_bytes_per_token=2048.0, vllm_version="0")


DRAFTED = measurement(
    seconds=(0.5, 0.75),
    decode_seconds=(0.4, 0.6),
    last=11,
    rounds=4,
    draft_tokens=12,
    accepted_tokens=6,
    accepted_per_position=[3, 2, 1],
)


def plan(verify_ms: list[float] | None, **changes) -> SkipPlan:
    """Whose full model takes `verify_ms` over 1, 2, ... rows, 1 ms of it in the head; a layer 2 ms at one row."""
    layers = [(ms - 1.0) / 16 for ms in verify_ms or ()]
    columns = {name: {"full": [ms / 2 for ms in layers]} for name in ("attention", "mlp")}
    costs = verify_ms and Costs(
        rows=list(range(1, len(layers) + 1)), **columns, head={"full": [1.0] * len(layers)}, num_layers=16,
        draft_overhead_ms=5.0, round_overhead_ms=7.0, device="cpu", dtype="float32", threads=1,
    )  # fmt: skip
    return SkipPlan(
        model="m",
        fingerprint=Fingerprint(
            architecture="LlamaForCausalLM", num_layers=16, hidden_size=8, vocab_size=8, sha256="0" * 64
        ),
        view=StoredView.of(KeepSet((0, 5, 10, 15)), 16),
        num_speculative_tokens=3,
        worthwhile=True,
        prediction=Prediction(acceptance_rate=0.6, mean_accepted_length=2.8, speedup=1.5),
        scores=[],
        curve=[],
        costs=costs or None,
        made=Provenance(
            calibration="", calibration_tokens=0, seed=0, selector="", created="", sdfp_version="", torch_version="",
            transformers_version="",
        ),
    ).model_copy(update=changes)  # fmt: skip


def test_rates_of_a_measurement():
    plain = measurement()
    assert plain.tokens_per_second == pytest.approx(10 / 2.5)
    assert plain.decode_tokens_per_second == pytest.approx(8 / 2.0)
    assert plain.whole.acceptance_rate is None and plain.whole.mean_accepted_length is None
    assert DRAFTED.whole.acceptance_rate == pytest.approx(0.5)
    assert DRAFTED.whole.mean_accepted_length == pytest.approx(2.5)


def test_a_whole_is_the_sum_of_its_turns():
    turn = DRAFTED.turns[1].model_copy(update={"paced": [(1, 4, 3, 2), (1, 6, 5, 1)]})
    whole = DRAFTED.model_copy(update={"turns": [turn, DRAFTED.turns[0], turn]}).whole
    assert (whole.rounds, whole.draft_tokens, whole.accepted_per_position) == (8, 24, [6, 4, 2])
    assert whole.paced == [(1, 4, 3, 4), (1, 6, 5, 2)]
    assert whole.seconds == pytest.approx(0.75 + 0.5 + 0.75) and whole.texts == ["b", "a", "b"]


def test_bound_is_what_acceptance_and_costs_allow_without_overhead():
    # 2.5 tokens for one verification of 4 rows (41 ms) and 3 drafts of 4 layers and a head (9 ms each)
    drafted = DRAFTED.whole
    measured = plan([33.0, 35.0, 38.0, 41.0])
    assert report.speedup_bound(measured, drafted) == pytest.approx(2.5 * 33 / (41 + 27))
    assert report.speedup_bound(plan([33.0, 35.0]), drafted) is None  # 4 rows were not measured
    assert report.speedup_bound(plan(None), drafted) is None


def test_the_bounds_draft_steps_are_the_views_at_its_precisions():
    measured = plan([33.0, 35.0, 38.0, 41.0])
    assert measured.costs is not None
    shares = {name: {**column, "int8": [ms / 4 for ms in column["full"]]} for name, column in (
        ("attention", measured.costs.attention), ("mlp", measured.costs.mlp))}  # fmt: skip
    costs = measured.costs.model_copy(update={**shares, "draft_head": [0.5] * 4})
    view = StoredView.of(DraftView.at(KeepSet((0, 5), mlp=(10,)), {("mlp", 0): "int8", ("mlp", 10): "int8"}), 16,
        head=DraftHead(precision="int8"))  # fmt: skip
    # A step: 1 + 1/4 ms of layer 0, 2 of layer 5, 1/4 of layer 10's MLP, half a ms of the head.
    rounded = measured.model_copy(update={"view": view, "costs": costs})
    assert report.speedup_bound(rounded, DRAFTED.whole) == pytest.approx(2.5 * 33 / (41 + 3 * 4.0))


def test_bound_of_paced_rounds_counts_the_work_that_was_done():
    pacing = Pacing(
        rows=[1, 8], target_ms=[10.0, 17.0], draft_ms=[2.0, 9.0], draft_overhead_ms=5.0, round_overhead_ms=7.0,
        acceptance=[0.5], confidence=[0.5] * (len(CONFIDENCE_EDGES) + 1),
    )  # fmt: skip
    paced = DRAFTED.whole.model_copy(update={"paced": [(1, 4, 3, 2), (1, 1, 0, 1)]})
    least = 2 * (13 + 3 * 2) + 10
    costs = Costs(
        rows=pacing.rows, attention={"full": [0.0, 0.0]}, mlp={"full": [0.0, 0.0]}, head={"full": pacing.target_ms},
        draft_head=pacing.draft_ms, num_layers=16, draft_overhead_ms=5.0, round_overhead_ms=7.0,
        device="cpu", dtype="float32", threads=1,
    )  # fmt: skip
    chances = Chances(acceptance=pacing.acceptance, confidence=pacing.confidence)
    planned = plan(None, costs=costs, chances=chances)
    assert planned.pacing == pacing
    assert report.speedup_bound(planned, paced) == pytest.approx(8 * 10 / least)
    # Without chances nothing is paced: the bound is that of the plan's own draft length.
    assert report.speedup_bound(plan(None, costs=costs), paced) == pytest.approx(2.5 * 10 / (13 + 3 * 2))


def test_comparison_of_plan_and_measurement():
    c = report.compare(plan([33.0, 35.0, 38.0, 41.0]), measurement(), DRAFTED)
    assert c.measured_speedup == pytest.approx(2.0)
    assert c.bound and c.efficiency == pytest.approx(2.0 / c.bound)
    assert (c.predicted_acceptance, c.measured_acceptance) == (0.6, 0.5)
    with pytest.raises(SdfpError, match="drafted no token"):
        report.compare(plan(None), measurement(), measurement())


def test_rows_count_identical_texts_and_extra_memory():
    plain, sdfp = report.rows({"plain": measurement(), "sdfp": DRAFTED}, {"draft_model": 3})
    assert (plain["ratio_to_plain"], plain["identical_texts"], plain["acceptance_rate"]) == (1.0, 2, None)
    assert (sdfp["ratio_to_plain"], sdfp["identical_texts"], sdfp["extra_weight_bytes"]) == (2.0, 1, 0)
    assert (
        report.rows({"plain": measurement(), "draft_model": DRAFTED}, {"draft_model": 3})[1][
            "extra_weight_bytes"
        ]
        == 3
    )


def test_printed_table_and_picture(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=160)
    results = {"plain": measurement(), "sdfp": DRAFTED}
    report.print_table(console, "Cost-scaled demo", report.rows(results, {}))
    report.print_comparison(console, report.compare(plan([33.0, 35.0, 38.0, 41.0]), measurement(), DRAFTED))
    text = out.getvalue()
    for expected in (
        "Cost-scaled demo",
        "2.00x",
        "0.500",
        "2.50",
        "1 of 2",
        "yes",
        "2.0 KiB",
        "at most 1.21x",
        "efficiency 1.65",
    ):
        assert expected in text
    if report.save_picture(tmp_path / "new" / "demo.png", "Cost-scaled demo", results):
        assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_time_spread():
    assert time_spread(measurement()) == pytest.approx(0.4 / 1.0)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (dict(prompts=0), "--prompts"),
        (dict(prompt_tokens=500), "--prompt-tokens"),
        (dict(new_tokens=1), "--new-tokens"),
        (dict(methods=("plain", "magic")), "magic"),
        (dict(methods=("sdfp",)), "plain is missing"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, flag):
    with pytest.raises(SdfpError, match=flag):
        run_demo(DemoSettings(**settings), Console(file=io.StringIO()))


@pytest.mark.engine
def test_an_engine_that_fails_says_why(tmp_path):
    spec = EngineSpec(
        model=str(tmp_path / "no-model"), turns=[Turn(prompts=[[1]], max_tokens=2)], warm_up=[1]
    )
    with pytest.raises(SdfpError, match=r"plain decoding.*no-model(?s:.*)exit status 1"):
        run_engine(spec)
