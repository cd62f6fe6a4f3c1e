"""FIT against plain autograd, its invariances, and what it leaves behind."""

import json

import pytest
import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.rounding import dequantised, round_weight
from sdfp_vllm.planner.fisher import fisher_scores, fisher_sums, layer_scores
from sdfp_vllm.planner.fisher_sums import FisherSums
from sdfp_vllm.planner.scores import with_rounding
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.tiny_models import ARCHITECTURES, VOCAB, tiny_ids, tiny_model


def brute_force(stack: DecoderStack, ids: torch.Tensor) -> list[dict]:
    """Per-sample gradients of the whole log-likelihood, by the definition, in float64."""
    expected = []
    for i in range(stack.num_layers):
        for name, branch in (("attention", stack.attention_parameters(i)), ("mlp", stack.mlp_parameters(i))):
            parameters = [p for _, p in branch]
            trace = diagonal = 0.0
            for x in ids:
                log_probs = stack.model(input_ids=x[None]).logits[0, :-1].log_softmax(-1)
                log_p = log_probs[torch.arange(len(x) - 1), x[1:]].sum()
                gradients = torch.autograd.grad(log_p, parameters, allow_unused=True)
                for g, p in zip(gradients, parameters, strict=True):
                    if g is not None:
                        trace += g.double().pow(2).sum().item() / len(ids)
                        diagonal += (g.double() * p.detach().double()).pow(2).sum().item() / len(ids)
            theta = torch.cat([p.detach().double().flatten() for p in parameters])
            expected.append(
                {"layer": i, "branch": name, "trace": trace, "diagonal": diagonal, "theta": theta}
            )
    return expected


