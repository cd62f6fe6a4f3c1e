"""`sdfp plan --head`, from the command line to the file beside the plan; and what is counted."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.plan.parcel import PLAN_FILE
from sdfp_vllm.plan.schema import DraftHead
from sdfp_vllm.plan.store import load_parcel, load_plan
from sdfp_vllm.planner.calibration import count_tokens, load_calibration
from tests.unit.planner.test_job import SMALL, TEXT, save_tiny


def run(*arguments: object):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])


def test_a_head_is_made_saved_and_shown_and_goes_with_the_next_plan(tmp_path):
    model, text, out = save_tiny(tmp_path / "model"), tmp_path / "calibration.txt", tmp_path / "out"
    text.write_text(TEXT * 600)
    fixed = ["--calibration", text, *SMALL, "--layers", 2, "--draft-tokens", 3]
    made = run("plan", model, *fixed, "--head", 60, "-o", out)
    assert made.exit_code == 0, made.output
    assert "Draft head: 60 of 300 tokens" in made.output
    plan = load_plan(out)
    tokens = load_parcel(out).tokens()
    assert tokens is not None and plan.view.head.tokens == len(tokens) == 60
    assert plan.costs is not None and plan.costs.draft_head is not None
    assert plan.extra_bytes == 60 * 16 * 4  # its rows, at full precision
    tokenizer = load_tokenizer(model)
    assert tokenizer.eos_token_id in tokens
    written = {i for i in tokenizer(TEXT)["input_ids"]}
    assert len(written) < 60 and written <= set(tokens.tolist())  # all of the calibration text's
    assert "60 of 300 tokens" in run("show", out).output

    # A head this small costs nothing beside the engine's own overhead.
    for request in ([], ["--head", "full"]):
        made = run("plan", model, *fixed, *request, "-o", out)
        assert made.exit_code == 0, made.output
        assert load_plan(out).view.head == DraftHead() and [f.name for f in out.iterdir()] == [PLAN_FILE]

    refused = run("plan", model, *fixed, "--head", 300, "-o", tmp_path / "never")
    assert refused.exit_code == 2 and "--head" in refused.output and not (tmp_path / "never").exists()


def test_tokens_are_counted_in_all_text_but_what_is_judged(tmp_path):
    tokenizer = load_tokenizer(save_tiny(tmp_path / "model"))
    source = tmp_path / "text.txt"
    source.write_text("".join(f"line {i} of the text\n" for i in range(3000)))
    settings = dict(length=16, seed=5)
    windows = load_calibration(str(source), tokenizer, sequences=20, **settings).ids
    every = count_tokens(str(source), tokenizer, vocab_size=300, after=0, **settings)
    rest = count_tokens(str(source), tokenizer, vocab_size=300, after=20, **settings)
    judged = torch.bincount(windows.flatten(), minlength=300)
    judged[tokenizer.eos_token_id] = 0  # put between pieces, not in the text
    assert (every - rest >= judged).all() and (rest < every).any()
    ids = tokenizer(source.read_text())["input_ids"]
    assert abs(int(every.sum()) - len(ids)) < 0.05 * len(ids)  # pieces are cut at line ends
    few = count_tokens(str(source), tokenizer, vocab_size=300, after=0, characters=500, **settings)
    assert 0 < few.sum() < 0.1 * every.sum()
