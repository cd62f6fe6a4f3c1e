"""A real model, SmolLM2-135M-Instruct, through the whole way: plan, drafts, identity, acceptance as planned, a server's chat."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.demo.questions import OWN
from sdfp_vllm.demo.smollm2 import smollm2
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.schema import SkipPlan
from sdfp_vllm.plan.store import save_plan
from sdfp_vllm.planner.chats import render_chat
from sdfp_vllm.planner.job import make_plan
from tests.support import servers
from tests.support.engines import (
    assert_identical,
    costs_by_hand,
    engine,
    pacing_by_hand,
    spec_counters,
    tokens,
)

pytestmark = [pytest.mark.engine, pytest.mark.more]

SETTINGS = dict(max_model_len=1024, max_num_seqs=16)
CHATS, NEW_TOKENS = 64, 24


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def chats(model) -> list[list[int]]:
    """64 chats of the demo's questions, each asked in three ways."""
    tokenizer = load_tokenizer(model)
    questions = [json.loads(line)["turns"][0] for line in OWN.read_text(encoding="utf-8").splitlines()]
    asked = [
        f"{way}{q}" for way in ("", "In one sentence: ", "Answer as a pirate would. ") for q in questions
    ]
    render = lambda text: render_chat(tokenizer, [{"role": "user", "content": text}], "test").tolist()  # noqa: E731
    return [render(text) for text in asked[:CHATS]]


@pytest.fixture(scope="module")
def plan(model, tmp_path_factory) -> tuple[SkipPlan, Path]:
    """A plan from little text; the machine's own costs decide its precision and length."""
    folder = tmp_path_factory.mktemp("plan")
    made = make_plan(
        str(model), out=folder, dtype="float32", eager=True, sequences=4, text_sequences=6, new_tokens=24,
        precision="int8", head="full", run_check=False, anyway=True,
    )  # fmt: skip
    return made, folder


@pytest.fixture(scope="module")
def plain(model, chats):
    with engine(model, **SETTINGS) as llm:
        return tokens(llm, chats, max_tokens=NEW_TOKENS)


def accepted(llm) -> float:
    counted = spec_counters(llm)
    return counted["num_accepted_tokens"] / counted["num_draft_tokens"]


def test_64_chats_are_plain_vllms_and_accepted_as_planned(model, chats, plan, plain):
    made, folder = plan
    assert made.view.branches.rounded, "a plan of this model rounds its branches"
    with engine(
        model, {"method": "sdfp", "model": str(folder), "num_speculative_tokens": 3}, **SETTINGS
    ) as llm:
        assert_identical(tokens(llm, chats, max_tokens=NEW_TOKENS), plain)
        # Some sixty chats of few tokens against the six that the plan was tried on: wide, yet below what skips alone give.
        assert abs(accepted(llm) - made.prediction.acceptance_rate) < 0.12


def test_64_chats_are_plain_vllms_where_drafts_are_paced(model, chats, plan, plain, tmp_path):
    """With costs by hand at which drafts pay: this machine's may say that at this batch they do not."""
    made, _ = plan
    costs = costs_by_hand(pacing_by_hand(), made.fingerprint.num_layers, made.view.branches)
    save_plan(made.model_copy(update=costs), tmp_path)
    with engine(model, {"method": "sdfp", "model": str(tmp_path)}, **SETTINGS) as llm:
        assert_identical(tokens(llm, chats, max_tokens=NEW_TOKENS), plain)
        assert accepted(llm) > 0.3  # of copies too


def test_a_server_answers_chats_through_the_template(model, plan, tmp_path):
    """`vllm serve` as README has it, asked for a chat; the text is that of a server that drafts nothing."""
    from openai import OpenAI

    made, folder = plan
    assert fingerprint(model) == made.fingerprint
    flags = ("--speculative-model", str(folder), "--max-model-len", "1024", "--served-model-name", "smollm2")
    server, url = servers.start(tmp_path / "log", model, *flags)
    try:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask = lambda **more: client.chat.completions.create(  # noqa: E731
            model="smollm2", messages=[{"role": "user", "content": "Name three rivers of Europe."}], max_tokens=32,
            temperature=0.0, **more,
        ).choices[0].message.content  # fmt: skip
        text = ask()
        assert text and text == ask()
        metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
        drafted = [
            line
            for line in metrics.splitlines()
            if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
        ]
        assert drafted and float(drafted[0].split()[-1]) > 0, "no draft was accepted"
    finally:
        servers.stop(server)
