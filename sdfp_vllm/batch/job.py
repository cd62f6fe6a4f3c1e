"""The pipeline: requests through Ray Data, engines as its actors, answers to disk as they come."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sdfp_vllm.batch.answers import Answers
from sdfp_vllm.batch.rows import Request, read_requests, requests_key
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.fit.progress import stages
from sdfp_vllm.plan.fingerprint import fingerprint, resolve_model_dir
from sdfp_vllm.plan.parcel import PlanParcel
from sdfp_vllm.plan.store import find_plan
from sdfp_vllm.ray_cluster import RayOptions, layout, ray_cluster
from sdfp_vllm.tokenizer import load_tokenizer


@dataclass(frozen=True)
class BatchOptions:
    """What a batch run takes beside files and model.

    Attributes:
        plan: Plan folder; None for the model's default place.
        max_tokens, temperature, seed: For rows that do not say; the seed is counted up by row.
        max_model_len: Tokens of prompt and answer together; None for the model's own limit.
        batch_size: Rows handed to an engine at a time, and written to disk at a time.
        engine: Further arguments of vLLM's LLM().
    """

    plan: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    max_model_len: int | None = None
    batch_size: int = 64
    resume: bool = False
    ray: RayOptions = field(default_factory=RayOptions)
    engine: dict[str, Any] = field(default_factory=dict)


def run_batch(
    source: Path, output: Path, model: str, options: BatchOptions, console: Console | None = None
) -> int:
    """Answers every row of `source` and writes `output` in its order; returns the number of rows.

    Interrupted or killed, it leaves OUTPUT.partial, from which `resume` goes on: no row is
    answered twice, none is left out.

    Raises:
        SdfpError: For a faulty row, plan, setting, file or cluster, before an engine starts; or
            if the engines fail.
    """
    folder = resolve_model_dir(model)
    plan = find_plan(model, options.plan or None)
    requests = read_requests(
        source,
        load_tokenizer(folder),
        longest=options.max_model_len or _positions(folder),
        defaults={"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed},
    )
    engine = {**options.engine} | ({"max_model_len": options.max_model_len} if options.max_model_len else {})
    key = requests_key(requests, fingerprint(folder).sha256, json.dumps(engine, sort_keys=True), plan.sha256)
    answers = Answers(output, key, options.resume)
    todo = [r for r in requests if r.index not in answers.finished]
    ids = {r.index: r.id for r in requests}
    where = str(folder.resolve()) if Path(model).is_dir() else model
    with stages(console) as bar, bar.step("Rows answered", len(requests)) as advance:
        advance(len(answers.finished))
        if todo:
            for found in _answers(todo, where, plan, engine, options):
                answers.add({"index": a["index"], "id": ids[a["index"]], **a} for a in found)
                advance(len(found))
    if missing := len(requests) - len(answers.finished):
        raise SdfpError("sdfp batch", f"{missing} rows were not answered", "Run it again with --resume.")
    answers.finish()
    return len(requests)


def _answers(
    todo: list[Request], model: str, plan: PlanParcel, engine: dict[str, Any], options: BatchOptions
):
    """Yields lists of answers as engines finish them."""
    with ray_cluster(options.ray.address, where="sdfp batch") as ray:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts rows
        context.print_on_execution_start = False
        workers, resources = layout(ray.nodes(), options.ray)
        rows = [
            {"index": r.index, "prompt_token_ids": r.prompt_token_ids, "sampling": json.dumps(r.sampling)}
            for r in todo
        ]
        # A block is what an engine takes at a time, and what is done again if the engine dies.
        blocks = -(-len(rows) // options.batch_size)
        answered = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            BatchEngine,
            fn_constructor_args=(model, plan, engine),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
            **resources,
        )
        try:
            for batch in answered.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                yield [json.loads(a) for a in batch["answer"]]
        except ray.exceptions.RayError as e:
            raise SdfpError(
                "sdfp batch",
                f"the engines failed ({str(e).strip().splitlines()[-1].strip()})",
                "Mend that; --resume goes on from the rows that are answered.",
            ) from e


class BatchEngine:
    """One vLLM engine with SDFP; lives in an actor of Ray Data's pool."""

    def __init__(self, model: str, plan: PlanParcel, engine: dict[str, Any]):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process has nothing else to do
        from vllm import LLM

        self._folder = tempfile.TemporaryDirectory(prefix="sdfp-plan-")
        speculative = {"method": "sdfp", "model": str(plan.write(Path(self._folder.name)))}
        self._llm = LLM(model, speculative_config=speculative, **engine)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Answers a block of {"index", "prompt_token_ids", "sampling"} columns; JSON in, JSON out."""
        from vllm import SamplingParams

        prompts: Any = [{"prompt_token_ids": list(map(int, ids))} for ids in batch["prompt_token_ids"]]
        params = [SamplingParams(**json.loads(s)) for s in batch["sampling"]]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        answers = [
            {
                "index": int(index),
                "text": o.outputs[0].text,
                "finish_reason": o.outputs[0].finish_reason,
                "prompt_tokens": len(o.prompt_token_ids or ()),
                "completion_tokens": len(o.outputs[0].token_ids),
            }
            for index, o in zip(batch["index"], outputs, strict=True)
        ]
        return {"answer": [json.dumps(a) for a in answers]}


def _positions(folder: Path) -> int:
    """Tokens that the model has positions for."""
    config = json.loads((folder / "config.json").read_text())
    return int((config.get("text_config") or config).get("max_position_embeddings", 1 << 30))
