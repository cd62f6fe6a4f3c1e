"""The offline job behind `sdfp plan`: model in, plan out."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor

from sdfp_vllm import __version__
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.fit.admission import admit
from sdfp_vllm.fit.bridged_search import VARIANTS, search_bridged
from sdfp_vllm.fit.chances import measure_chances
from sdfp_vllm.fit.cost import measure_costs
from sdfp_vllm.fit.engine_check import overheads_of, with_check
from sdfp_vllm.fit.fisher import fisher_scores, layer_scores
from sdfp_vllm.fit.fisher_sums import FisherSums
from sdfp_vllm.fit.head import RolledHead, head_bytes, rank_tokens
from sdfp_vllm.fit.head_search import HeadChoice, check_head, search_head
from sdfp_vllm.fit.memory import Memory, parse_memory
from sdfp_vllm.fit.options import DTYPES, PlanOptions
from sdfp_vllm.fit.progress import Stages, stages
from sdfp_vllm.fit.prospects import refuse_hopeless
from sdfp_vllm.fit.rollout import Continuations, DraftRollout, greedy_continuations
from sdfp_vllm.fit.rounded import fused_linears, usable_precisions
from sdfp_vllm.fit.scores import with_rounding
from sdfp_vllm.fit.search import MAX_TRIED, candidate_sizes, check_request
from sdfp_vllm.fit.selectors import SELECTORS, Problem, most_steps
from sdfp_vllm.fit.stack import DecoderStack, load_target
from sdfp_vllm.fit.texts import CHECKED, Texts, own_windows
from sdfp_vllm.fit.window_search import long_texts, with_window
from sdfp_vllm.plan.bridge_file import pack_bridges
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import Fingerprint, fingerprint, resolve_model_dir
from sdfp_vllm.plan.head_file import pack_head
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import Chances, DraftHead, LayerScore, Provenance, SkipPlan, StoredView
from sdfp_vllm.plan.store import default_plan_dir, save_plan
from sdfp_vllm.plan.view import BRANCHES, Precision
from sdfp_vllm.plan.window import parse_window
from sdfp_vllm.rounding import copy_bytes
from sdfp_vllm.source_tree import git_sha
from sdfp_vllm.tokenizer import load_tokenizer

_CHECKPOINT = ".fisher-partial.pt"


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
    texts = Texts.read(options, load_tokenizer(model_dir, options.trust_remote_code))
    model_dir = resolve_model_dir(model, options.revision)
    identity = fingerprint(model_dir)
    folder = _writable(out or default_plan_dir(identity))
    long = long_texts(model_dir, texts.tokenizer, options) if options.window == "auto" else []
    corpus = texts.corpus() if options.ray or options.score_text == "corpus" else None
    with stages(console) as bar:
        # First, so that this process and a worker on this machine never hold the model at once.
        sums = _sums_on_ray(model, model_dir, corpus, identity, folder, options, bar) if options.ray else None
        with bar.step("Loading the model", 1):
            transformers.utils.logging.disable_progress_bar()  # ours shows the stages
            stack = DecoderStack(
                load_target(model_dir, DTYPES[options.dtype], options.device, options.trust_remote_code)
            )
        costs = _costs(stack, model_dir, identity, options, bar)
        with bar.step("Target's own text", options.new_tokens) as advance:
            tried, checked = _parted(texts.ask(stack), options)
            text = greedy_continuations(stack, tried, options.new_tokens, advance)
        ids = own_windows(text, options.sequences) if corpus is None else corpus
        scores = layer_scores(stack, sums) if sums else _scores(stack, ids, identity, folder, options, bar)
        scores = with_rounding(stack, scores, costs.precisions)
        memory = _memory(stack, costs, options)
        chosen, chances = _choose(stack, text, scores, costs, memory, texts, options, bar)
        plan, tensors, head_tokens = _plan(model, identity, chosen, chances, scores, memory, texts, ids)
        del stack, text  # the engines of the check need the room
        save_plan(plan, folder, tensors, head_tokens)
        (folder / _CHECKPOINT).unlink(missing_ok=True)
        if options.run_check or long:
            try:
                if long:
                    plan = with_window(plan, model_dir, folder, long, options, bar)
                    save_plan(plan, folder, tensors, head_tokens)
                if options.run_check:
                    plan = with_check(
                        plan,
                        model_dir,
                        folder,
                        [p.tolist() for p in checked],
                        options.eager,
                        bar,
                        options.trust_remote_code,
                    )
            except (
                SdfpError
            ) as e:  # the plan is made and saved: an engine that does not start costs the check alone
                if console is not None:
                    console.print(f"The check failed: {e}", style="yellow", soft_wrap=True, markup=False)
            save_plan(plan, folder, tensors, head_tokens)
    return plan


def _parted(prompts: list[Tensor], options: PlanOptions) -> tuple[list[Tensor], list[Tensor]]:
    """Prompts to try drafts on, and those for the check."""
    return prompts[: options.texts], prompts[options.texts :][:CHECKED] or prompts[:CHECKED]


def _costs(
    stack: DecoderStack, model_dir: Path, identity: Fingerprint, options: PlanOptions, bar: Stages
) -> Costs:
    """Times of this machine: the kernels', and what the engine adds to them."""
    with bar.step("Costs on this machine", 1):
        weights = [
            w
            for b in (stack.layers[0].self_attn, stack.layers[0].mlp)
            for w in fused_linears(b)  # type: ignore[arg-type]
        ]
        dtype = next(stack.head.parameters()).dtype
        precisions = usable_precisions(weights, dtype, options.precision)
        rows = (options.draft_tokens or MAX_TRIED) + 1
        costs = measure_costs(stack, precisions=precisions, max_rows=rows)
    if options.precision == "auto" and not options.anyway:
        refuse_hopeless(stack, costs)
    if options.run_check:
        with bar.step("What the engine adds", 1):
            costs = overheads_of(
                costs,
                model_dir,
                identity,
                options.eager,
                {b: stack.can_round(b) for b in BRANCHES},
                options.trust_remote_code,
            )
    return costs


