"""How many sampled drafts are accepted under a top-k and top-p: drafts that follow these, and that do not.

The demo target as trained and the layers that its plan keeps, three drafts a round, 64 held-out prompts of
128 tokens, 128 tokens each. Nothing is timed, so any machine gives about the same figures.

    python -m benchmarks.studies.draft_cuts [--top-k 20] [--top-p 0.9] [--temperatures 0.7 0.85 1.0]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.engine_here import acceptance, draft_counts, engines_here
from benchmarks.gpu.engines import make_plan

LENGTH, DRAFTS = 128, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top-k", type=int, default=20, help="0: none.")
    parser.add_argument("--top-p", type=float, default=0.9, help="1: none.")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.85, 1.0])
    asked = parser.parse_args()
    engines_here()
    from vllm import LLM

    from sdfp_vllm.engine.v1 import proposer
    from tests.toy.held_out import held_out_prompts
    from tests.toy.scaled import PACKAGED

    model = PACKAGED / "model"
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(str(model), Path(folder), [0, 5, 10, 15], k=DRAFTS)
        llm = LLM(
            str(model),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=64,
            enforce_eager=True,
            disable_log_stats=False,
            kv_cache_memory_bytes=1 << 30,
            speculative_config={"method": "sdfp", "model": plan, "num_speculative_tokens": DRAFTS},
        )
    prompts = held_out_prompts(model, count=64, tokens=LENGTH)
    follow = proposer.cut
    for temperature in asked.temperatures:
        sampling = dict(temperature=temperature, top_k=asked.top_k, top_p=asked.top_p)
        row: dict[str, Any] = dict(sampling)
        for name, cut in (("ignored", lambda probs, top_k, top_p: probs), ("followed", follow)):
            proposer.cut = cut
            row[name] = accepted(llm, prompts, sampling)
        print(json.dumps(row), flush=True)


def accepted(llm: Any, prompts: list[list[int]], sampling: dict[str, Any]) -> dict[str, float]:
    """The accepted share of all drafts to `prompts`, and tokens a round."""
    from vllm import SamplingParams

    before = draft_counts(llm)
    llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(max_tokens=LENGTH, ignore_eos=True, detokenize=False, **sampling),
        use_tqdm=False,
    )
    share, length = acceptance(llm, before)
    return {"acceptance": round(share, 3), "tokens a round": round(length, 2)}


if __name__ == "__main__":
    main()
