"""Mends of vLLM's V1 rejection sampler: fields of a request that it leaves out, or answers with an exception.

Checked on 0.32.0, where all of them concern every speculative method.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

_MARK = "_sdfp_patched"


def mend_rejection_sampler() -> None:
    """Gives requests with `logprob_token_ids` or `min_tokens` what plain decoding gives them.

    Upstream samples the token after the drafts as if there were no drafts before it, so that a stop token is masked
    there though `min_tokens` are reached; and it hands `logprob_token_ids` to that sampler alone, whose
    answer it can't use then: without `logprobs` they are ignored, with them the engine ends.
    """
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    if hasattr(RejectionSampler, _MARK):
        return
    verify, logprobs_of = RejectionSampler.forward, RejectionSampler._get_logprobs_tensors

    @functools.wraps(verify)
    def forward(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        changes: dict[str, Any] = {
            "logitsprocs": past_drafts(sampling_metadata.logitsprocs, metadata.num_draft_tokens)
        }
        if asked := sampling_metadata.logprob_token_ids:
            metadata.logprob_token_ids = asked  # for the method below
            changes.update(logprob_token_ids=None, max_num_logprobs=sampling_metadata.max_num_logprobs or 0)
        return verify(self, metadata, draft_probs, logits, replace(sampling_metadata, **changes))

    @functools.wraps(logprobs_of)
    def _get_logprobs_tensors(self: Any, max_num_logprobs: int, metadata: Any, *args: Any) -> Any:
        asked = getattr(metadata, "logprob_token_ids", None)
        if not asked:
            return logprobs_of(self, max_num_logprobs, metadata, *args)
        gather = functools.partial(gather_asked, self.sampler, asked, len(metadata.num_draft_tokens))
        sampler = SimpleNamespace(compute_logprobs=self.sampler.compute_logprobs, gather_logprobs=gather)
        stand_in: Any = SimpleNamespace(sampler=sampler, is_logits_logprobs_mode=self.is_logits_logprobs_mode)
        return logprobs_of(stand_in, max_num_logprobs, metadata, *args)

    RejectionSampler.forward = forward  # type: ignore[method-assign]
    RejectionSampler._get_logprobs_tensors = _get_logprobs_tensors  # type: ignore[method-assign, assignment]
    setattr(RejectionSampler, _MARK, True)


def gather_asked(
    sampler: Any,
    asked: Mapping[int, Sequence[int]],
    requests: int,
    logprobs: torch.Tensor,
    num_logprobs: int,
    token_ids: torch.Tensor,
) -> Any:
    """Upstream's `Sampler.gather_logprobs`, but in the rows of requests that name tokens those instead of the top.

    Args:
        asked: Tokens named, by request.
        requests: Requests in `logprobs`, each with as many rows.
    """
    top = sampler.gather_logprobs(logprobs, num_logprobs, token_ids)
    ids, values = top.logprob_token_ids, top.logprobs
    more = max(0, 1 + max(map(len, asked.values())) - ids.shape[1])
    ids = torch.nn.functional.pad(ids, (0, more))
    values = torch.nn.functional.pad(values, (0, more), value=-torch.inf)
    each = len(logprobs) // requests
    for request, named in asked.items():
        rows, wanted = slice(request * each, (request + 1) * each), slice(1, 1 + len(named))
        columns = torch.tensor(named, dtype=torch.int64, device=logprobs.device)
        ids[rows, wanted] = columns.to(ids.dtype)
        values[rows, wanted] = logprobs[rows][:, columns]
    return top._replace(logprob_token_ids=ids, logprobs=values)


def past_drafts(processors: Any, drafts: Sequence[int]) -> Any:
    """`processors` such that stop tokens of requests whose drafts reach their `min_tokens` are not masked after them.

    Args:
        processors: Upstream's LogitsProcessors of the batch; left as they are.
        drafts: How many drafts each request has.
    """
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    changed = copy.copy(processors)
    changed.non_argmax_invariant = [
        _unmasked(p, drafts) if isinstance(p, MinTokensLogitsProcessor) else p
        for p in processors.non_argmax_invariant
    ]
    return changed


def _unmasked(processor: Any, drafts: Sequence[int]) -> Any:
    reached = [i for i, (least, out, *_) in processor.min_toks.items() if len(out) + drafts[i] >= least]
    if not reached:
        return processor
    # Drafts themselves are masked by `min_toks`, what follows them by these slices.
    changed = copy.copy(processor)
    for name in ("logits_slice", "restore_logits_slice"):
        rows, tokens = getattr(processor, name)
        stays = ~torch.isin(rows, torch.tensor(reached, dtype=rows.dtype, device=rows.device))
        setattr(changed, name, (rows[stays], tokens[stays]))
    return changed
