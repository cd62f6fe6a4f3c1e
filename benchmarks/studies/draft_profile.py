"""Where the time of a round of drafting goes in the V1 runner, by what the proposer calls.

The demo target at its full, widened cost and as trained, batch 1, greedy, eager, on this machine's CPU.
Times are wall times of the calls inside `SdfpProposer.propose`, per draft step; "round" is all of
`propose` over its draft steps, so the last column is what is not the model.

    python -m benchmarks.studies.draft_profile [--threads 1] [--tokens 200]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.engine_here import Stopwatch, engines_here
from benchmarks.gpu.engines import make_plan

PARTS = {
    "_forward": "layers and final norm",
    "_sample_draft_tokens": "head and choice",
    "_advance": "positions and slots",
    "_decode_metadata": "metadata of the round",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200)
    asked = parser.parse_args()
    engines_here(asked.threads)
    from tests.toy.scaled import PACKAGED, demo_target

    for name, model in (("as trained", PACKAGED / "model"), ("widened", demo_target())):
        print(json.dumps({"target": name} | profile(model, asked.tokens)))


def profile(model: Path, tokens: int) -> dict[str, Any]:
    """Milliseconds per draft step of each part, and of the whole round; medians over rounds."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(str(model), Path(folder), [0, 5, 10, 15], k=8)  # what the demo's plan keeps
        speculative = {"method": "sdfp", "model": plan}
        llm = LLM(
            str(model),
            dtype="float32",
            max_model_len=512,
            enforce_eager=True,
            distributed_executor_backend="uni",
            kv_cache_memory_bytes=1 << 30,
            speculative_config=speculative,
        )
    watch = Stopwatch(llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter, tuple(PARTS))
    llm.generate(
        ["def main(argv):\n"],
        SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
        use_tqdm=False,
    )
    ms = {name: statistics.median(r[name] for r in watch.rounds) for name in ("round", *PARTS)}
    rest = ms["round"] - sum(ms[part] for part in PARTS)
    shown = {label: round(ms[part], 3) for part, label in PARTS.items()}
    model_share = (ms["_forward"] + ms["_sample_draft_tokens"]) / ms["round"]
    return {
        "rounds": len(watch.rounds),
        "round": round(ms["round"], 3),
        **shown,
        "rest": round(rest, 3),
        "not the model": round(1 - model_share, 3),
    }


if __name__ == "__main__":
    main()