def flat(scores) -> torch.Tensor:
    return torch.tensor(
        [
            list(getattr(s, b).model_dump(exclude={"rounding_scores"}).values())
            for s in scores
            for b in ("total", "attention", "mlp")
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_brute_force_per_sample_gradients(architecture):
    stack, ids = DecoderStack(tiny_model(architecture)), tiny_ids()
    scores = fisher_scores(stack, ids)
    assert [s.layer for s in scores] == list(range(stack.num_layers))
    for want in brute_force(stack, ids):
        got = getattr(scores[want["layer"]], want["branch"])
        variance = want["theta"].pow(2).mean().item()
        assert want["trace"] > 0
        assert got.fisher_trace == pytest.approx(want["trace"], rel=1e-4)
        assert got.diagonal_score == pytest.approx(want["diagonal"], rel=1e-4)
        assert got.perturbation_variance == pytest.approx(variance, rel=1e-9)
        assert got.trace_score == pytest.approx(want["trace"] * variance, rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_total_covers_the_whole_layer(architecture):
    stack = DecoderStack(tiny_model(architecture))
    for i, s in enumerate(fisher_scores(stack, tiny_ids())):
        theta = torch.cat([p.detach().double().flatten() for p in stack.layers[i].parameters()])
        assert s.total.fisher_trace == pytest.approx(s.attention.fisher_trace + s.mlp.fisher_trace, rel=1e-12)
        assert s.total.diagonal_score == pytest.approx(
            s.attention.diagonal_score + s.mlp.diagonal_score, rel=1e-12
        )
        assert s.total.perturbation_variance == pytest.approx(theta.pow(2).mean().item(), rel=1e-9)
        assert s.total.trace_score == pytest.approx(
            s.total.fisher_trace * s.total.perturbation_variance, rel=1e-12
        )


def test_same_input_gives_the_same_bits():
    first = fisher_sums(DecoderStack(tiny_model()), tiny_ids())
    again = fisher_sums(DecoderStack(tiny_model()), tiny_ids())
    assert torch.equal(first.sums, again.sums)
    assert not torch.equal(first.sums, fisher_sums(DecoderStack(tiny_model()), tiny_ids(seed=2)).sums)


def test_order_of_sequences_does_not_matter():
    stack, ids = DecoderStack(tiny_model()), tiny_ids(5)
    forward, backward = fisher_scores(stack, ids), fisher_scores(stack, ids.flip(0))
    torch.testing.assert_close(flat(forward), flat(backward), rtol=1e-9, atol=0)


def test_shards_merge_in_any_order():
    stack, ids = DecoderStack(tiny_model()), tiny_ids(5)
    whole = fisher_sums(stack, ids)
    a, b, c = (fisher_sums(stack, part) for part in ids.split([1, 3, 1]))
    for merged in (a.merge(b).merge(c), c.merge(a.merge(b)), FisherSums.zero(4).merge(b).merge(c).merge(a)):
        assert merged.sequences == 5
        torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            flat(layer_scores(stack, merged)), flat(layer_scores(stack, whole)), rtol=1e-9, atol=0
        )
    with pytest.raises(SdfpError, match="cannot be merged"):
        a.merge(FisherSums.zero(3))


def test_repeating_the_text_does_not_change_the_mean():
    stack, ids = DecoderStack(tiny_model()), tiny_ids(2)
    torch.testing.assert_close(
        flat(fisher_scores(stack, ids)), flat(fisher_scores(stack, ids.repeat(3, 1))), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_moe"])
def test_gradient_checkpointing_changes_memory_not_scores(architecture):
    """Dropout in the config must stay off, although Hugging Face checkpoints in training mode only."""
    model = tiny_model(architecture, attention_dropout=0.5)
    stack, ids, runs = DecoderStack(model), tiny_ids(2), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    plain = fisher_scores(stack, ids, gradient_checkpointing=False)
    assert len(runs) == len(ids)
    recomputed = fisher_scores(stack, ids, gradient_checkpointing=True)
    assert len(runs) == 3 * len(ids), "the layer must run again in the backward pass"
    torch.testing.assert_close(flat(recomputed), flat(plain), rtol=1e-5, atol=0)
    assert not model.is_gradient_checkpointing and not any(m.training for m in model.modules())


def test_gradients_are_freed_as_they_appear():
    model = tiny_model()
    stack, alive = DecoderStack(model), []
    for p in model.model.layers.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    fisher_sums(stack, tiny_ids(2))
    assert len(alive) == 2 * sum(1 for _ in model.model.layers.parameters())
    assert set(alive) == {1}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was_found(fails):
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    before = [(m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def advance(_):
        if fails:
            raise RuntimeError("stop")

    def run():
        return fisher_sums(DecoderStack(model), tiny_ids(2), advance=advance, gradient_checkpointing=True)

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            run()
    else:
        run()
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert not model.is_gradient_checkpointing
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_works_where_the_caller_turned_gradients_off():
    stack, ids = DecoderStack(tiny_model()), tiny_ids(1)
    with torch.no_grad():
        off = fisher_sums(stack, ids)
        assert not torch.is_grad_enabled()
    assert torch.equal(off.sums, fisher_sums(stack, ids).sums)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, after, interruption):
    stack, ids, file = DecoderStack(tiny_model()), tiny_ids(5), tmp_path / "sub" / "fisher.json"
    done = []

    def advance(n):
        done.append(n)
        if sum(done) == after:
            raise interruption

    with pytest.raises(interruption):
        fisher_sums(stack, ids, advance=advance, checkpoint=file, save_every=3)
    assert json.loads(file.read_text())["sequences"] == after
    rest: list[int] = []
    resumed = fisher_sums(stack, ids, advance=rest.append, checkpoint=file, resume=True)
    assert rest == [after] + [1] * (5 - after)
    assert resumed.sequences == 5
    assert torch.equal(resumed.sums, fisher_sums(stack, ids).sums)
    assert [f.name for f in file.parent.iterdir()] == ["fisher.json"], "no temporary file is left"


def test_interruption_inside_a_backward_pass_counts_only_whole_windows(tmp_path):
    model = tiny_model()
    stack, ids, file, calls = DecoderStack(model), tiny_ids(4), tmp_path / "fisher.json", []

    def break_off(_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.up_proj.weight.register_post_accumulate_grad_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        fisher_sums(stack, ids, checkpoint=file)
    hook.remove()
    assert json.loads(file.read_text())["sequences"] == 2
    assert torch.equal(
        fisher_sums(stack, ids, checkpoint=file, resume=True).sums, fisher_sums(stack, ids).sums
    )


def test_without_resume_the_checkpoint_is_ignored(tmp_path):
    stack, ids, file = DecoderStack(tiny_model()), tiny_ids(2), tmp_path / "fisher.json"
    fisher_sums(stack, ids, checkpoint=file)
    counted: list[int] = []
    fisher_sums(stack, ids, checkpoint=file, advance=counted.append)
    assert counted == [1, 1]


@pytest.mark.parametrize("change", ["ids", "identity", "dtype", "layers"])
def test_checkpoint_of_another_run_is_refused(tmp_path, change):
    file = tmp_path / "fisher.json"
    fisher_sums(DecoderStack(tiny_model()), tiny_ids(), checkpoint=file, identity="a")
    ids = tiny_ids(seed=5) if change == "ids" else tiny_ids()
    model = tiny_model(num_hidden_layers=3) if change == "layers" else tiny_model()
    if change == "dtype":
        model = model.to(torch.bfloat16)
    with pytest.raises(SdfpError, match=r"another model.*Delete it, or run without --resume"):
        fisher_sums(
            DecoderStack(model),
            ids,
            checkpoint=file,
            resume=True,
            identity="b" if change == "identity" else "a",
        )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', '{"key": "k", "sequences": 1, "sums": "x"}'])
def test_damaged_checkpoint_is_refused(tmp_path, text):
    file = tmp_path / "fisher.json"
    file.write_text(text)
    with pytest.raises(SdfpError, match="is damaged"):
        fisher_sums(DecoderStack(tiny_model()), tiny_ids(), checkpoint=file, resume=True)


def test_unwritable_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SdfpError, match="cannot be written"):
        fisher_sums(DecoderStack(tiny_model()), tiny_ids(), checkpoint=tmp_path / "file" / "fisher.json")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "Give int64"),
        (torch.zeros(0, 4, dtype=torch.int64), "Give int64"),
        (torch.zeros(2, 1, dtype=torch.int64), "Give int64"),
        (torch.zeros(2, 4), "Give int64"),
        (torch.full((1, 4), VOCAB), f"vocabulary of {VOCAB}"),
        (torch.full((1, 4), -1), "vocabulary"),
        (torch.zeros(1, 65, dtype=torch.int64), "64 positions"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, message):
    with pytest.raises(SdfpError, match=message):
        fisher_sums(DecoderStack(tiny_model()), ids)


def test_gradient_that_is_not_finite_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(SdfpError, match="gradients are not finite"):
        fisher_sums(DecoderStack(model), tiny_ids())


def test_bfloat16_scores_rank_like_float32():
    stack, ids = DecoderStack(tiny_model()), tiny_ids(4)
    wide = flat(fisher_scores(stack, ids))
    stack.model.to(torch.bfloat16)
    torch.testing.assert_close(flat(fisher_scores(stack, ids)), wide, rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_not_touched(dtype):
    model = tiny_model().to(dtype)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    fisher_scores(DecoderStack(model), tiny_ids(1))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_layer_that_does_nothing_scores_lowest():
    """Zero output projections leave the residual stream alone: only their own gradient is left."""
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    scores = fisher_scores(DecoderStack(model), tiny_ids(4))
    assert min(scores, key=lambda s: s.total.diagonal_score).layer == 2
    assert scores[2].total.diagonal_score == 0.0


# ---------------------------------------------------------------- scores of rounding
def test_rounding_scores_are_the_trace_times_the_mean_squared_perturbation():
    # Inputs that int4's groups of 32 fit into.
    stack = DecoderStack(tiny_model(hidden_size=32, intermediate_size=64, head_dim=8))
    plain = fisher_scores(stack, tiny_ids())
    scored = with_rounding(stack, plain, ["full", "int8", "int4"])
    for i, (before, after) in enumerate(zip(plain, scored, strict=True)):
        assert after.total == before.total
        for branch in ("attention", "mlp"):
            theta = [p.detach() for _, p in getattr(stack, f"{branch}_parameters")(i)]
            count = sum(p.numel() for p in theta)
            got = getattr(after, branch)
            assert set(got.rounding_scores) == {"int8", "int4"}
            for precision, score in got.rounding_scores.items():
                squares = 0.0
                for p in theta:
                    if p.ndim == 2:  # norms stay as they are
                        rounded = dequantised(round_weight(p, precision), torch.float64)
                        squares += (rounded - p).square().sum().item()
                assert score == pytest.approx(got.fisher_trace * squares / count, rel=1e-6)
            assert 0 < got.rounding_scores["int8"] < got.rounding_scores["int4"] < got.trace_score
            unscored = got.model_copy(update={"rounding_scores": {}})
            assert unscored == getattr(before, branch)


def test_what_has_no_rounded_copy_has_no_such_score():
    stack = DecoderStack(tiny_model("mixtral"))
    for s in with_rounding(stack, fisher_scores(stack, tiny_ids()), ["full", "int8"]):
        assert set(s.attention.rounding_scores) == {"int8"} and s.mlp.rounding_scores == {}


def test_without_lower_precisions_nothing_is_scored():
    stack = DecoderStack(tiny_model())
    plain = fisher_scores(stack, tiny_ids())
    assert with_rounding(stack, plain, ["full"]) == plain
