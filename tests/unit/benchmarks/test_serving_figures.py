"""Runs under load: which may be claimed, and what is told of them."""

from __future__ import annotations

import copy

import pytest

from benchmarks.serving.__main__ import _loads
from benchmarks.serving.figures import PLAIN, claimed, problems, rows_of


def run(server: str, repeat: int, tokens: float, tpot: float, length: int = 640) -> dict:
    return {
        "server": server,
        "load": "4",
        "repeat": repeat,
        "output_throughput": tokens,
        "mean_tpot_ms": tpot,
        "p99_tpot_ms": 2 * tpot,
        "median_ttft_ms": 9.0,
        "p99_e2el_ms": 99.0,
        "total_output_tokens": length,
        "num_draft_tokens": 0 if server == PLAIN else 50,
        "num_accepted_tokens": 0 if server == PLAIN else 40,
    }


@pytest.fixture
def content() -> dict:
    return {
        "servers": [{"name": n, "settings": ["--max-num-seqs", "8"], "environment": {}} for n in (PLAIN, "SDFP")],
        "loads": [{"load": "4", "repeat": n, "prompts": [f"{n}{i}" for i in range(3)]} for n in (0, 1)],
        "runs": [
            run(PLAIN, 0, 40.0, 50.0),
            run("SDFP", 0, 60.0, 30.0),
            run(PLAIN, 1, 50.0, 40.0),
            run("SDFP", 1, 80.0, 25.0),
        ],
    }  # fmt: skip


def test_ratios_are_to_plain_of_the_same_repeat(content):
    plain, ours = rows_of(content["runs"])
    assert plain["tokens"] == plain["tpot"] == 1.0 and plain["acceptance"] is None
    assert ours["tokens"] == pytest.approx((1.5 * 1.6) ** 0.5, abs=1e-3)
    assert ours["tokens_spread"] == pytest.approx(1.6 / 1.5, abs=1e-3)
    assert ours["tpot"] == pytest.approx((0.6 * 0.625) ** 0.5, abs=1e-3)
    assert ours["acceptance"] == 0.8 and ours["drafted"] == 100


def test_a_ratio_within_the_spread_of_its_repeats_is_not_claimed():
    assert claimed(1.5, 1.1) == "1.50x" and claimed(0.5, 1.5) == "0.50x"
    assert claimed(1.1, 1.2) == "~1 (1.10)" and claimed(0.95, 1.1) == "~1 (0.95)"


def test_a_fair_run_has_no_problems(content):
    assert problems(content) == []


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda c: c["servers"][1].update(settings=["--max-num-seqs", "16"]), "different settings"),
        (lambda c: c["servers"][1].update(environment={"OMP_NUM_THREADS": "2"}), "different settings"),
        (lambda c: c["loads"][1].update(prompts=["00", "x", "y"]), "1 prompts come twice"),
        (lambda c: c["runs"][1].update(total_output_tokens=641), "differ in length"),
        (lambda c: c.update(runs=c["runs"][:2]), "one repeat has no spread"),
    ],
)
def test_an_unfair_run_is_refused_by_what_is_wrong(content, broken, told):
    broken(content)
    assert any(told in p for p in problems(copy.deepcopy(content)))


def test_no_prompt_is_asked_twice_and_every_load_has_enough():
    prompts = [str(i) for i in range(96)]
    loads = _loads(prompts, ["1", "2", "4", "8", "16"], 2, 20.0)
    asked = [t for load in loads for t in load["texts"]]
    assert len(asked) == len(set(asked)) and set(asked) <= set(prompts)
    assert all(len(load["texts"]) >= (load["concurrency"] or 0) for load in loads)
    with pytest.raises(SystemExit, match="too few questions"):
        _loads(prompts[:10], ["8"], 2, 20.0)
