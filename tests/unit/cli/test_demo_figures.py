"""The demo's figures: rates, ratios, kinds of questions; that the table and the picture say what they are."""

import io

import pytest
from rich.console import Console

from sdfp_vllm.demo import picture, report
from sdfp_vllm.demo.figures import by_kind, overall, row
from sdfp_vllm.demo.run import DemoSettings, run_demo
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure.engines import run_engine
from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn, TurnMeasurement
from sdfp_vllm.pacing.record import CONFIDENCE_EDGES, Pacing


def turn(ids, seconds, **drafts) -> TurnMeasurement:
    return TurnMeasurement(token_ids=[ids], texts=["t"], seconds=seconds, decode_seconds=seconds, **drafts)


def measurement(*turns: TurnMeasurement) -> Measurement:
    return Measurement(turns=list(turns), start_seconds=9.0, kv_bytes_per_token=2048.0, vllm_version="0")


A, B = [1, 2, 3, 4, 5], [6, 7, 8, 9, 10]
PLAIN = measurement(turn(A, 0.8), turn(B, 1.2))
DRAFTS = dict(rounds=4, draft_tokens=12, accepted_tokens=6, accepted_per_position=[3, 2, 1])
# SDFP's turns alternate: without copies, with copies.
SDFP = measurement(
    turn(A, 0.4, **DRAFTS), turn(A, 0.2, **DRAFTS), turn(B, 0.8), turn([6, 7, 8, 9, 11], 0.4, **DRAFTS)
)
MEASURED = {"plain": PLAIN, "sdfp": SDFP, "ngram": measurement(turn(A, 0.8), turn(B, 2.4))}


def test_rates_of_a_measurement():
    assert PLAIN.tokens_per_second == pytest.approx(10 / 2.0)
    assert PLAIN.decode_tokens_per_second == pytest.approx(8 / 2.0)
    assert PLAIN.whole.acceptance_rate is None and PLAIN.whole.mean_accepted_length is None
    drafted = SDFP.turns[0]
    assert drafted.acceptance_rate == pytest.approx(0.5)
    assert drafted.mean_accepted_length == pytest.approx(2.5)


def test_a_whole_is_the_sum_of_its_turns():
    paced = turn(A, 0.5, **DRAFTS, paced=[(1, 4, 3, 2), (1, 6, 5, 1)])
    whole = measurement(paced, turn(B, 0.75), paced).whole
    assert (whole.rounds, whole.draft_tokens, whole.accepted_per_position) == (8, 24, [6, 4, 2])
    assert whole.paced == [(1, 4, 3, 4), (1, 6, 5, 2)]
    assert whole.seconds == pytest.approx(0.5 + 0.75 + 0.5)


def test_overall_rows_hold_sdfp_twice_and_count_identical_texts():
    rows = {r["method"]: r for r in overall(MEASURED, None)}
    assert list(rows) == ["plain", "sdfp, no copies", "sdfp", "ngram"]
    assert rows["plain"]["ratio"] == 1.0 and rows["plain"]["acceptance_rate"] is None
    alone, copying = rows["sdfp, no copies"], rows["sdfp"]
    assert alone["ratio"] == pytest.approx(2.0 / 1.2) and copying["ratio"] == pytest.approx(2.0 / 0.6)
    assert (alone["identical_texts"], copying["identical_texts"], copying["texts"]) == (2, 1, 2)
    assert (alone["ratio_least"], alone["ratio_most"]) == (pytest.approx(1.5), pytest.approx(2.0))
    assert copying["acceptance_rate"] == 0.5 and copying["acceptance_by_position"] == [0.75, 0.5, 0.25]


def test_kinds_compare_the_same_questions():
    kinds = by_kind(["mathematics", "summary"], MEASURED)
    ratios = {kind: {r["method"]: r["ratio"] for r in rows} for kind, rows in kinds.items()}
    assert ratios["mathematics"]["sdfp"] == pytest.approx(4.0)
    assert ratios["summary"]["sdfp"] == pytest.approx(3.0)
    assert ratios["summary"]["ngram"] == pytest.approx(0.5)


def test_efficiency_is_the_least_time_of_the_rounds_over_the_time_they_took():
    pacing = Pacing(
        rows=[1, 8], target_ms=[10.0, 17.0], draft_ms=[2.0, 9.0], draft_overhead_ms=5.0, round_overhead_ms=7.0,
        acceptance=[0.5], confidence=[0.5] * (len(CONFIDENCE_EDGES) + 1),
    )  # fmt: skip
    paced = turn(A, 0.1, **DRAFTS, paced=[(1, 4, 3, 2), (1, 1, 0, 1)])
    least = 2 * (13 + 3 * 2) + 10  # milliseconds
    assert row("sdfp", [(paced, PLAIN.turns[0])], pacing)["efficiency"] == pytest.approx(least / 100)


def test_printed_tables_and_picture(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=160)
    rows, kinds = overall(MEASURED, None), by_kind(["mathematics", "summary"], MEASURED)
    report.print_rows(console, "A model, float32", rows)
    report.print_kinds(console, kinds)
    text = out.getvalue()
    for expected in (
        "A model, float32",
        "SDFP as it comes",
        "3.33x",
        "1 of 2",
        "mathematics",
        "4.00x (0.50)",
    ):
        assert expected in text
    if picture.save(tmp_path / "new" / "demo.png", "A model", rows, kinds):
        assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (dict(per_kind=0), "--per-kind"),
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
