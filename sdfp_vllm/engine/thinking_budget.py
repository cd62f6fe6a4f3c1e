"""Thinking budgets with drafts, on the V1 runner: each position is forced as plain decoding would force it.

Upstream (0.32.0) counts a round of drafts at once, so that thinking ends late or in another request's row. Here the
count is upstream's own for plain decoding, taken token by token: over what was generated, and from there
over the drafts before each position. The V2 runner counts by position itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

FORCED = 1e9  # upstream's own bump


class TokenByTokenBudget(ThinkingBudgetStateHolder):
    """Upstream's tracker, whose states advance one token at a time, as without drafts."""

    def __init__(
        self,
        reasoning_config: Any,
        max_num_seqs: int,
        num_spec_tokens: int,
        device: torch.device,
        is_pin_memory: bool,
    ):
        super().__init__(reasoning_config, max_num_seqs, 0, device, is_pin_memory)

    def sync_batch(self, batch_update: Any) -> None:
        """Follows the batch's rows. (Upstream leaves a finished request's state to the one that gets its row.)"""
        process_dict_updates(self._state, batch_update, self._begin)

    def _begin(self, params: Any, prompt: list[int] | None, output: list[int]) -> dict[str, Any] | None:
        budget = params.thinking_token_budget
        return None if budget is None else self._init_state_entry(prompt, budget)

    def update_state(
        self,
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: torch.Tensor | None = None,
    ) -> None:
        """Advances every request over the tokens that it was given since the last call."""
        for row, state in self._state.items():
            output = output_token_ids[row]
            for end in range(state.get("seen", -1) + 1, len(output) + 1):
                self._advance(state, output[:end])
            state["seen"] = len(output)

    def apply_to_logits(
        self, logits: torch.Tensor, predict_bonus_token: bool, spec_token_ids: list[list[int]] | None
    ) -> torch.Tensor:
        """Forces what the budgets force in `logits`: a row per request, or a row per draft where drafts are verified.

        Args:
            predict_bonus_token: Whether a row is what follows all of a request's drafts.
        """
        if not len(logits):  # a round without drafts is verified too
            return logits
        drafts = spec_token_ids or []
        verifies = any(drafts) and not predict_bonus_token
        rows: list[int] = []
        tokens: list[int] = []
        for request, state in self._state.items():
            mine = drafts[request] if request < len(drafts) else []
            first = sum(map(len, drafts[:request])) if verifies else request
            after = [state, *self._after_each(state, mine)]
            for row, then in enumerate(after[:-1] if verifies else after[-1:], first):
                token = self._forced(then)
                if token is not None:
                    rows.append(row)
                    tokens.append(token)
        if rows:
            forced = torch.tensor([rows, tokens], device=logits.device)
            logits[forced[0], forced[1]] = FORCED
        return logits

    def _advance(self, state: dict[str, Any], output: Sequence[int]) -> None:
        state.update(output_tok_ids=output, spec_token_ids=[], force_index=[])
        self._update_think_state(state)

    def _after_each(self, state: dict[str, Any], drafts: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The state as it will be after each of `drafts`; `state` stays as it is."""
        output = state["output_tok_ids"]
        for end in range(1, len(drafts) + 1):
            state = dict(state)
            self._advance(state, [*output, *drafts[:end]])
            yield state

    def _forced(self, state: dict[str, Any]) -> int | None:
        if state["in_end"] and state["force_index"] and state["end_count"] < len(self.think_end_token_ids):
            return self.think_end_token_ids[state["end_count"]]
        return None
