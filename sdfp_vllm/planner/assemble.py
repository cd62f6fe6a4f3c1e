"""From what was chosen to the plan and the files beside it."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

from sdfp_vllm import __version__
from sdfp_vllm.common.source_tree import git_sha
from sdfp_vllm.plan.bridge_file import pack_bridges
from sdfp_vllm.plan.head_file import pack_head
from sdfp_vllm.plan.schema import DraftHead, Provenance, SkipPlan, StoredView
from sdfp_vllm.plan.window import parse_window
from sdfp_vllm.planner.choose import Drafted
from sdfp_vllm.planner.head import head_bytes
from sdfp_vllm.planner.work import Work


def assemble(work: Work, drafted: Drafted, scored_tokens: int) -> tuple[SkipPlan, bytes | None, bytes | None]:
    """The plan, and the contents of the files beside it: bridges, and tokens of the head.

    Args:
        scored_tokens: Tokens of the text that Fisher traces were taken on.
    """
    chosen, memory, options, identity = drafted.choice, drafted.memory, work.options, work.identity
    found = chosen.found
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
        model=work.model,
        revision=None if Path(work.model).is_dir() else options.revision,
        fingerprint=identity,
        view=StoredView.of(choice.keep, identity.num_layers, bridges, head, window),
        extra_bytes=memory.of(choice.keep) + beside,
        num_speculative_tokens=choice.draft_tokens,
        draft_tokens_by_batch=choice.by_batch,
        worthwhile=choice.worthwhile,
        prediction=choice.prediction,
        scores=drafted.scores,
        curve=choice.curve,
        costs=found.costs(),
        chances=drafted.chances,
        made=Provenance(
            calibration=work.texts.description,
            calibration_tokens=scored_tokens,
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