def _scores(
    stack: DecoderStack, ids: Tensor, identity: Fingerprint, folder: Path, options: PlanOptions, bar: Stages
) -> list[LayerScore]:
    with bar.step("Fisher traces", len(ids)) as advance:
        return fisher_scores(
            stack,
            ids,
            advance=advance,
            checkpoint=folder / _CHECKPOINT,
            resume=options.resume,
            identity=f"{identity.sha256} {options.seed}",
        )


def _sums_on_ray(
    model: str,
    model_dir: Path,
    ids: Tensor | None,
    identity: Fingerprint,
    folder: Path,
    options: PlanOptions,
    bar: Stages,
) -> FisherSums:
    from sdfp_vllm.fit.ray_fisher import FisherJob, ray_fisher_sums

    assert options.ray is not None and ids is not None
    # The commit: an id is resolved on each node, and a branch may move on.
    revision: str | None = model_dir.name
    if Path(model).is_dir():  # workers have other working directories
        model, revision = str(model_dir.resolve()), None
    job = FisherJob(
        model,
        identity,
        ids,
        DTYPES[options.dtype],
        f"{identity.sha256} {options.seed}",
        options.trust_remote_code,
        revision,
    )
    with bar.step("Fisher traces (starting Ray)", len(ids)) as advance:
        return ray_fisher_sums(
            job, options.ray, checkpoint=folder / _CHECKPOINT, resume=options.resume, advance=advance
        )


def _memory(stack: DecoderStack, costs: Costs, options: PlanOptions) -> Memory:
    """What rounded copies take, and may."""
    dtype = next(stack.head.parameters()).dtype
    branches: dict[tuple[str, Precision], int] = {}
    layer: Any = stack.layers[0]
    for branch, module in zip(BRANCHES, (layer.self_attn, layer.mlp), strict=True):
        for p in costs.precisions:
            shapes = [w.shape for w in fused_linears(module)] if stack.can_round(branch) else []
            branches[branch, p] = sum(copy_bytes(n, k, p, dtype) for n, k in shapes)
    n, k = next(stack.head.parameters()).shape
    model_bytes = sum(p.numel() * p.element_size() for p in stack.model.parameters())
    head = {p: copy_bytes(n, k, p, dtype) for p in costs.head}
    return Memory(parse_memory(options.extra_memory, model_bytes), branches, head)


