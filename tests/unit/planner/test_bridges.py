"""Fitting bridges: exact maps are found, each run sees the path that feeds it, and only what helps is kept."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.schema import BridgeRun, FitScore, LayerScore
from sdfp_vllm.planner import bridged_search
from sdfp_vllm.planner import bridges as bridges_module
from sdfp_vllm.planner.bridged_search import MARGIN, search_bridged
from sdfp_vllm.planner.bridged_stack import bridging
from sdfp_vllm.planner.bridges import BridgeFitter, FittedBridges, fit_bridge
from sdfp_vllm.planner.rollout import Continuations, DraftRollout, greedy_continuations
from sdfp_vllm.planner.rounds import AcceptedRuns
from sdfp_vllm.planner.shared_attention import rollout_attention
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.tiny_models import ARCHITECTURES, tiny_ids, tiny_model
from tests.unit.planner.test_cost import cost

ROWS, HIDDEN, RANK = 200, 24, 3
HELD = torch.arange(ROWS) >= 150
KEEP = [0, 2]  # of 4 layers: a run within, and one before the final norm


def rows(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, HIDDEN, generator=g) * torch.linspace(0.1, 3, HIDDEN) + 1.0


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(sequences: int, length: int) -> Continuations:
    """Random ids; the last sequence ends three tokens early."""
    ends = torch.full((sequences,), length)
    ends[-1] -= 3
    return Continuations(tiny_ids(sequences, length), 1, ends)


EXACT = {
    "bias": Bridge(noise(HIDDEN)),
    "affine": Bridge(noise(HIDDEN), scale=1 + 0.3 * noise(HIDDEN, seed=2)),
    "low-rank": Bridge(
        noise(HIDDEN),
        mean=noise(HIDDEN, seed=3),
        down=noise(RANK, HIDDEN, seed=4),
        up=noise(RANK, HIDDEN, seed=5),
    ),
}


@pytest.mark.parametrize("kind", EXACT)
def test_a_map_of_its_own_kind_is_found(kind):
    h = rows()
    target = EXACT[kind].apply(h)
    bridge, penalty, error = fit_bridge(h, target, HELD, kind, RANK)
    assert error < 0.01 and bridge.kind == kind and bridge.rank == EXACT[kind].rank
    if kind == "low-rank":  # the smallest ridge penalty there is still shrinks it a little
        off = (bridge.apply(h) - target).norm() / (target - h).norm()
        assert off < 0.1
    else:
        torch.testing.assert_close(bridge.apply(h), target, atol=1e-4, rtol=1e-4)
    assert penalty == {"bias": 0.0, "affine": 0.0, "low-rank": 0.01}[kind]


def test_a_bias_cannot_be_what_a_low_rank_map_is():
    h = rows()
    target = EXACT["low-rank"].apply(h)
    errors = [fit_bridge(h, target, HELD, kind, RANK)[2] for kind in ("bias", "affine", "low-rank")]
    assert errors[2] < 0.01 < errors[1] <= errors[0] * 1.01


def test_fewer_directions_than_asked_for_are_padded():
    h = rows()
    bridge, _, _ = fit_bridge(h, EXACT["bias"].apply(h), HELD, "low-rank", 8)
    assert bridge.down.shape == bridge.up.shape == (8, HIDDEN)


def test_ridge_is_heavier_where_rows_are_few_and_noisy():
    """16 fitted rows of 24 channels say nothing: the held-out ones must not be spoilt by them."""
    few = torch.zeros(ROWS, dtype=torch.bool)
    few[:16] = True
    h = rows()
    noisy = h + noise(ROWS, HIDDEN, seed=6)
    _, penalty, error = fit_bridge(h, noisy, ~few, "low-rank", 8)
    _, clean, _ = fit_bridge(h, EXACT["low-rank"].apply(h), ~few, "low-rank", 8)
    assert penalty > clean
    assert error < 1.6


def test_nothing_to_mend_is_no_bridge():
    h = rows()
    assert fit_bridge(h, h.clone(), HELD, "low-rank", RANK)[2] == float("inf")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_run_is_fitted_to_what_the_runs_before_it_make(architecture, monkeypatch):
    """The second run's bridge is the one that fits the stream that reaches it through the first's."""
    # Random layers have little for a bridge to find: keep it all the same.
    monkeypatch.setattr(
        bridges_module, "fit_bridge", lambda *args: (*fit_bridge(*args)[:2], min(fit_bridge(*args)[2], 0.99))
    )
    stack = DecoderStack(tiny_model(architecture, eos_token_id=None))
    fitter = BridgeFitter(stack, text(8, 24))
    fitted = fitter.fit(KEEP, "bias", 0)
    runs = [(r.first, r.last) for r in fitted.runs]
    assert runs == [(1, 1), (3, 3)]
    entering = []
    with bridging(stack, KEEP, {runs[0]: fitted.bridges[runs[0]]}) as _:
        hook = stack.model.model.layers[3].register_forward_hook(
            lambda m, args, out: entering.append(args[0][0])
        )
        with torch.no_grad(), rollout_attention(stack):
            fitter._first_steps()
        hook.remove()
    target = fitter._streams[4]
    again, _, error = fit_bridge(entering[0], target, fitter._held, "bias", 0)
    torch.testing.assert_close(again.shift, fitted.bridges[runs[1]].shift, atol=1e-4, rtol=1e-4)
    assert min(error, 0.99) == pytest.approx(fitted.runs[1].error, abs=1e-4)
    # Fitted to the unbridged stream it would be another.
    alone = fitter.fit(KEEP, "bias", 0)
    assert torch.equal(alone.bridges[runs[1]].shift, fitted.bridges[runs[1]].shift)
    with_nothing = fit_bridge(fitter._streams[3], target, fitter._held, "bias", 0)[0]
    assert (with_nothing.shift - again.shift).abs().max() > 1e-2


@torch.no_grad()
def test_the_rollout_with_bridges_equals_drafting_one_token_at_a_time():
    stack = DecoderStack(tiny_model("gemma3_text", eos_token_id=None))
    text = greedy_continuations(stack, tiny_ids(3, 9), 14)
    hidden = stack.config.hidden_size
    bridges = {
        (1, 1): Bridge(noise(hidden), scale=1 + 0.2 * noise(hidden, seed=2)),
        (3, 3): Bridge(noise(hidden), mean=noise(hidden), down=noise(2, hidden), up=noise(2, hidden, seed=3)),
    }
    rollout = DraftRollout(stack, text)
    runs = rollout.run(KEEP, 4, bridges=bridges)
    assert not torch.equal(runs.lengths, rollout.run(KEEP, 4).lengths)
    for n, ids in enumerate(text.ids):
        for start in range(9, 9 + 14 - 4 + 1):
            cache = DynamicCache(config=stack.config)
            stack.model(input_ids=ids[None, :start], past_key_values=cache, use_cache=True)
            accepted = 0
            with bridging(stack, KEEP, bridges):
                for position in range(start, start + 4):
                    out = stack.model(
                        input_ids=ids[None, position : position + 1],
                        position_ids=torch.tensor([[position]]),
                        past_key_values=cache,
                        use_cache=True,
                    )
                    if out.logits[0, 0].argmax() != rollout.target[n, position - text.first]:
                        break
                    accepted += 1
            assert runs.lengths[n, start - 9] == accepted


def test_k_and_v_that_came_with_the_text_are_fitted_with(monkeypatch):
    monkeypatch.setattr(bridges_module, "fit_bridge", lambda *args: (*fit_bridge(*args)[:2], 0.5))
    stack = DecoderStack(tiny_model("gemma3_text", eos_token_id=None))
    written = greedy_continuations(stack, tiny_ids(4, 9), 14)
    fitter = BridgeFitter(stack, written)
    assert [id(full) for full in fitter._full] == [id(full) for full in written.full]
    again = BridgeFitter(stack, Continuations(written.ids, written.first, written.ends))
    ours, theirs = (f.fit(KEEP, "bias", 0).bridges for f in (fitter, again))
    assert ours.keys() == theirs.keys() and len(ours) == 2
    for run, bridge in ours.items():
        torch.testing.assert_close(bridge.shift, theirs[run].shift, atol=1e-4, rtol=1e-4)


def test_the_model_is_left_as_it_was():
    stack = DecoderStack(tiny_model(eos_token_id=None))
    ids = torch.arange(8)[None]
    before, layers = stack.logits(ids), list(stack.model.model.layers)
    BridgeFitter(stack, text(4, 12)).fit(KEEP, "low-rank", 2)
    assert list(stack.model.model.layers) == layers and not stack.norm._forward_pre_hooks
    assert torch.equal(stack.logits(ids), before)


# ---------------------------------------------------------------- which bridges are kept
class _Rollout:
    """Accepts `plain` drafts of every keep set, and `bridged` where it is given bridges."""

    def __init__(self, plain: int, bridged: dict[str, int]):
        self.plain, self.bridged, self.stack = plain, bridged, None

    def run(self, keep, steps, proceed=lambda runs: True, bridges=None):
        accepted = self.plain if bridges is None else self.bridged[next(iter(bridges.values())).kind]
        runs = None
        for j in range(1, steps + 1):
            runs = AcceptedRuns(torch.full((2, 40), min(accepted, j)), torch.tensor([40, 40]), j)
            if not proceed(runs):
                break
        return runs


class _Fitter:
    def __init__(self, stack, text):
        pass

    def fit(self, keep, kind, rank):
        run = BridgeRun(first=1, last=1, regularisation=0.0, error=0.5)
        return FittedBridges([run], {(1, 1): EXACT[kind]})

    def blank(self, kind, rank):
        return EXACT[kind]


def choose(request: str, plain: int, bridge_ms: float = 0.0, **bridged: int):
    fit = FitScore(fisher_trace=1.0, perturbation_variance=1.0, trace_score=1.0, diagonal_score=1.0)
    scores = [LayerScore(layer=i, total=fit, attention=fit, mlp=fit) for i in range(8)]
    many = list(range(1, 10))
    measured = cost(
        rows=many,
        layer=[1.0] * 9,
        head=[0.0] * 9,
        num_layers=8,
        round_overhead_ms=0.0,
        draft_overhead_ms=0.0,
    )
    rollout = _Rollout(plain, {k.replace("_", "-"): v for k, v in bridged.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridged_search, "BridgeFitter", _Fitter)
        patch.setattr(bridged_search, "measure_bridge_ms", lambda stack, bridge: bridge_ms)
        return search_bridged(request, rollout, text(1, 4), scores, measured, layers=4)


def test_auto_keeps_the_bridge_that_is_fastest():
    found = choose("auto", 2, affine=4, low_rank=6)
    assert found.fitted.bridges[1, 1].kind == "low-rank"
    assert found.choice.prediction.mean_accepted_length == 7.0
    assert choose("auto", 2, affine=6, low_rank=4).fitted.bridges[1, 1].kind == "affine"


def test_auto_keeps_none_that_does_not_raise_the_predicted_speed():
    for worse in (
        choose("auto", 4, affine=4, low_rank=3),
        choose("auto", 4, bridge_ms=2.0, affine=5, low_rank=5),
    ):
        assert worse.fitted.runs == [] and worse.choice.prediction.mean_accepted_length == 5.0
        assert worse.cost.bridge_ms == 0.0


def test_a_gain_within_the_margin_is_no_gain():
    plain = choose("none", 4).choice.prediction.speedup
    dear = choose("auto", 4, bridge_ms=0.0, affine=5, low_rank=4)
    assert dear.choice.prediction.speedup > plain * MARGIN
    # 5 drafts of 4 layers plus 5 bridges each, against 4 drafts: (6 * 8) / (5 * (4 + 5 b) + 8) = 1.01 times 1.67.
    close = choose("auto", 4, bridge_ms=(48 / (1.01 * plain) - 28) / 20, affine=5, low_rank=4)
    assert close.fitted.runs == []


def test_a_kind_by_name_is_taken_even_where_it_loses_and_its_time_is_reckoned():
    found = choose("bias", 4, bridge_ms=0.5, bias=3)
    assert found.fitted.bridges[1, 1].kind == "bias"
    assert found.choice.prediction.speedup == pytest.approx(4 * 8 / (3 * (4 + 4 * 0.5) + 8))
    assert found.costs().draft_overhead_ms == pytest.approx(0.5)  # one bridge was kept
    assert found.costs().bridge_ms == 0.0
    assert choose("none", 4).fitted.runs == []


def test_bridges_fitted_lower_the_error_they_are_fitted_for():
    stack = DecoderStack(tiny_model(eos_token_id=None))
    fitted = BridgeFitter(stack, text(8, 24)).fit(KEEP, "affine", 0)
    assert fitted.runs and all(0 <= r.error < 1 for r in fitted.runs)
