"""The pipeline: requests through Ray Data, engines as its actors, answers to disk as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sdfp_vllm.common.checkpoint import decoder_config, load_tokenizer, refuse_untrusted
from sdfp_vllm.common.progress import stages
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.fingerprint import fingerprint, resolve_model_dir
from sdfp_vllm.plan.parcel import PlanParcel
from sdfp_vllm.plan.store import find_plan
from sdfp_vllm.ray.batch.answers import Answers
from sdfp_vllm.ray.batch.engine import BROKEN, BatchEngine
from sdfp_vllm.ray.batch.last_words import last_words
from sdfp_vllm.ray.batch.rows import Request, read_requests, run_key
from sdfp_vllm.ray.cluster import RayOptions, layout, ray_cluster


@dataclass(frozen=True)
class BatchOptions:
    """What a batch run takes beside files and model.

    Attributes:
        plan: Plan folder; None for the model's default place.
        max_tokens, temperature, seed: For rows that do not say; the seed is counted up by row, None gives none.
        max_model_len: Tokens of prompt and answer together; None for the model's own limit.
        batch_size: Rows handed to an engine at a time, and written to disk at a time.
        engine: Further arguments of vLLM's LLM().
    """

    plan: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    max_model_len: int | None = None
    batch_size: int = 64
    resume: bool = False
    ray: RayOptions = field(default_factory=RayOptions)
    engine: dict[str, Any] = field(default_factory=dict)


def run_batch(
    source: Path, output: Path, model: str, options: BatchOptions, console: Console | None = None
) -> Answers:
    """Answers every row of `source` and writes `output` in its order; returns what was answered.

    A row that fails in the engine is answered with its error, {"id": ..., "error": ...}; the others go on.
    Interrupted or killed, the run leaves OUTPUT.partial, from which `resume` goes on: no row is
    answered twice, none is left out. Rows without an answer may have changed by then.

    Raises:
        SdfpError: For a faulty row, plan, setting, file or cluster, before an engine starts; or
            if the engines fail.
    """
    revision, cache = options.engine.get("revision"), options.engine.get("download_dir")
    folder = resolve_model_dir(model, revision, cache)
    trusted = bool(options.engine.get("trust_remote_code"))
    refuse_untrusted(folder, trusted)
    plan = find_plan(model, options.plan or None, revision, cache)
    requests = read_requests(
        source,
        load_tokenizer(folder, trusted),
        longest=_room(folder, options),
        defaults={"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed},
    )
    engine = {**options.engine} | ({"max_model_len": options.max_model_len} if options.max_model_len else {})
    key = run_key(fingerprint(folder).sha256, json.dumps(engine, sort_keys=True), plan.sha256)
    answers = Answers(output, key, {r.id: r.digest for r in requests}, options.resume)
    todo = [r for r in requests if r.id not in answers.finished]
    if Path(model).is_dir():
        where = str(folder.resolve())
    else:
        where = model
        engine["revision"] = folder.name  # the commit: a branch may move on before a node loads it
    with stages(console) as bar, bar.step("Rows answered", len(requests)) as advance:
        advance(len(answers.finished))
        if todo:
            for found in _answers(todo, where, plan, engine, options):
                answers.add({"id": requests[a.pop("index")].id, **a} for a in found)
                advance(len(found))
    if missing := len(requests) - len(answers.finished):
        raise SdfpError("sdfp batch", f"{missing} rows were not answered", "Run it again with --resume.")
    answers.finish()
    return answers


def _answers(
    todo: list[Request], model: str, plan: PlanParcel, engine: dict[str, Any], options: BatchOptions
) -> Iterator[list[dict[str, Any]]]:
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
                answers = [json.loads(a) for a in batch["answer"]]
                if broken := next((a[BROKEN] for a in answers if BROKEN in a), None):
                    raise _failure(broken)
                yield answers
        except ray.exceptions.RayError as e:
            raise _failure(last_words(e)) from e


def _failure(why: str) -> SdfpError:
    return SdfpError(
        "sdfp batch",
        f"the engines failed ({why})",
        "Mend that; --resume goes on from the rows that are answered.",
    )


def _room(folder: Path, options: BatchOptions) -> int:
    """Tokens that the engine has room for, as far as that is known before it starts."""
    own = options.engine.get("max_model_len")
    positions = decoder_config(folder).get("max_position_embeddings") or 1 << 30
    return int(options.max_model_len or (own if isinstance(own, int) and own > 0 else positions))
