"""The offline job behind `sdfp plan`: model in, plan out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.console import Console
from torch import Tensor

from sdfp_vllm import __version__
from sdfp_vllm.bridge_file import pack_bridges
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.fingerprint import Fingerprint, fingerprint, resolve_model_dir
from sdfp_vllm.fit.bridged_search import (
    VARIANTS,
    BridgeRequest,
    check_bridge,
    search_bridged,
)
from sdfp_vllm.fit.calibration import Calibration, count_tokens, load_calibration
from sdfp_vllm.fit.cost import measure_cost
from sdfp_vllm.fit.fisher import fisher_scores, layer_scores
from sdfp_vllm.fit.fisher_sums import FisherSums
from sdfp_vllm.fit.head import rank_tokens
from sdfp_vllm.fit.head_search import RestrictedChoice, check_head, search_head
from sdfp_vllm.fit.pacing import measure_pacing
from sdfp_vllm.fit.progress import Stages, stages
from sdfp_vllm.fit.rollout import Continuations, DraftRollout, greedy_continuations
from sdfp_vllm.fit.search import MAX_TRIED, candidate_sizes, check_request
from sdfp_vllm.fit.selectors import SELECTORS, Problem, Selector, check_selector, most_steps
from sdfp_vllm.fit.stack import DecoderStack, load_target
from sdfp_vllm.head_file import pack_head
from sdfp_vllm.pacing.record import Pacing
from sdfp_vllm.plan import Bridges, DraftHead, LayerScore, Provenance, SkipPlan, default_plan_dir
from sdfp_vllm.ray_cluster import RayOptions
from sdfp_vllm.source_tree import git_sha
from sdfp_vllm.tokenizer import load_tokenizer

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHECKPOINT = ".fisher-partial.pt"


@dataclass(frozen=True)
class PlanOptions:
    """What the user can ask of the job; the defaults plan a 0.3B model on two CPU cores in about 100 s.

    Attributes:
        calibration, field: Source of calibration text (None: the built-in sample) and its text field.
        sequences, length: Windows scored for the Fisher trace, and tokens in each.
        text_sequences, prompt, new_tokens: Texts that the target writes to try drafts on, each
            from a prompt of `prompt` calibration tokens.
        layers, draft_tokens: Fix the number of kept layers or the draft length.
        score_form: "trace" or "diagonal".
        selector: How the keep set is chosen: "auto", "fit" or "gradient" (see `selectors.py`).
        bridge: What stands in for skipped layers: "none", "bias", "affine", "low-rank", or "auto", the
            one of them that is predicted to be fastest.
        head: Tokens whose logits the draft computes: "full", their number, or "auto", restricted where that
            is predicted to be faster.
        ray: Score the layers on a Ray cluster; None scores them in this process.
    """

    calibration: str | None = None
    field: str = "text"
    sequences: int = 8
    length: int = 256
    text_sequences: int = 16  # from 16 rows on, a CPU's matrix product costs little more than at one
    prompt: int = 64
    new_tokens: int = 64
    seed: int = 0
    layers: int | None = None
    draft_tokens: int | None = None
    dtype: str = "auto"
    score_form: str = "trace"
    selector: Selector = "auto"
    bridge: BridgeRequest = "none"
    head: str = "auto"
    resume: bool = False
    ray: RayOptions | None = None


def make_plan(
    model: str, *, out: Path | None = None, console: Console | None = None, **requests: Any
) -> SkipPlan:
    """Makes the plan of `model` and saves it.

    Interrupted, it leaves no plan, only the finished part of the Fisher scores in the output
    folder, from which `resume` goes on.

    Args:
        model: A folder or a Hugging Face id.
        out: Output folder; None for the default place, where the engine looks by itself.
        console: Where progress is shown; None shows none.
        requests: Fields of PlanOptions.

    Raises:
        SdfpError: On any request that cannot be met, before the model is loaded where possible.
    """
    options = PlanOptions(**requests)
    _check(options)
    model_dir = resolve_model_dir(model)
    identity = fingerprint(model_dir)
    check_request(identity.num_layers, options.layers, options.draft_tokens)
    check_head(options.head, identity.vocab_size)
    folder = _writable(out or default_plan_dir(identity))
    tokenizer = load_tokenizer(model_dir)
    # Text first: its errors are the user's to mend, and loading the weights may take minutes.
    calibration = _calibration(options, tokenizer, options.sequences, options.length, options.seed)
    # Drafts are tried on other text than the layers were scored on.
    count = options.text_sequences * (1 + _confirms(options) + (options.bridge != "none"))
    prompts = _calibration(options, tokenizer, count, options.prompt, options.seed + 1)
    with stages(console) as bar:
        # First, so that this process and a worker on this machine never hold the model at once.
        sums = _sums_on_ray(model, calibration.ids, identity, folder, options, bar) if options.ray else None
        with bar.step("Loading the model", 1):
            transformers.utils.logging.disable_progress_bar()  # ours shows the stages
            stack = DecoderStack(load_target(model_dir, _DTYPES[options.dtype], _device(options)))
        scores = (
            layer_scores(stack, sums)
            if sums
            else _scores(stack, calibration.ids, identity, folder, options, bar)
        )
        chosen, pacing = _choose(stack, prompts.ids, scores, tokenizer, identity.vocab_size, options, bar)
    found = chosen.found
    choice, fitted = found.choice, found.fitted
    described: Literal["none"] | Bridges = "none"
    tensors = None
    if fitted.runs:
        described, tensors = pack_bridges(fitted.runs, fitted.bridges)
    head: Literal["full"] | DraftHead = "full"
    head_tokens = None
    if chosen.tokens is not None:
        head, head_tokens = pack_head(chosen.tokens, chosen.coverage)
    plan = SkipPlan(
        model=model,
        fingerprint=identity,
        kept_layers=list(choice.keep.layers),
        kept_attention=list(choice.keep.attention),
        kept_mlp=list(choice.keep.mlp),
        num_speculative_tokens=choice.draft_tokens,
        draft_tokens_by_batch=choice.by_batch,
        worthwhile=choice.worthwhile,
        prediction=choice.prediction,
        scores=scores,
        curve=choice.curve,
        cost=found.cost_model(),
        pacing=pacing,
        bridges=described,
        head=head,
        made=_provenance(calibration, options),
    )
    plan.save(folder, tensors, head_tokens)
    (folder / _CHECKPOINT).unlink(missing_ok=True)
    return plan


def _calibration(options: PlanOptions, tokenizer, sequences: int, length: int, seed: int) -> Calibration:
    return load_calibration(
        options.calibration, tokenizer, sequences=sequences, length=length, seed=seed, field=options.field
    )


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
    model: str, ids: Tensor, identity: Fingerprint, folder: Path, options: PlanOptions, bar: Stages
) -> FisherSums:
    from sdfp_vllm.fit.ray_fisher import FisherJob, ray_fisher_sums

    assert options.ray is not None
    if Path(model).is_dir():  # workers have other working directories; a hub id is resolved on each node
        model = str(Path(model).resolve())
    job = FisherJob(model, identity, ids, _DTYPES[options.dtype], f"{identity.sha256} {options.seed}")
    with bar.step("Fisher traces (starting Ray)", len(ids)) as advance:
        return ray_fisher_sums(
            job, options.ray, checkpoint=folder / _CHECKPOINT, resume=options.resume, advance=advance
        )


def _choose(
    stack: DecoderStack,
    prompts: Tensor,
    scores: list[LayerScore],
    tokenizer: Any,
    vocab_size: int,
    options: PlanOptions,
    bar: Stages,
) -> tuple[RestrictedChoice, Pacing]:
    with bar.step("Target's own text", options.new_tokens) as advance:
        text = greedy_continuations(stack, prompts, options.new_tokens, advance)
    with bar.step("Costs on this machine", 1):
        cost = measure_cost(stack, max_rows=(options.draft_tokens or MAX_TRIED) + 1)
    sizes = 1 if options.layers else len(candidate_sizes(stack.num_layers))
    steps = most_steps(options.selector, stack.num_layers, options.layers) + sizes * len(
        VARIANTS[options.bridge]
    )
    # Bridges are judged on the same text as keep sets without, and fitted on the rest.
    tried, rest = text.split(options.text_sequences)
    held = None
    if _confirms(options):
        assert rest is not None
        held, rest = rest.split(options.text_sequences)
    with bar.step("Trying drafts", steps) as advance:

        def news(line: str) -> None:
            advance(1, f"Trying drafts ({line})")

        rollout = DraftRollout(stack, tried)
        problem = Problem(
            rollout,
            DraftRollout(stack, held) if held else None,
            scores,
            cost,
            form=options.score_form,
            layers=options.layers,
            draft_tokens=options.draft_tokens,
            advance=news,
        )
        found = search_bridged(
            options.bridge,
            rollout,
            rest,
            scores,
            cost,
            unbridged=lambda: SELECTORS[options.selector](problem),
            form=options.score_form,
            layers=options.layers,
            draft_tokens=options.draft_tokens,
            advance=news,
        )
    with bar.step("Draft head", 1) as advance:
        chosen = search_head(
            check_head(options.head, vocab_size),
            found,
            rollout,
            lambda: _ranking(stack, rest or held, tokenizer, vocab_size, options),
            vocab_size,
            draft_tokens=options.draft_tokens,
            news=lambda line: advance(0, f"Draft head ({line})"),
        )
    with bar.step("Confidence of the drafts", 1):
        found = chosen.found
        pacing = measure_pacing(
            rollout,
            found.choice.keep,
            found.cost,
            options.draft_tokens or MAX_TRIED,
            bridges=found.fitted.bridges,
            tokens=chosen.tokens,
        )
    return chosen, pacing


def _ranking(
    stack: DecoderStack, own: Continuations | None, tokenizer: Any, vocab_size: int, options: PlanOptions
) -> Tensor:
    """Token ids by frequency in the calibration source and in text of the target, int64 [vocab_size].

    Neither holds the prompts that heads are tried on, or their continuations. `own` is such text, the held-out
    one included; None has the target write it.
    """
    n = options.text_sequences
    if own is None:
        try:
            prompts = _calibration(options, tokenizer, 2 * n, options.prompt, options.seed + 1).ids[n:]
            own = greedy_continuations(stack, prompts, options.new_tokens)
        except SdfpError:  # a short source has no more prompts: what it holds is counted all the same
            pass
    counts = [
        count_tokens(
            options.calibration,
            tokenizer,
            vocab_size=vocab_size,
            after=2 * n,
            length=options.prompt,
            seed=options.seed + 1,
            field=options.field,
        )
    ]
    if own is not None:
        counts.append(torch.bincount(own.written().cpu(), minlength=vocab_size)[:vocab_size])
    return rank_tokens(counts, always=tokenizer.all_special_ids)


def _confirms(options: PlanOptions) -> bool:
    """Whether the selector confirms on text of its own what it finds."""
    return options.selector == "auto" and None in VARIANTS[options.bridge]


def _check(options: PlanOptions) -> None:
    if options.dtype not in _DTYPES:
        raise SdfpError("--dtype", f"{options.dtype!r} is not known", f"Use one of {', '.join(_DTYPES)}.")
    if options.score_form not in ("trace", "diagonal"):
        raise SdfpError("--score-form", f"{options.score_form!r} is not known", "Use trace or diagonal.")
    check_bridge(options.bridge)
    check_selector(options.selector)


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
            "Choose another folder with -o.",
        ) from e
    return folder


def _device(options: PlanOptions) -> str:
    if options.ray and options.ray.gpus_per_worker > 1:
        return "auto"  # too large for one GPU there, too large for one here
    return "cuda" if torch.cuda.is_available() else "cpu"


def _selector_name(options: PlanOptions) -> str:
    """The selector, with the FIT score that it starts from."""
    # Bridges by name are tried over FIT's keep sets alone.
    name = options.selector if None in VARIANTS[options.bridge] else "fit"
    return name if name == "gradient" else f"{name}-{options.score_form}"


def _provenance(calibration: Calibration, options: PlanOptions) -> Provenance:
    return Provenance(
        calibration=calibration.description,
        calibration_tokens=calibration.tokens,
        seed=options.seed,
        selector=_selector_name(options),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        sdfp_version=__version__,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        git_sha=git_sha(),
    )
