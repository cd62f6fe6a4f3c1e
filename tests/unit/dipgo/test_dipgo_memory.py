"""What a recording holds: the same table whatever the memory, one call's activations, and the rest in files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.dipgo import spill as spill_module
from sdfp_vllm.dipgo import surrogate as surrogate_module
from sdfp_vllm.dipgo.forecast import KINDS
from sdfp_vllm.dipgo.job import SearchOptions, check
from sdfp_vllm.dipgo.room import limit, room_for
from sdfp_vllm.dipgo.spill import Spill
from sdfp_vllm.dipgo.streams import argument
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.errors import SdfpError
from tests.support.tiny_pipelines import STEPS, tiny_sampler
from tests.unit.dipgo.test_dipgo_runtime import gates_of

SEEDS = [21, 22, 23]


@pytest.fixture
def spills(monkeypatch):
    """All spills of recordings, in which no tensor is too small for a file."""
    made = []

    class Noted(Spill):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(surrogate_module, "Spill", Noted)
    monkeypatch.setattr(spill_module, "_SMALL", 0)
    return made


def table(sampler, memory, reuse, gates=None, kinds=None):
    sampler.memory, layout = memory, sampler.layout("block")
    full = torch.zeros_like(sampler.decode(sampler.latents(SEEDS))).detach()
    made = record(sampler, layout, reuse, 1, SEEDS, 2, gates, full, kinds)
    return made._table, made.offset


@pytest.mark.parametrize(
    ("kind", "reuse"), [("dit", "residual"), ("flux", "residual"), ("qwen", "output"), ("sd", "output")]
)
def test_the_table_is_the_same_whatever_the_memory(kind, reuse, spills):
    sampler = tiny_sampler(kind)
    layout = sampler.layout("block")
    gates = gates_of(sampler, layout, seed=2)
    kinds = np.random.default_rng(0).choice(list(KINDS), gates.shape)
    expected, offset = table(sampler, None, reuse, gates, kinds)
    assert len(spills) == 1 and not spills[0].most_stored
    for memory in (1, spills[0].most_held // 2):
        spills.clear()
        bounded, other = table(sampler, memory, reuse, gates, kinds)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(bounded, expected, atol=2e-5 * scale)
        np.testing.assert_allclose(other, offset, atol=2e-5 * np.abs(offset).max())
        assert all(s.most_held <= memory for s in spills)
        assert memory > 1 or all(s.most_stored for s in spills)
        assert all(s.held == s.stored == 0 and s._folder is None for s in spills)
    assert len(spills) > 1  # fewer images at once


def kept_in_one_graph(sampler, residual):
    """The same inner products from one graph of the whole generation, by plain hooks: (images, units, steps, steps)."""
    modules = sampler.layout("block").modules(sampler.denoiser)
    values, taps = [[] for _ in modules], [[] for _ in modules]

    def note(i):
        def hook(unit, args, kwargs, output):
            entered = argument(unit, "hidden_states", args, kwargs).detach() if residual else 0
            values[i].append(output.detach() - entered)
            taps[i].append(torch.zeros_like(output).requires_grad_())
            return output + taps[i][-1]

        return modules[i].register_forward_hook(hook, with_kwargs=True)

    handles = [note(i) for i in range(len(modules))]
    images = surrogate_module.seen(sampler, sampler.latents(SEEDS))
    for handle in handles:
        handle.remove()
    draw = torch.Generator().manual_seed(SEEDS[0])
    found = []
    for _ in range(2):
        v = torch.randn(images.shape, generator=draw)
        flat = [tap for row in taps for tap in row]
        grads = torch.autograd.grad((images * v).sum(), flat, retain_graph=True)
        u = torch.stack(grads).unflatten(0, (len(modules), -1))
        a = torch.stack([torch.stack(row) for row in values])
        # (units, steps, halves of guidance, images, ...)
        u, a = (x.unflatten(2, (-1, len(SEEDS))).flatten(4) for x in (u, a))
        found.append(torch.einsum("itgbd,isgbd->bits", u, a))
    return torch.cat(found).numpy()


@pytest.mark.parametrize("reuse", ["residual", "output"])
def test_the_table_is_that_of_one_graph_of_everything(reuse):
    sampler = tiny_sampler("dit")
    expected = kept_in_one_graph(sampler, reuse == "residual")
    made = record(sampler, sampler.layout("block"), reuse, 0, SEEDS, 2)._table
    np.testing.assert_allclose(made, np.tril(expected), atol=2e-5 * np.abs(expected).max())


def test_more_steps_take_their_values_and_no_activations(spills):
    held = {}
    for steps in (4, 8):
        sampler = tiny_sampler("dit", steps=steps)
        record(sampler, sampler.layout("block"), "residual", 0, SEEDS, 1)
        held[steps] = spills.pop().most_held
    sampler.memory = 1 << 30
    together, spare = room_for(sampler, sampler.layout("block"), True, 1, len(SEEDS))
    assert together == len(SEEDS)
    values = 4 * 3 * 2 * len(SEEDS) * 16 * 16 * 4  # four steps, three blocks, guidance, tokens, width, bytes
    assert values <= held[8] - held[4] < values + 4 * 20_000 < spare
    activations = spare - values // 4  # less the adjoints of a step
    assert held[4] < 2 * activations + values


def test_half_precision_is_recorded(spills):
    sampler = tiny_sampler("dit")
    expected, _ = table(sampler, None, "residual")
    sampler.pipe.to(torch.bfloat16)
    sampler = sampler.with_steps(STEPS)  # its first calls are in half precision too
    whole, _ = table(sampler, None, "residual")
    bounded, _ = table(sampler, 1, "residual")
    assert np.corrcoef(whole.flatten(), expected.flatten())[0, 1] > 0.7  # rounding grows on random weights
    assert np.corrcoef(whole.flatten(), bounded.flatten())[0, 1] > 0.98


def test_a_limit_makes_fewer_images_at_once():
    sampler = tiny_sampler("sd")
    with torch.no_grad():
        latents = sampler.latents(SEEDS)
        images = sampler.decode(latents)
    rows = []
    sampler.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    limit(sampler, None)
    assert sampler.at_once > 100 and sampler.memory > 1 << 20
    limit(sampler, 1)
    assert sampler.at_once == 1
    rows.clear()
    with torch.no_grad():
        torch.testing.assert_close(sampler.latents(SEEDS), latents, atol=1e-3, rtol=1e-2)
        assert torch.equal(sampler.decode(latents), images)
    assert rows == [2] * len(SEEDS) * STEPS  # the two of guidance


@pytest.mark.parametrize("limited", [None, 0])
def test_a_spill_gives_back_what_it_took(limited, monkeypatch):
    monkeypatch.setattr(spill_module, "_SMALL", 0)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, generator=draw)
    tensors = [
        x, x.bfloat16(), x > 0, torch.complex(x, x), x.to(memory_format=torch.channels_last), x.transpose(1, 3),
        x[:, 1:, ::2], torch.tensor(3.0), torch.ones(1).expand(7, 3), torch.arange(5), torch.zeros(0, 3),
    ]  # fmt: skip
    with Spill(limited) as spill:
        kept = [spill.keep(t) for t in tensors]
        for before, after in zip(tensors, [k.get() for k in kept], strict=True):
            assert torch.equal(before, after) and before.dtype == after.dtype
        assert after.data_ptr() != before.data_ptr() or not before.numel()
        assert (spill.held > 0) == (limited is None) and (spill.stored > 0) == (limited == 0)
        del kept, before, after
        assert spill.held == spill.stored == 0


def test_weights_and_tensors_saved_twice_count_once():
    weight, x = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(3, 4, requires_grad=True)
    with Spill(None, [weight]) as spill:
        with spill.saving():
            y = (x @ weight).exp() * x * x  # saves x, exp's output, and x times it
        assert spill.held == 3 * x.nbytes
        y.sum().backward()
        assert x.grad is not None and weight.grad is not None
        del y
        assert spill.held == 0


def test_what_is_written_into_before_its_gradient_is_taken_is_an_error():
    x = torch.ones(3, requires_grad=True)
    with Spill() as spill:
        with spill.saving():
            y = x.exp()
            z = y * y
        y.detach().add_(1)
        with pytest.raises(SdfpError, match="writes into a tensor that its gradients need"):
            z.sum().backward()


def test_a_full_disk_is_named(monkeypatch):
    with Spill(0) as spill:
        monkeypatch.setattr(Spill, "path", lambda self: spill_module.Path("/nowhere/at/all"))
        with pytest.raises(SdfpError, match="Give more --memory, or set TMPDIR"):
            spill.keep(torch.ones(1 << 14))
        assert spill.stored == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"memory": 0}, "--memory: is 0"),
        ({"memory": 9, "method": "learned"}, "the learned search makes none"),
    ],
)
def test_bad_limits_are_refused(changes, reason):
    with pytest.raises(SdfpError, match=reason):
        check(SearchOptions(**changes))


def test_the_command_takes_an_amount():
    result = CliRunner().invoke(app, ["dipgo", "search", "nowhere", "--memory", "much"])
    assert "--memory: 'much' is no amount of memory" in result.output
    result = CliRunner().invoke(app, ["dipgo", "search", "nowhere", "--memory", "30%"])
    assert "no amount" not in result.output and result.exit_code