def _choose(
    stack: DecoderStack,
    text: Continuations,
    scores: list[LayerScore],
    costs: Costs,
    memory: Memory,
    texts: Texts,
    options: PlanOptions,
    bar: Stages,
) -> tuple[HeadChoice, Chances]:
    vocab_size, hidden_size = next(stack.head.parameters()).shape
    precisions = _asked(costs, options)
    sizes = 1 if options.layers else len(candidate_sizes(stack.num_layers))
    steps = most_steps(options.selector, stack.num_layers, options.layers, len(precisions))
    steps += sizes * len(VARIANTS[options.bridge])
    # Bridges are judged on the same text as keep sets without, and fitted on the rest.
    tried, rest = text.split(options.text_sequences)
    held = None
    if options.confirms:
        assert rest is not None
        held, rest = rest.split(options.text_sequences)
    # The head is read whole for each draft: at the lowest precision there is, unless nothing is to be rounded.
    head_precision: Precision = "full"
    if len(precisions) > 1 and memory.admits(KeepSet(), "int8"):
        head_precision = min(costs.head, key=lambda p: costs.head[p][0])
    head = RolledHead(stack, None, head_precision) if head_precision != "full" else None
    allowed, dtype = memory, next(stack.head.parameters()).dtype
    if head is not None:
        costs = costs.model_copy(update={"draft_head": costs.head[head_precision]})
        memory = memory.less(memory.head[head_precision])
    with bar.step("Trying drafts", steps) as advance:

        def news(line: str) -> None:
            advance(1, f"Trying drafts ({line})")

        rollout = DraftRollout(stack, tried, head)
        problem = Problem(
            rollout,
            DraftRollout(stack, held, head) if held else None,
            scores,
            costs,
            form=options.score_form,
            layers=options.layers,
            draft_tokens=options.draft_tokens,
            advance=news,
            precisions=precisions,
            memory=memory,
        )
        found = search_bridged(
            options.bridge,
            rollout,
            rest,
            scores,
            costs,
            unbridged=lambda: SELECTORS[options.selector](problem),
            form=options.score_form,
            layers=options.layers,
            draft_tokens=options.draft_tokens,
            advance=news,
        )
    with bar.step("Draft head", 1) as advance:
        own = (rest or held or tried).written()
        chosen = search_head(
            check_head(options.head, vocab_size),
            found,
            rollout,
            lambda: rank_tokens(texts.frequencies(own, vocab_size), always=texts.tokenizer.all_special_ids),
            vocab_size,
            draft_tokens=options.draft_tokens,
            news=lambda line: advance(0, f"Draft head ({line})"),
            precision=head_precision,
            admits=lambda view, tokens, precision: allowed.admits_bytes(
                allowed.of(view) + head_bytes(tokens, hidden_size, precision, dtype)
            ),
        )
    with bar.step("Confidence of the drafts", 1):
        chances = measure_chances(
            rollout,
            chosen.found.choice.keep,
            options.draft_tokens or MAX_TRIED,
            bridges=chosen.found.fitted.bridges,
            head=chosen.rolled(stack),
        )
    return chosen, chances


def _asked(costs: Costs, options: PlanOptions) -> tuple[Precision, ...]:
    """What branches may run at."""
    if options.precision == "full" or options.bridge not in ("none", "auto"):
        return ("full",)  # bridges are fitted over layers at full precision
    if options.precision == "auto":
        return tuple(costs.precisions)
    return ("full", options.precision)  # type: ignore[return-value]


def _plan(
    model: str,
    identity: Fingerprint,
    chosen: HeadChoice,
    chances: Chances,
    scores: list[LayerScore],
    memory: Memory,
    texts: Texts,
    ids: Tensor,
) -> tuple[SkipPlan, bytes | None, bytes | None]:
    """The plan, and the contents of the files beside it."""
    found, options = chosen.found, texts.options
    choice, fitted = found.choice, found.fitted
    window = None if options.window == "auto" else parse_window("--window", options.window)
    bridges = tensors = head_tokens = None
    if fitted.runs:
        bridges, tensors = pack_bridges(fitted.runs, fitted.bridges)
    head = DraftHead(precision=chosen.precision)
    beside = memory.head.get(chosen.precision, 0)
    if chosen.tokens is not None:
        head, head_tokens = pack_head(chosen.tokens, chosen.coverage, chosen.precision)
        dtype = getattr(torch, found.cost.dtype)
        beside = head_bytes(len(chosen.tokens), identity.hidden_size, chosen.precision, dtype)
    plan = SkipPlan(
        model=model,
        revision=None if Path(model).is_dir() else options.revision,
        fingerprint=identity,
        view=StoredView.of(choice.keep, identity.num_layers, bridges, head, window),
        extra_bytes=memory.of(choice.keep) + beside,
        num_speculative_tokens=choice.draft_tokens,
        draft_tokens_by_batch=choice.by_batch,
        worthwhile=choice.worthwhile,
        prediction=choice.prediction,
        scores=scores,
        curve=choice.curve,
        costs=found.costs(),
        chances=chances,
        made=Provenance(
            calibration=texts.description,
            calibration_tokens=ids.numel(),
            score_text="corpus" if options.ray else options.score_text,
            seed=options.seed,
            selector=options.selector_name,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            sdfp_version=__version__,
            torch_version=torch.__version__,
            transformers_version=transformers.__version__,
            git_sha=git_sha(),
        ),
    )
    return plan, tensors, head_tokens


def _writable(folder: Path) -> Path:
    """Makes the output folder and tries to write in it, so that no minutes are lost to a wrong path."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise SdfpError(
            f"output folder {folder}",
            f"cannot be written ({e.strerror or e})",
            "Choose another folder with -o, or with SDFP_CACHE_DIR.",
        ) from e
    return folder
