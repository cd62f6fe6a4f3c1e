"""`sdfp generate`, as a user starts it: what it asks the model, what it prints while it runs, and how Ctrl-C ends it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import toy
from tests.support.engines import engine, write_plan

pytestmark = pytest.mark.engine

SDFP = str(Path(sys.executable).parent / "sdfp")
SETTINGS = ("--dtype", "float32", "--eager")
KEPT = [0, 5, 15]
RENDERED = "import os\n\n\ndef main("


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> tuple[Path, str]:
    """The toy target with a chat template that makes RENDERED of "main", and a plan for it."""
    folder = tmp_path_factory.mktemp("chatty")
    shutil.copytree(toy.MODEL, folder / "model")
    config = folder / "model" / "tokenizer_config.json"
    template = RENDERED.replace("main", "{{ messages[0]['content'] }}")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    return folder / "model", write_plan(folder / "model", folder / "plan", KEPT, k=3)


@pytest.fixture(scope="module")
def answer() -> str:
    """Plain vLLM's to RENDERED."""
    from vllm import SamplingParams

    with engine(toy.MODEL) as llm:
        [output] = llm.generate([RENDERED], SamplingParams(temperature=0.0, max_tokens=48), use_tqdm=False)
    return output.outputs[0].text


@pytest.mark.parametrize("asked", [("main",), (RENDERED, "--raw", "--no-baseline")], ids=["chat", "raw"])
def test_the_text_answers_the_rendered_chat_or_continues_a_raw_prompt(chatty, answer, asked):
    model, plan = chatty
    prompt, *flags = asked
    done = subprocess.run(
        [
            SDFP,
            "generate",
            model,
            "--prompt",
            prompt,
            "--plan",
            plan,
            "--max-tokens",
            "48",
            *SETTINGS,
            *flags,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer + "\n"
    assert "tokens per verification round" in done.stderr
    assert ("text identical: yes" in done.stderr) == (not flags)


@pytest.mark.more
def test_ctrl_c_in_the_middle_of_the_text_leaves_no_process(chatty):
    model, plan = chatty
    command = [SDFP, "generate", model, "--prompt", "main", "--plan", plan, "--max-tokens", "450", *SETTINGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sdfp:
        assert sdfp.stdout and sdfp.stderr
        assert sdfp.stdout.read(1)
        engines = psutil.Process(sdfp.pid).children(recursive=True)
        assert engines and sdfp.poll() is None, "the text came when it was whole"
        sdfp.send_signal(signal.SIGINT)
        error = sdfp.stderr.read()
        assert sdfp.wait() == 130, error
    assert error.startswith("Interrupted.")
    assert not psutil.wait_procs(engines, timeout=5)[1]
