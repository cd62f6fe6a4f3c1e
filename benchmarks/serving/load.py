"""One server at one load, by vLLM's own `vllm bench serve`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.server import Server, tail

# What of its report is kept: throughput, waiting for the first token, time per further token, the whole answer.
KEPT = (
    "output_throughput", "request_goodput", "total_output_tokens", "completed", "duration",
    "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms",
    "median_e2el_ms", "p99_e2el_ms",
)  # fmt: skip
_COUNTERS = ("num_draft_tokens", "num_accepted_tokens", "num_drafts")


def under_load(
    server: Server,
    tokenizer: Path,
    prompts: Sequence[str],
    *,
    concurrency: int | None,
    rate: float,
    tokens: int,
    goodput: str,
    folder: Path,
) -> dict[str, Any]:
    """What `prompts`, each a chat of its own, get from a server.

    Args:
        concurrency: Most requests at once; None for no limit.
        rate: Requests a second, Poisson; infinity for all at once, as far as `concurrency` lets them.
        goodput: Objectives that a request must meet to count, as `--goodput` takes them.
        folder: For the questions and the client's report.
    """
    questions, report = folder / "questions.jsonl", folder / "report.json"
    questions.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", server.url]
    command += ["--model", "target", "--tokenizer", str(tokenizer), "--temperature", "0"]
    command += ["--dataset-name", "custom", "--dataset-path", str(questions), "--skip-chat-template"]
    command += ["--custom-output-len", str(tokens), "--num-prompts", str(len(prompts)), "--disable-shuffle"]
    command += ["--request-rate", str(rate), "--goodput", *goodput.split()]
    command += ["--percentile-metrics", "ttft,tpot,e2el", "--metric-percentiles", "50,99", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", report.name]
    command += ["--max-concurrency", str(concurrency)] if concurrency else []
    before = _counters(server)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve failed:\n{done.stderr[-2000:]}\nserver: {tail(server.log)}")
    told = json.loads(report.read_text())
    if told["completed"] != len(prompts):
        raise RuntimeError(
            f"{told['completed']} of {len(prompts)} requests were answered: {tail(server.log)}"
        )
    after = _counters(server)
    return {k: told[k] for k in KEPT if k in told} | {k: after[k] - before[k] for k in _COUNTERS}


def _counters(server: Server) -> dict[str, float]:
    found = {}
    for name in _COUNTERS:
        try:
            found[name] = server.metric(f"vllm:spec_decode_{name}_total")
        except RuntimeError:  # a server that does not draft has none
            found[name] = 0.0
    return found
