"""The command's manners: instant help, one line for a refusal, `show` on every kind of argument."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.plan.fingerprint import Fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import Candidate, Prediction, Provenance, SkipPlan, StoredView
from sdfp_vllm.plan.store import save_plan
from sdfp_vllm.plan.window import DraftWindow
from tests.unit.planner.test_search import scores

KEEP = KeepSet((0, 3))


def stored(view: KeepSet, **changes) -> StoredView:
    return StoredView.of(view, 4).model_copy(update=changes)


def point(view: KeepSet, **fields) -> Candidate:
    return Candidate(attention=stored(view).attention, mlp=stored(view).mlp, **fields)


def make(**changes) -> SkipPlan:
    fields = {
        "model": "some/<model>",
        "fingerprint": Fingerprint(
            architecture="LlamaForCausalLM", num_layers=4, hidden_size=8, vocab_size=9, sha256="0" * 64
        ),
        "view": stored(KEEP),
        "num_speculative_tokens": 2,
        "worthwhile": True,
        "prediction": Prediction(acceptance_rate=0.8, mean_accepted_length=2.6, speedup=1.5),
        "scores": scores([3.0, 0.5, 1.0, 2.0]),
        "curve": [
            point(KeepSet((0,)), acceptance=[0.1], speedup=[1.0, 0.7]),
            point(KEEP, acceptance=[0.9, 0.8], speedup=[1.0, 1.2, 1.5]),
        ],
        "made": Provenance(
            calibration="a text",
            calibration_tokens=10,
            seed=3,
            selector="fit-trace",
            created="2030-01-01T00:00:00+00:00",
            sdfp_version="1",
            torch_version="2",
            transformers_version="5",
        ),
    }
    return SkipPlan(**(fields | changes))


@pytest.fixture(name="sdfp")
def _sdfp(tmp_path, monkeypatch):
    monkeypatch.setenv("SDFP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from sdfp_vllm.cli.app import app\n"
        "try: app(['plan', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "print({'torch', 'transformers', 'vllm', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--draft-tokens" in done.stdout and done.stdout.endswith("set()\n")


def test_shows_a_folder_and_a_file(sdfp, tmp_path):
    path = save_plan(make(), tmp_path)
    by_folder, by_file = sdfp("show", tmp_path), sdfp("show", path)
    assert by_folder.exit_code == by_file.exit_code == 0
    assert by_folder.output == by_file.output
    for part in ("2 of 4 layers draft 2 tokens", "1.50x", "0.90 0.80", "0.70x", "a text", "seed 3"):
        assert part in by_folder.output
    kept = [line for line in by_folder.output.splitlines() if "●" in line]
    assert [line.split()[1] for line in kept] == ["0", "3"]


def test_says_plainly_when_nothing_beats_plain_decoding(sdfp, tmp_path):
    save_plan(make(worthwhile=False), tmp_path)
    assert "Nothing beats plain decoding on this machine" in sdfp("show", tmp_path).output


@pytest.mark.parametrize(
    ("argument", "reason"),
    [("nowhere/plan", "neither a plan nor a model"), ("", "no such plan"), ("bad", "not JSON")],
)
def test_a_refusal_is_one_line_and_exit_code_2(sdfp, tmp_path, monkeypatch, argument, reason):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "plan.json").write_text("{")
    result = sdfp("show", tmp_path / argument if argument in ("", "bad") else argument)
    assert result.exit_code == 2 and result.stdout == ""
    assert reason in result.stderr and result.stderr.count("\n") == 1


def test_the_page_escapes_what_it_prints_and_stands_alone(sdfp, tmp_path):
    save_plan(make(), tmp_path)
    assert sdfp("show", tmp_path, "--html", tmp_path / "deep" / "plan.html").exit_code == 0
    page = (tmp_path / "deep" / "plan.html").read_text()
    assert "some/&lt;model&gt;" in page and "<model>" not in page


def test_a_picture_without_matplotlib_names_the_extra(sdfp, tmp_path, monkeypatch):
    save_plan(make(), tmp_path)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    result = sdfp("show", tmp_path, "--png", tmp_path / "plan.png")
    assert result.exit_code == 2 and "sdfp-vllm[plot]" in result.stderr


def test_a_file_that_cannot_be_written_is_refused(sdfp, tmp_path):
    save_plan(make(), tmp_path)
    (tmp_path / "file").touch()
    for flag in ("--png", "--html"):
        result = sdfp("show", tmp_path, flag, Path(tmp_path / "file" / "x"))
        assert result.exit_code == 2 and flag in result.stderr


def test_show_tells_single_branches(sdfp, tmp_path):
    keep = KeepSet((0,), attention=(2,), mlp=(3,))
    curve = [
        point(KeepSet((0,)), acceptance=[0.1], speedup=[1.0, 0.7]),
        point(keep, acceptance=[0.9, 0.8], speedup=[1.0, 1.2, 1.5]),
    ]
    save_plan(make(view=stored(keep), curve=curve), tmp_path)
    shown = sdfp("show", tmp_path, "--html", tmp_path / "page.html", "--png", tmp_path / "page.png")
    assert shown.exit_code == 0, shown.output
    assert "1 + 1 attention + 1 MLP of 4 layers draft 2 tokens" in shown.output
    assert "│ attention │" in shown.output and "│ MLP " in shown.output
    page = (tmp_path / "page.html").read_text()
    assert "<tr class=kept><td>2<td>attention<td>" in page and "<tr class=kept><td>3<td>MLP<td>" in page
    assert "<tr class=kept><td>1 + 1 attention + 1 MLP<td>2<td>" in page


def test_show_tells_how_much_of_a_context_drafts_attend_to(sdfp, tmp_path):
    save_plan(make(), tmp_path)
    assert "attention of drafts" not in sdfp("show", tmp_path).output
    save_plan(make(view=stored(KeepSet((0, 3)), window=DraftWindow(last=1024))), tmp_path)
    assert "to the first 4 and the last 1,024 tokens of a context" in sdfp("show", tmp_path).output
