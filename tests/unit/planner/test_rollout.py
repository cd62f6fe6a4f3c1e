"""The parallel acceptance estimate against drafting one token at a time over a real K/V cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.planner.rollout import Continuations, DraftRollout, greedy_continuations
from sdfp_vllm.planner.rounds import AcceptedRuns
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.tiny_models import ARCHITECTURES, LONE_BRANCHES, VOCAB, tiny_ids, tiny_model

PROMPT, NEW, STEPS = 9, 14, 4
KEEP = [0, 1, 3]  # a sliding, a full layer and the last, where the two alternate
PARTIAL = KeepSet(layers=(3,), attention=(0, 1), mlp=(2,))


def _tiny(architecture: str = "llama") -> DecoderStack:
    return DecoderStack(tiny_model(architecture, eos_token_id=None))


@pytest.fixture(params=ARCHITECTURES, name="stack", scope="module")
def _stack(request) -> DecoderStack:
    return _tiny(request.param)


def _text(stack: DecoderStack, sequences: int = 3) -> Continuations:
    return greedy_continuations(stack, tiny_ids(sequences, PROMPT), NEW)


@torch.no_grad()
def _draft_logits_one_by_one(
    stack: DecoderStack, ids: torch.Tensor, start: int, keep=KEEP
) -> list[torch.Tensor]:
    """Fills a cache with the full model up to `start`, then feeds one token at a time to what is kept."""
    cache = DynamicCache(config=stack.config)
    stack.model(input_ids=ids[None, :start], past_key_values=cache, use_cache=True)
    logits = []
    with stack.keeping(keep) as model:
        for position in range(start, start + STEPS):
            out = model(
                input_ids=ids[None, position : position + 1],
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(out.logits[0, 0])
    return logits


class _Recording(DraftRollout):
    """Keeps each step's logits by (sequence, start), and drops no row."""

    def _argmax(self, hidden, *head):
        if hasattr(self, "target"):
            self.seen.append(self.stack.scaled(self.stack.head(hidden)))
            step = len(self.seen) - 1
            return self.target[:, step:].flatten()
        return super()._argmax(hidden, *head)


def _keep_sets(stack: DecoderStack) -> list[KeepSet]:
    return [KEEP, PARTIAL] if stack.config.model_type in LONE_BRANCHES else [KEEP]


@pytest.mark.parametrize("which", [0, -1], ids=["layers", "branches"])
def test_every_draft_step_equals_drafting_one_token_at_a_time(stack, which):
    keep = _keep_sets(stack)[which]
    text = _text(stack)
    rollout = _Recording(stack, text)
    rollout.seen = []
    rollout.run(keep, STEPS)
    for n, ids in enumerate(text.ids):
        for start in (PROMPT, PROMPT + 3, PROMPT + NEW - STEPS):
            for j, expected in enumerate(_draft_logits_one_by_one(stack, ids, start, keep)):
                row = n * (NEW - j) + start - PROMPT
                torch.testing.assert_close(rollout.seen[j][row], expected, atol=1e-4, rtol=1e-4)


def test_the_past_comes_from_the_full_model_not_from_the_pruned_one(stack):
    text = _text(stack, sequences=1)
    rollout = _Recording(stack, text)
    rollout.seen = []
    rollout.run(KEEP, 1)
    pruned_past = stack.logits(text.ids, KEEP)[0, PROMPT:]
    assert (rollout.seen[0] - pruned_past).abs().max() > 1e-2


