"""The offline job behind `sdfp plan`: model in, plan out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from torch import Tensor

from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.progress import stages
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import fingerprint, resolve_model_dir
from sdfp_vllm.plan.schema import LayerScore, SkipPlan
from sdfp_vllm.plan.store import default_plan_dir, save_plan
from sdfp_vllm.plan.view import BRANCHES
from sdfp_vllm.planner.admission import admit
from sdfp_vllm.planner.assemble import assemble
from sdfp_vllm.planner.choose import choose
from sdfp_vllm.planner.cost import measure_costs
from sdfp_vllm.planner.engine_check import with_check
from sdfp_vllm.planner.engine_overheads import overheads_of
from sdfp_vllm.planner.engine_setup import engine_is_here
from sdfp_vllm.planner.fisher import fisher_scores, layer_scores
from sdfp_vllm.planner.fisher_sums import FisherSums
from sdfp_vllm.planner.head_search import check_head
from sdfp_vllm.planner.long_texts import long_texts
from sdfp_vllm.planner.options import DTYPES, PlanOptions
from sdfp_vllm.planner.pictured import show
from sdfp_vllm.planner.prospects import refuse_hopeless
from sdfp_vllm.planner.rollout import greedy_continuations
from sdfp_vllm.planner.rounded import layer_products, usable_precisions
from sdfp_vllm.planner.scores import with_rounding
from sdfp_vllm.planner.search import MAX_TRIED, check_request
from sdfp_vllm.planner.shown import Shown, Windows, tokens_of
from sdfp_vllm.planner.stack import DecoderStack, load_target
from sdfp_vllm.planner.texts import Texts
from sdfp_vllm.planner.window_search import CONTEXTS, TEXTS
from sdfp_vllm.planner.work import Work, writable


def make_plan(
    model: str, *, out: Path | None = None, console: Console | None = None, **requests: Any
) -> SkipPlan:
    """Makes the plan of `model` and saves it.

    Interrupted, it leaves no plan, only the finished part of the Fisher scores in the output
    folder, from which `resume` goes on. Interrupted in the check at its end, it leaves the plan without a check.

    Args:
        model: A folder or a Hugging Face id.
        out: Output folder; None for the default place, where the engine looks by itself.
        console: Where progress is shown; None shows none.
        requests: Fields of PlanOptions.

    Raises:
        SdfpError: On any request that cannot be met, before the model is loaded where possible.
    """
    options = PlanOptions(**requests)
    options.check()
    # All that may be refused comes first: fetching and loading the weights may take minutes, or hours.
    model_dir = resolve_model_dir(model, options.revision, weights=False)
    admit(model_dir, options)
    shape = fingerprint(model_dir, weights=False)
    check_request(shape.num_layers, options.layers, options.draft_tokens)
    check_head(options.head, shape.vocab_size)
    texts = Texts.read(options, load_tokenizer(model_dir, options.trust_remote_code), model_dir)
    model_dir = resolve_model_dir(model, options.revision)
    identity = fingerprint(model_dir)
    folder = writable(out or default_plan_dir(identity))
    tries_windows = options.window == "auto" and options.run_check and engine_is_here()
    long = long_texts(model_dir, texts.tokenizer, options, TEXTS, CONTEXTS) if tries_windows else []
    reads = options.ray or options.score_text == "corpus"
    corpus = texts.corpus() if reads and not texts.pictured else None
    shown: list[Shown | None] = []
    with stages(console) as bar:
        work = Work(model, model_dir, identity, folder, options, texts, bar)
        # First, so that this process and a worker on this machine never hold the model at once.
        sums = _sums_on_ray(work, corpus) if options.ray else None
        with bar.step("Loading the model", 1):
            transformers.utils.logging.disable_progress_bar()  # ours shows the stages
            look = (lambda whole: shown.extend(show(whole, texts.pictured))) if texts.pictured else None
            dtype, trusted = DTYPES[options.dtype], options.trust_remote_code
            stack = DecoderStack(load_target(model_dir, dtype, options.device, trusted, look))
        costs = _costs(work, stack)
        with bar.step("Target's own text", options.new_tokens) as advance:
            prompts = texts.ask(stack)
            tried, checked = prompts[: options.texts], texts.for_the_check(prompts)
            text = greedy_continuations(stack, tried, options.new_tokens, advance, shown[: options.texts])
        ids = texts.scored(text, corpus)
        scores = layer_scores(stack, sums) if sums else _scores(work, stack, ids)
        scores = with_rounding(stack, scores, costs.precisions)
        drafted = choose(work, stack, text, scores, costs)
        plan, *beside = assemble(work, drafted, tokens_of(ids))
        del stack, text  # the engines of the check need the room
        save_plan(plan, folder, *beside)
        work.checkpoint.unlink(missing_ok=True)
        try:
            if options.run_check:
                plan = with_check(work, plan, [p.tolist() for p in checked], long)
        except (
            SdfpError
        ) as e:  # the plan is made and saved: an engine that does not start costs the check alone
            if console is not None:
                console.print(f"The check failed: {e}", style="yellow", soft_wrap=True, markup=False)
        save_plan(plan, folder, *beside)
    return plan


def _costs(work: Work, stack: DecoderStack) -> Costs:
    """Times of this machine: the kernels', and what the engine adds to them."""
    options = work.options
    with work.bar.step("Costs on this machine", 1):
        weights = layer_products(stack.layers[0])
        dtype = next(stack.head.parameters()).dtype
        precisions = usable_precisions(weights, dtype, options.precision)
        rows = (options.draft_tokens or MAX_TRIED) + 1
        costs = measure_costs(stack, precisions=precisions, max_rows=rows)
    if options.precision == "auto" and not options.anyway:
        refuse_hopeless(stack, costs)
    if options.run_check:
        with work.bar.step("What the engine adds", 1):
            can_round = {b: stack.can_round(b) for b in BRANCHES}
            costs = overheads_of(work.model_dir, work.identity, options, costs, can_round)
    return costs


def _scores(work: Work, stack: DecoderStack, ids: Windows) -> list[LayerScore]:
    with work.bar.step("Fisher traces", len(ids)) as advance:
        return fisher_scores(
            stack,
            ids,
            advance=advance,
            checkpoint=work.checkpoint,
            resume=work.options.resume,
            identity=work.scored,
        )


def _sums_on_ray(work: Work, ids: Tensor | None) -> FisherSums:
    from sdfp_vllm.planner.ray_fisher import FisherJob, ray_fisher_sums

    options = work.options
    assert options.ray is not None and ids is not None
    # The commit: an id is resolved on each node, and a branch may move on.
    model, revision = work.model, work.model_dir.name
    job = FisherJob(
        model,
        work.identity,
        ids,
        DTYPES[options.dtype],
        work.scored,
        options.trust_remote_code,
        revision,
    )
    if Path(model).is_dir():  # workers have other working directories
        job = replace(job, model=str(work.model_dir.resolve()), revision=None)
    with work.bar.step("Fisher traces (starting Ray)", len(ids)) as advance:
        return ray_fisher_sums(
            job, options.ray, checkpoint=work.checkpoint, resume=options.resume, advance=advance
        )
