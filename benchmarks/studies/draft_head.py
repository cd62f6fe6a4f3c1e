"""What a restricted draft head saves where the head is a large share of a draft: Qwen3-0.6B's shape.

    python -m benchmarks.studies.draft_head [--out benchmarks/results/draft_head.json]

The workload is synthetic. Weights are random (`dialled.py`); drafts are accepted because the branches of
the 24 layers that do not draft are scaled down, and tokens are unevenly common because the head's rows are
scaled by id, so the n most frequent tokens are the ids below n. What is real is the time: shapes, dtype and
the engine are those that serve the model. Acceptance on a real model is for `sdfp plan` to measure.

One engine, batch 1, greedy, one thread; every head takes its turn in each repeat. Plain vLLM runs before
and after. Times are medians over rounds; speed is the tokens of the decode phase over its seconds.
In bfloat16 a product over five rows rounds otherwise than one over one row, so that verification may turn a
near-tie: with any head alike, answers are not always plain vLLM's. Tests compare them in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.engine_here import Stopwatch, acceptance, draft_counts, engines_here
from sdfp_vllm.common.results_file import save_results

KEEP, DRAFT_TOKENS = [0, 9, 18, 27], 4
SCALE, SKEW = 0.03, 0.07
FRACTIONS = (1, 2, 4, 8, 16, 32)  # full head, half, ...
PROMPTS, PROMPT, NEW = 2, 32, 48
ENGINE: dict[str, Any] = dict(
    dtype="bfloat16",
    max_model_len=256,
    max_num_seqs=1,
    enforce_eager=True,
    distributed_executor_backend="uni",
    disable_log_stats=False,
    kv_cache_memory_bytes=256 << 20,
    skip_tokenizer_init=True,
)


@contextlib.contextmanager
def running(model: Path, speculative: dict[str, Any] | None = None) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(str(model), speculative_config=speculative, **ENGINE)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts() -> list[list[int]]:
    """Ids below 2,048, the same each time."""
    return [[(7919 * (i + 1) + 104729 * j) % 2048 for j in range(PROMPT)] for i in range(PROMPTS)]


def generate(llm: Any) -> tuple[list[list[int]], float]:
    """Greedy answers one at a time, and milliseconds per token after the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    answers, seconds = [], 0.0
    for prompt in prompts():
        (out,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        answers.append(list(out.outputs[0].token_ids))
        seconds += out.metrics.last_token_ts - out.metrics.first_token_ts
    return answers, seconds * 1e3 / (PROMPTS * (NEW - 1))


def measure(model: Path, repeats: int) -> dict[str, Any]:
    """Plain decoding, then every head in turn, then plain decoding again."""
    import torch

    from benchmarks.gpu.engines import make_plan
    from sdfp_vllm.engine.draft.head import draft_head

    plain: list[float] = []
    with running(model) as llm:
        generate(llm)
        for _ in range(repeats):
            want, ms = generate(llm)
            plain.append(ms)
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(str(model), Path(folder), KEEP, k=DRAFT_TOKENS)
        rows: dict[int, dict[str, Any]] = {}
        with running(model, {"method": "sdfp", "model": plan}) as llm:
            runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
            draft, vocab = runner.drafter.model, runner.model_config.get_vocab_size()
            heads = {vocab: draft._head}
            for n in FRACTIONS[1:]:
                head = draft_head(runner.model, torch.arange(vocab // n))
                assert head is not None
                heads[vocab // n] = head
            watch = Stopwatch(runner.drafter, ("_forward", "_sample_draft_tokens"))
            seen: dict[int, dict[str, list[float]]] = {size: defaultdict(list) for size in heads}
            for repeat in range(repeats + 1):
                for size, head in heads.items():
                    draft._head, watch.rounds, before = head, [], draft_counts(llm)
                    answers, ms = generate(llm)
                    share, length = acceptance(llm, before)
                    if not repeat:  # warms up
                        continue
                    seen[size]["ms"].append(ms)
                    for round_ in watch.rounds:
                        for name, spent in round_.items():
                            seen[size][name].append(spent)
                    seen[size]["acceptance"].append(share)
                    seen[size]["length"].append(length)
                    same = [a == w for a, w in zip(answers, want, strict=True)]
                    seen[size]["identical"].append(sum(same) / len(same))
    with running(model) as llm:
        generate(llm)
        plain += [generate(llm)[1] for _ in range(repeats)]
    base = statistics.median(plain)
    for size, s in seen.items():
        mid = {name: statistics.median(values) for name, values in s.items()}
        rows[size] = {
            "tokens": size,
            "share": round(size / vocab, 4),
            "draft_step_ms": round(mid["round"], 2),
            "head_and_choice_ms": round(mid["_sample_draft_tokens"], 2),
            "layers_ms": round(mid["_forward"], 2),
            "acceptance": round(mid["acceptance"], 3),
            "tokens_a_round": round(mid["length"], 3),
            "ms_per_token": round(mid["ms"], 2),
            "speedup": round(base / mid["ms"], 3),
            "speedup_range": [round(base / max(s["ms"]), 3), round(base / min(s["ms"]), 3)],
            "answers_identical_to_plain": round(mid["identical"], 3),
        }
    return {
        "plain_ms_per_token": round(base, 2),
        "plain_range": [round(min(plain), 2), round(max(plain), 2)],
        "heads": list(rows.values()),
    }


def predicted(model: Path) -> dict[str, Any]:
    """What `sdfp plan --head auto` decides for this keep set, tokens ranked by id."""
    import torch

    from sdfp_vllm.plan.keep import KeepSet
    from sdfp_vllm.plan.schema import FitScore, LayerScore
    from sdfp_vllm.planner.bridged_search import BridgedChoice
    from sdfp_vllm.planner.bridges import FittedBridges
    from sdfp_vllm.planner.cost import measure_costs
    from sdfp_vllm.planner.head_search import search_head
    from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
    from sdfp_vllm.planner.search import search
    from sdfp_vllm.planner.stack import DecoderStack, load_target

    stack = DecoderStack(load_target(model))
    vocab = stack.config.vocab_size
    ids = torch.tensor(prompts() + [p[::-1] for p in prompts()])
    rollout = DraftRollout(stack, greedy_continuations(stack, ids, 32))
    cost = measure_costs(stack, max_rows=DRAFT_TOKENS + 1)

    def score(i: int) -> LayerScore:  # ranks the layers that draft first
        value = 2.0 if i in KEEP else 1.0
        fit = FitScore(fisher_trace=value, perturbation_variance=1.0, trace_score=value, diagonal_score=value)
        return LayerScore(layer=i, total=fit, attention=fit, mlp=fit)

    fixed = dict(layers=len(KEEP), draft_tokens=DRAFT_TOKENS)
    choice = search(rollout, [score(i) for i in range(stack.num_layers)], cost, **fixed)  # type: ignore[arg-type]
    assert choice.kept_layers == KEEP
    began = time.perf_counter()
    found = BridgedChoice(choice, FittedBridges(), cost, choice.prediction.speedup)
    got = search_head("auto", found, rollout, lambda: torch.arange(vocab), vocab, draft_tokens=DRAFT_TOKENS)
    return {
        "full_head_speedup": round(choice.prediction.speedup, 3),
        "chosen_tokens": vocab if got.tokens is None else len(got.tokens),
        "coverage": round(got.coverage, 3),
        "chosen_speedup": round(got.found.choice.prediction.speedup, 3),
        "head_ms": round(cost.head["full"][0], 2),
        "chosen_head_ms": round((got.found.cost.draft_head or cost.head["full"])[0], 2),
        "layer_ms": round(cost.layers_ms(KeepSet((0,)), 1), 2),
        "seconds_spent_on_the_head": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/draft_head.json"))
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--model", type=Path, help="where the random checkpoint is kept (default: removed)")
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    engines_here()
    import torch
    import vllm

    from benchmarks.studies.dialled import dialled
    from sdfp_vllm.common.source_tree import git_sha

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = dialled(asked.model or Path(scratch) / "model", asked.shape, KEEP, SCALE, skew=SKEW)
        results = {
            "workload": "synthetic: random weights, dialled acceptance and token frequencies",
            "shape": asked.shape,
            "dtype": ENGINE["dtype"],
            "kept_layers": KEEP,
            "draft_tokens": DRAFT_TOKENS,
            "scale": SCALE,
            "skew": SKEW,
            "predicted": predicted(model),
            **measure(model, asked.repeats),
        }
    from sdfp_vllm.planner.cost import _device_name

    results |= {
        "machine": _device_name(torch.device("cpu")),
        "threads": 1,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "git_sha": git_sha(),
        "argv": sys.argv[1:],
    }
    print(json.dumps(results, indent=1))
    save_results(asked.out, results)


if __name__ == "__main__":
    main()