def test_with_all_layers_every_draft_is_accepted(stack):
    rollout = DraftRollout(stack, _text(stack))
    rounds = rollout.run(range(stack.num_layers), STEPS).rounds(STEPS)
    assert rounds.acceptance == [1.0] * STEPS
    assert rounds.acceptance_rate == 1.0
    assert rounds.mean_accepted_length == STEPS + 1
    assert rounds.count == 3 * (NEW // (STEPS + 1)) + 3 * (NEW % (STEPS + 1) == STEPS)


def test_the_continuation_is_the_targets_own_greedy_choice(stack):
    text = _text(stack)
    rollout = DraftRollout(stack, text)
    assert torch.equal(rollout.target[:, :-1], text.ids[:, PROMPT + 1 :])
    chosen = stack.logits(text.ids).argmax(-1)
    assert torch.equal(chosen[:, PROMPT - 1 : -1], text.ids[:, PROMPT:])
    assert torch.equal(chosen[:, PROMPT:], rollout.target)


def test_what_the_writing_computed_is_what_a_full_pass_computes(stack):
    """To the last position, in sliding layers too; with it as many drafts are accepted."""
    whole = _text(stack, sequences=4)
    _, text = whole.split(1)
    assert text is not None
    kept, again = (
        DraftRollout(stack, text),
        DraftRollout(stack, Continuations(text.ids, text.first, text.ends)),
    )
    assert kept.full is not again.full and torch.equal(kept.target, again.target)
    for ours, theirs in zip(kept.full, again.full, strict=True):
        torch.testing.assert_close(
            (ours.keys, ours.values), (theirs.keys, theirs.values), atol=1e-4, rtol=1e-4
        )
    for keep in (*_keep_sets(stack), range(stack.num_layers)):
        ours, theirs = kept.run(keep, STEPS), again.run(keep, STEPS)
        assert torch.equal(ours.lengths, theirs.lengths) and torch.equal(ours.ends, theirs.ends)


def test_progress_counts_the_tokens_added():
    ticks: list[int] = []
    greedy_continuations(_tiny(), tiny_ids(2, PROMPT), NEW, ticks.append)
    assert ticks == [1] * NEW


@pytest.fixture(params=["llama", "qwen2", "gemma3_text", "qwen3_moe"], name="some_stack", scope="module")
def _some_stack(request) -> DecoderStack:
    return _tiny(request.param)


LENGTHS = [9, 2, 5, 1]  # window of the sliding layers: 3


def _ragged() -> list[torch.Tensor]:
    return [tiny_ids(1, length, seed=length)[0] for length in LENGTHS]


def test_prompts_of_different_lengths_are_continued_as_each_is_alone(some_stack):
    text = greedy_continuations(some_stack, [p.tolist() for p in _ragged()], NEW)
    assert text.ids.shape == (4, 9 + NEW) and text.first == 9
    assert text.begins.tolist() == [0, 7, 4, 8]
    for n, prompt in enumerate(_ragged()):
        alone = greedy_continuations(some_stack, prompt[None], NEW)
        begin = int(text.begins[n])
        assert torch.equal(text.ids[n, begin:], alone.ids[0]) and alone.begins.tolist() == [0]
        assert text.chosen is not None and alone.chosen is not None
        assert torch.equal(text.chosen[n], alone.chosen[0])
        assert text.full[n].begin == begin and text.full[n].keys[0].shape[1] == len(alone.ids[0])
        torch.testing.assert_close(text.full[n].values, alone.full[0].values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [KEEP, PARTIAL], ids=["layers", "branches"])
def test_padding_changes_no_acceptance(some_stack, keep):
    text = greedy_continuations(some_stack, _ragged(), NEW)
    text.ends[1] = text.first + 6
    known = Continuations(text.ids, text.first, text.ends, begins=text.begins)
    kept, again = DraftRollout(some_stack, text), DraftRollout(some_stack, known)
    assert torch.equal(kept.target, again.target)
    confidence: list[torch.Tensor] = []
    runs = kept.run(keep, STEPS, watch=lambda c, right: confidence.append(c))
    assert torch.equal(runs.lengths, again.run(keep, STEPS).lengths)
    assert 0 < runs.lengths.sum() < runs.lengths.numel() * STEPS
    first_steps = confidence[0].split((text.ends - text.first).tolist())
    for n, prompt in enumerate(_ragged()):
        alone = greedy_continuations(some_stack, prompt[None], NEW)
        alone.ends[0] -= NEW - (6 if n == 1 else NEW)
        seen: list[torch.Tensor] = []
        expected = DraftRollout(some_stack, alone).run(keep, STEPS, watch=lambda c, r, to=seen: to.append(c))
        assert torch.equal(runs.lengths[n], expected.lengths[0])
        assert runs.ends[n] == expected.ends[0]
        torch.testing.assert_close(first_steps[n], seen[0], atol=1e-5, rtol=1e-4)


def test_what_padding_holds_does_not_matter(some_stack):
    """Neither its token nor anything computed from it is read."""
    text = greedy_continuations(some_stack, _ragged(), NEW)
    other = text.ids.clone()
    for row, begin in zip(other, text.begins.tolist(), strict=True):
        row[:begin] = 7
    ours, theirs = (
        DraftRollout(some_stack, Continuations(ids, text.first, text.ends, begins=text.begins))
        for ids in (text.ids, other)
    )
    assert torch.equal(ours.run(KEEP, STEPS).lengths, theirs.run(KEEP, STEPS).lengths)


def test_parts_and_written_text_of_a_ragged_batch():
    stack = _tiny()
    text = greedy_continuations(stack, _ragged(), NEW)
    text.ends[:] = torch.tensor([9 + NEW, 9 + 1, 9 + 2, 9 + NEW])
    assert text.written().tolist() == [
        *text.ids[0, 9:].tolist(),
        *text.ids[1, 9:10].tolist(),
        *text.ids[2, 9:11].tolist(),
        *text.ids[3, 9:].tolist(),
    ]
    one, rest = text.split(1)
    assert rest is not None
    assert (one.begins.tolist(), rest.begins.tolist()) == ([0], [7, 4, 8])
    whole = DraftRollout(stack, text).run(KEEP, STEPS).lengths
    assert torch.equal(DraftRollout(stack, rest).run(KEEP, STEPS).lengths, whole[1:])


def test_without_begins_nothing_is_padding():
    text = Continuations(tiny_ids(2, 5), 2, torch.tensor([5, 5]))
    assert text.begins.tolist() == [0, 0] and text.begins.dtype == torch.int64


@pytest.mark.parametrize("prompts", [[], [torch.tensor([3]), torch.tensor([], dtype=torch.int64)]])
def test_empty_prompts(prompts):
    with pytest.raises(SdfpError, match="at least one token"):
        greedy_continuations(_tiny(), prompts, 2)


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_tokens_that_the_model_does_not_have(token):
    with pytest.raises(SdfpError, match=f"token {token}, which is not in the model's vocabulary of {VOCAB}"):
        greedy_continuations(_tiny(), [[3, 4], [token]], 2)


def test_writing_stops_when_every_sequence_has_ended():
    stack = _tiny()
    plain = greedy_continuations(stack, _ragged(), NEW)
    # A token within the first few of each sequence.
    stops = [int(row[plain.first + n]) for n, row in enumerate(plain.ids)]
    stack.model.generation_config.eos_token_id = stops
    ticks: list[int] = []
    text = greedy_continuations(stack, _ragged(), NEW, ticks.append)
    wrote = int(text.ends.max()) - text.first
    assert wrote <= 4 and sum(ticks) == NEW
    assert torch.equal(text.ids, plain.ids[:, : text.first + wrote])
    assert text.chosen is not None and plain.chosen is not None
    assert torch.equal(text.chosen, plain.chosen[:, :wrote])
    assert [full.keys[0].shape[1] for full in text.full] == (text.ids.shape[1] - text.begins).tolist()
    whole = DraftRollout(
        stack, Continuations(plain.ids, plain.first, text.ends, plain.chosen, plain.full, plain.begins)
    )
    ours, theirs = DraftRollout(stack, text).run(KEEP, STEPS), whole.run(KEEP, STEPS)
    assert torch.equal(ours.lengths, theirs.lengths[:, :wrote]) and torch.equal(ours.ends, theirs.ends)


def test_runs_count_leading_hits_and_stop_at_the_end_of_the_text(stack):
    text = _text(stack)
    runs = DraftRollout(stack, text).run(KEEP, STEPS)
    for n, ids in enumerate(text.ids):
        chosen = stack.logits(ids[None])[0].argmax(-1)
        for start in range(PROMPT, PROMPT + NEW - STEPS + 1, 2):
            drafts = torch.stack(_draft_logits_one_by_one(stack, ids, start)).argmax(-1)
            misses = (drafts != chosen[start : start + STEPS]).nonzero().flatten().tolist()
            assert runs.lengths[n, start - PROMPT] == (misses[0] if misses else STEPS)
    ended = Continuations(text.ids, text.first, torch.full((3,), PROMPT + 2))
    all_layers = DraftRollout(stack, ended).run(range(stack.num_layers), STEPS)
    assert all_layers.lengths[:, :4].tolist() == [[2, 1, 0, 0]] * 3


def test_the_model_is_left_as_it_was(stack):
    before, ids = stack.config._attn_implementation, torch.arange(8)[None]
    logits = stack.logits(ids)
    rollout = DraftRollout(stack, _text(stack))
    with pytest.raises(SdfpError):
        rollout.run([3, 1], 2)
    rollout.run(KEEP, 2)
    assert stack.config._attn_implementation == before
    assert torch.equal(stack.logits(ids), logits)


def test_stops_early_when_told():
    stack = _tiny()
    runs = DraftRollout(stack, _text(stack)).run(range(4), 8, proceed=lambda runs: runs.steps < 3)
    assert runs.steps == 3 and runs.lengths.max() == 3


def test_end_of_text_token_ends_a_sequence():
    stack = _tiny()
    plain = _text(stack)
    assert plain.ends.tolist() == [PROMPT + NEW] * 3
    stop = int(plain.ids[0, PROMPT + 4])
    stack.model.generation_config.eos_token_id = [stop, 10_000]
    expected = [
        next((PROMPT + i + 1 for i, t in enumerate(row[PROMPT:].tolist()) if t == stop), PROMPT + NEW)
        for row in plain.ids
    ]
    assert _text(stack).ends.tolist() == expected
    assert expected[0] <= PROMPT + 5


def test_rounds_walk_from_where_the_last_round_stopped():
    # Starts 0..6; a round of 2 drafts visits 0 (run 3, counts as 2), 3 (run 0), 4 (run 1), and 6 would not fit.
    runs = AcceptedRuns(torch.tensor([[3, 2, 1, 0, 1, 5, 5]]), torch.tensor([7]), steps=5)
    rounds = runs.rounds(2)
    assert (rounds.count, rounds.tried, rounds.accepted) == (3, [3, 2], [2, 1])
    assert rounds.acceptance == pytest.approx([2 / 3, 1 / 2])
    assert rounds.mean_accepted_length == pytest.approx(2.0)
    assert rounds.acceptance_rate == pytest.approx(0.5)
    assert rounds.standard_error == pytest.approx([(2 / 9 / 3) ** 0.5, (1 / 8) ** 0.5])
    empty = AcceptedRuns(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([1]), steps=2).rounds(2)
    assert (empty.count, empty.acceptance, empty.mean_accepted_length) == (0, [0.0, 0.0], 1.0)
