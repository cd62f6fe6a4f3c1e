"""The search: a SuperNet that is the pipeline, true gradients, a pruner that starts open, predictions that hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdfp_vllm.common.progress import stages
from sdfp_vllm.dipgo import learn
from sdfp_vllm.dipgo.descent import evenly, greedy, path
from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.job import SearchOptions, check, find
from sdfp_vllm.dipgo.learn import LearnSettings, learn_scores
from sdfp_vllm.dipgo.macs import count_macs
from sdfp_vllm.dipgo.objective import consistency
from sdfp_vllm.dipgo.pruner import Pruner, straight_through
from sdfp_vllm.dipgo.quality import psnr, ssim
from sdfp_vllm.dipgo.refine import Reference, likeness, refine, slide, slides, surest
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.supernet import SuperNet
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.dipgo.task import Pattern, task_of
from sdfp_vllm.errors import SdfpError
from tests.support.tiny_pipelines import KINDS, tiny_sampler

SEEDS = [21, 22]


def some_gates(sampler, layout, seed=0):
    gates = np.random.default_rng(seed).random((sampler.calls, len(layout.units))) < 0.6
    gates[0] = True
    return gates


@pytest.mark.parametrize("kind", KINDS)
def test_the_supernet_with_open_gates_is_the_pipeline(kind):
    sampler = tiny_sampler(kind)
    full = sampler.latents(SEEDS)
    layout = layout_of(sampler.denoiser, "block")
    gates = torch.ones(sampler.calls, len(layout.units), requires_grad=True)
    with SuperNet(sampler, layout, "output") as net:
        assert torch.equal(net.latents(SEEDS, gates), full)
    assert torch.equal(sampler.latents(SEEDS), full)


@pytest.mark.parametrize(("kind", "granularity", "reuse"), [
    ("dit", "block", "residual"), ("pixart", "block", "output"), ("sd", "block", "output"),
    ("sdxl", "step", "output"),
])  # fmt: skip
def test_the_supernet_with_hard_gates_is_the_runtime(kind, granularity, reuse):
    sampler = tiny_sampler(kind)
    layout = layout_of(sampler.denoiser, granularity)
    gates = some_gates(sampler, layout)
    with SuperNet(sampler, layout, reuse) as net, torch.no_grad():
        searched = net.latents(SEEDS, torch.tensor(gates, dtype=torch.float32))
    with Skipping(sampler.denoiser, layout, gates, reuse, 0, sampler.scheduler.timesteps):
        run = sampler.latents(SEEDS)
    torch.testing.assert_close(searched, run, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "reuse"), [("dit", "residual"), ("sd", "output")])
def test_gate_gradients_are_the_finite_differences(kind, reuse):
    sampler = tiny_sampler(kind, steps=4)
    sampler.pipe.to(torch.float64)
    sampler.conditions.values.update(
        {k: v.double() for k, v in sampler.conditions.values.items() if torch.is_tensor(v)}
    )
    layout = layout_of(sampler.denoiser, "block")
    full = sampler.latents(SEEDS)
    gates = torch.full((sampler.calls, len(layout.units)), 0.7, dtype=torch.float64, requires_grad=True)

    with SuperNet(sampler, layout, reuse) as net:

        def loss(g):
            return consistency("latents", sampler, net.latents(SEEDS, g), full)

        (gradient,) = torch.autograd.grad(loss(gates), gates)
        assert (gradient[0] == 0).all() and (gradient[1:].abs() > 1e-9).all()
        step = 1e-4
        for t, i in [(1, 0), (2, 1), (sampler.calls - 1, len(layout.units) - 1)]:
            with torch.no_grad():
                up, down = gates.clone(), gates.clone()
                up[t, i] += step
                down[t, i] -= step
                slope = (loss(up) - loss(down)) / (2 * step)
            assert slope == pytest.approx(gradient[t, i].item(), rel=1e-4)


def test_checkpointing_changes_nothing_but_memory():
    sampler = tiny_sampler("dit")
    layout = layout_of(sampler.denoiser, "block")
    gradients = []
    for checkpointed in (True, False):
        gates = torch.tensor(some_gates(sampler, layout), dtype=torch.float32, requires_grad=True)
        with SuperNet(sampler, layout, "residual", checkpointed) as net:
            gradients += torch.autograd.grad(net.latents(SEEDS, gates).square().sum(), gates)
    torch.testing.assert_close(*gradients)


def test_the_pruner_starts_open_and_its_queries_see_each_other():
    torch.manual_seed(0)
    pruner = Pruner(calls=4, units=3, width=16, heads=2)
    keep = pruner()
    assert keep.shape == (4, 3) and (keep[0] == 1).all()
    assert (straight_through(keep) == 1).all()
    assert keep[1:].detach().flatten().tolist() == pytest.approx(
        [torch.sigmoid(torch.tensor(1.0)).item()] * 9
    )
    torch.nn.init.normal_(pruner.head)
    before = pruner().detach()
    with torch.no_grad():
        pruner.queries[5] += torch.randn(16)
    moved = (pruner().detach() - before)[1:].abs()
    assert (moved > 0).all()  # one query moved, every gate's chance with it


def test_gates_are_hard_forward_and_soft_backward():
    keep = torch.tensor([[0.2, 0.5, 0.9]], requires_grad=True)
    gates = straight_through(keep)
    assert gates.tolist() == [[0.0, 1.0, 1.0]]
    (gates * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert keep.grad.tolist() == [[1.0, 2.0, 3.0]]


def learn_setup():
    sampler = tiny_sampler("dit", steps=4)
    layout = layout_of(sampler.denoiser, "block")
    macs = count_macs(sampler.denoiser, layout, *sampler.first_call())
    return sampler, layout, macs


SETTINGS = LearnSettings(
    iterations=8, budget=0.4, learning_rate=20.0, width=16, images=2, pool=3, consistency="latents"
)


def test_the_search_prunes_and_is_reproducible():
    sampler, layout, macs = learn_setup()
    scores = learn_scores(sampler, layout, macs, "residual", SETTINGS)
    assert scores.shape == (sampler.calls, 3) and (scores[0] == 1).all()
    assert (scores[1:] < torch.sigmoid(torch.tensor(1.0)).item() - 0.01).any()
    assert (scores == learn_scores(sampler, layout, macs, "residual", SETTINGS)).all()


def test_an_interrupted_search_resumes_to_the_same_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "_SAVE_EVERY", 2)
    sampler, layout, macs = learn_setup()
    whole = learn_scores(sampler, layout, macs, "residual", SETTINGS)
    state = tmp_path / "state.pt"
    done = 0

    def interrupt(count, title=None):
        nonlocal done
        done += 1
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_scores(sampler, layout, macs, "residual", SETTINGS, state, advance=interrupt)
    assert state.exists()
    went = []
    resumed = learn_scores(
        sampler, layout, macs, "residual", SETTINGS, state, resume=True,
        advance=lambda count, title=None: went.append(count),
    )  # fmt: skip
    assert went == [4, 1, 1, 1, 1]
    assert (resumed == whole).all() and not state.exists()
    with pytest.raises(SdfpError, match="no interrupted search"):
        learn_scores(sampler, layout, macs, "residual", SETTINGS, state, resume=True)


def test_the_state_of_another_search_is_refused(tmp_path):
    sampler, layout, macs = learn_setup()
    state = tmp_path / "state.pt"
    learn._save(state, {"identity": "another", "done": 1, "pruner": {}})
    with pytest.raises(SdfpError, match="other settings"):
        learn_scores(sampler, layout, macs, "residual", SETTINGS, state, resume=True)
    state.write_bytes(b"junk")
    with pytest.raises(SdfpError, match="cannot be read"):
        learn_scores(sampler, layout, macs, "residual", SETTINGS, state, resume=True)


def projected(sampler, latents, full, count):
    """The projections that `record` draws, of a real error: (count x images,)."""
    draw = torch.Generator().manual_seed(SEEDS[0])
    return np.concatenate(
        [
            ((latents - full) * torch.randn(full.shape, generator=draw)).flatten(1).sum(1).numpy()
            for _ in range(count)
        ]
    )


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.usefixtures("latents_seen")
def test_the_prediction_is_exact_where_the_generation_is_linear(order):
    # In the last call the prediction enters the latents linearly (DDIM).
    sampler = tiny_sampler("dit")
    task = task_of(sampler, "step", "output", order, 1.0)
    full = sampler.latents(SEEDS)
    surrogate = record(sampler, task.layout, "output", order, SEEDS, 3)
    gates = np.ones((sampler.calls, 1), dtype=bool)
    assert surrogate.loss(gates) == 0
    gates[-1] = False
    real = projected(sampler, task.run(gates, SEEDS), full, 3)
    assert surrogate.loss(gates) == pytest.approx((real**2).mean(), rel=1e-3)


@pytest.mark.parametrize(("kind", "reuse"), [("dit", "residual"), ("dit", "output"), ("sd", "output")])
@pytest.mark.usefixtures("latents_seen")
def test_the_prediction_holds_near_the_recorded_generation(kind, reuse):
    sampler = tiny_sampler(kind)
    task = task_of(sampler, "block", reuse, 0, 1.0)
    full = sampler.latents(SEEDS)
    around = some_gates(sampler, task.layout, seed=2)
    surrogate = record(sampler, task.layout, reuse, 0, SEEDS, 3, around, full)
    real = projected(sampler, task.run(around, SEEDS), full, 3)
    assert surrogate.loss(around) == pytest.approx((real**2).mean(), rel=1e-3)


def test_greedy_refinement_and_choice_keep_to_the_budget_and_improve():
    sampler = tiny_sampler("dit", steps=6)
    task = task_of(sampler, "block", "residual", 0, 0.7)
    full = Reference.of(sampler, SEEDS)
    surrogate = record(sampler, task.layout, task.reuse, 0, SEEDS, 4)
    pattern = greedy(task, surrogate)
    assert task.fits(pattern.gates) and pattern.gates[0].all()
    way = path(task, surrogate, pattern)
    losses = [surrogate.loss(p.gates, p.kinds) for p in (pattern, *way)]
    assert losses == sorted(losses, reverse=True) and all(task.fits(p.gates) for p in way)
    gates = np.ones_like(pattern.gates)
    gates[1:3] = False  # the noisiest calls, where reuse hurts most
    bad = Pattern.of(gates, "0")
    assert task.fits(gates) and surrogate.loss(gates) > surrogate.loss(pattern.gates)
    *_, better = refine(task, bad, full, full, rounds=2, projections=4, at_once=2)
    assert likeness(task, better, full).mean() > likeness(task, bad, full).mean()
    assert task.fits(better.gates)


def test_sliding_moves_calls_until_no_neighbouring_place_is_better():
    sampler = tiny_sampler("dit", steps=8)
    task = task_of(sampler, "step", "output", 0, 0.5)
    full = Reference.of(sampler, SEEDS)
    gates = np.array([True] + [False] * 4 + [True] * 3)[:, None]  # the noisiest calls left out
    start = Pattern.of(gates, "0")
    assert len(slides(start)) == 1 and all(p.gates[0].all() and p.gates.sum() == 4 for p in slides(start))
    end = slide(task, start, full, generations=1000)
    reached = likeness(task, end, full).mean()
    assert reached > likeness(task, start, full).mean()
    assert all(likeness(task, p, full).mean() <= reached for p in slides(end))
    assert (
        slide(task, start, full, generations=0.4).gates == gates
    ).all()  # one trial costs half a generation


@pytest.mark.parametrize(
    ("budget", "kept"), [(1.0, "11111"), (0.6, "11010"), (0.45, "10100"), (0.2, "10000")]
)
def test_even_steps_fill_the_budget(budget, kept):
    task = task_of(tiny_sampler("dit"), "step", "output", 0, budget)
    assert ["01"[int(g)] for g in evenly(task)[:, 0]] == list(kept)


@pytest.mark.parametrize("method", ["fisher", "learned"])
def test_both_searches_end_in_gates_within_the_budget(method):
    sampler = tiny_sampler("dit", steps=6)
    options = SearchOptions(steps=6, budget=0.6, method=method, images=2, rounds=1, iterations=3)
    with stages(None) as progress:
        found = find(sampler, options, progress)
    assert found.task.macs.share(found.gates) <= 0.6 + 0.0125
    assert (found.scores is not None) == (method == "learned")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"budget": 0.0}, "--budget"), ({"budget": float("nan")}, "--budget"), ({"steps": 1}, "--steps"),
        ({"method": "magic"}, "--method"), ({"granularity": "pixel"}, "--granularity"),
        ({"order": 2}, "--order"), ({"method": "learned", "order": 1}, "--order"),
        ({"resume": True}, "--resume"), ({"images": 0}, "--images"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(changes, flag):
    with pytest.raises(SdfpError, match=f"^{flag}"):
        check(SearchOptions(**changes))


def test_a_budget_below_the_first_call_and_residuals_of_a_unet_are_refused():
    with pytest.raises(SdfpError, match=r"--budget 0\.1: is less than the first call"):
        task_of(tiny_sampler("dit"), "block", "residual", 0, 0.1)
    with pytest.raises(SdfpError, match="--reuse residual"):
        task_of(tiny_sampler("sd"), "block", "residual", 0, 0.5)


def test_quality_measures():
    image = torch.rand(2, 1, 16, 16) * 2 - 1
    assert psnr(image, image).tolist() == pytest.approx([100.0, 100.0])
    assert ssim(image, image).tolist() == pytest.approx([1.0, 1.0])
    off = (image * 0.8).clamp(-1, 1)
    expected = 10 * torch.log10(4 / (off - image).square().flatten(1).mean(1))
    assert psnr(off, image).tolist() == pytest.approx(expected.tolist())
    assert (ssim(torch.rand(2, 1, 16, 16) * 2 - 1, image) < 0.5).all()
    assert ssim(image[:, :, :8, :8], image[:, :, :8, :8]).tolist() == pytest.approx([1.0, 1.0])


def lines(sampler, task):
    """Patterns that were chosen on no image, and images to judge them on."""
    judges = Reference.of(sampler, [31, 32, 33, 34])
    return [Pattern.of(some_gates(sampler, task.layout, seed), "0") for seed in range(6)], judges


def test_a_longer_line_never_ends_worse_on_images_that_no_pattern_was_chosen_on():
    sampler = tiny_sampler("dit", steps=6)
    task = task_of(sampler, "block", "residual", 0, 0.5)
    line, judges = lines(sampler, task)
    ends = [surest(task, line[:k], judges)[1].mean().item() for k in range(1, len(line) + 1)]
    assert ends == sorted(ends) and ends[0] < ends[-1]
    last = [likeness(task, pattern, judges).mean().item() for pattern in line]
    assert last != sorted(last)  # whoever takes the last of a line ends worse with some


def test_patterns_that_fit_the_images_they_were_chosen_on_are_not_believed():
    sampler = tiny_sampler("dit", steps=6)
    task = task_of(sampler, "block", "residual", 0, 0.5)
    draw, judges = lines(sampler, task)
    line = sorted(draw, key=lambda p: -likeness(task, p, judges).mean())
    assert surest(task, line, judges)[0] is line[0]  # every one is worse than the one before
    best, reached = surest(task, line[::-1], judges)
    torch.testing.assert_close(likeness(task, best, judges), reached)
    assert reached.mean() > likeness(task, line[-1], judges).mean()
