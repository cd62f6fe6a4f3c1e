"""FIT: per-layer Fisher traces of a frozen model, streamed so that no more than one layer's gradients exist.

Sources: SDFP (arXiv 2602.05499) for ranking layers by it; FIT (arXiv 2210.08502, eq. 7-8) for
Omega = sum_l Tr(I(theta_l)) * E[dtheta_l^2], with the empirical Fisher information
Tr(I_l) = 1/N sum_i ||grad_{theta_l} log p(x_i)||^2. Removing a layer perturbs theta by -theta.

log p(x_i) is the log-likelihood of the whole window: the sum over its T - 1 predicted tokens.
Windows of text have one length, so the mean instead would scale every score by (T - 1)^-2 and
change no ranking. Texts that show images are of several lengths, and a longer one weighs more. An image's own
tokens are no targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.schema import FitScore, LayerScore
from sdfp_vllm.planner.fisher_sums import Checkpoint, FisherSums, checkpoint_key
from sdfp_vllm.planner.shown import Window, Windows, digest, predicted
from sdfp_vllm.planner.stack import DecoderStack

# Windows longer than this recompute activations instead of keeping them.
CHECKPOINTING_LENGTH = 1024
# Elements reduced at a time in float64: bounds the temporaries beside a gradient to a few MiB.
_CHUNK = 1 << 18


def fisher_scores(
    stack: DecoderStack,
    ids: Windows,
    *,
    advance: Callable[[int], None] | None = None,
    gradient_checkpointing: bool | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: str = "",
) -> list[LayerScore]:
    """Scores every decoder layer and its two branches; arguments and errors as for `fisher_sums`."""
    sums = fisher_sums(
        stack,
        ids,
        advance=advance,
        gradient_checkpointing=gradient_checkpointing,
        checkpoint=checkpoint,
        resume=resume,
        identity=identity,
    )
    return layer_scores(stack, sums)


def fisher_sums(
    stack: DecoderStack,
    ids: Windows,
    *,
    advance: Callable[[int], None] | None = None,
    gradient_checkpointing: bool | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: str = "",
    save_every: int = 8,
) -> FisherSums:
    """Sums squared gradients of log p(x_i) over the windows, one window at a time.

    Peak memory is weights + activations of one window + the gradient of one parameter. The
    model is left as it was found, except that `.grad` of its layer parameters is cleared.

    Args:
        ids: int64 [N, T] windows without padding, T >= 2; or windows of any lengths with what they show.
        advance: Called with the number of windows done since the last call (rich's
            `Progress.advance` with the task bound).
        gradient_checkpointing: None turns it on for T > CHECKPOINTING_LENGTH.
        checkpoint: File that keeps the partial sums; written every `save_every` windows and
            whenever the run ends, Ctrl-C included.
        resume: Go on from `checkpoint` if it exists; the result equals an uninterrupted run's.
        identity: What else the sums depend on (model fingerprint, seed); part of the
            checkpoint's key.

    Raises:
        SdfpError: If ids do not fit the model, a gradient is not finite, or the checkpoint is
            damaged or belongs to another run.
    """
    _check_shape(ids)
    windows = [Window(row) for row in ids] if isinstance(ids, Tensor) else list(ids)
    longest = max(len(w.ids) for w in windows)
    tokens = ids if isinstance(ids, Tensor) else torch.cat([w.ids for w in windows])
    _check_tokens(stack, tokens, longest)
    file = None
    sums = FisherSums.zero(stack.num_layers)
    if checkpoint is not None:
        dtype = next(p for _, p in stack.layer_parameters(0)).dtype
        key = checkpoint_key(tokens, stack.num_layers, str(dtype), identity + digest(windows))
        file = Checkpoint(checkpoint, key)
        if resume and (saved := file.load()):
            sums = saved.total
    if advance and sums.sequences:
        advance(sums.sequences)
    if gradient_checkpointing is None:
        gradient_checkpointing = longest > CHECKPOINTING_LENGTH
    try:
        with _streaming(stack, gradient_checkpointing) as window_sums:
            for window in windows[sums.sequences :]:
                sums = sums.merge(window_sums(window))
                if file and sums.sequences % save_every == 0:
                    file.save(sums)
                if advance:
                    advance(1)
    finally:
        # `sums` only ever changes between whole windows, so it is right wherever the run broke off.
        if file and sums.sequences:
            file.save(sums)
    return sums


def layer_scores(stack: DecoderStack, sums: FisherSums) -> list[LayerScore]:
    """Turns sums (over any number of merged shards) into the plan's scores."""
    scores = []
    for i in range(stack.num_layers):
        squares, counts = [], []
        for branch in (stack.attention_parameters(i), stack.mlp_parameters(i)):
            squares.append(sum(_square_sums(p.detach(), p.detach())[0].item() for _, p in branch))
            counts.append(sum(p.numel() for _, p in branch))
        (a_trace, a_diagonal), (m_trace, m_diagonal) = (sums.sums[i] / max(sums.sequences, 1)).tolist()
        scores.append(
            LayerScore(
                layer=i,
                total=_score(a_trace + m_trace, a_diagonal + m_diagonal, sum(squares) / sum(counts)),
                attention=_score(a_trace, a_diagonal, squares[0] / counts[0]),
                mlp=_score(m_trace, m_diagonal, squares[1] / counts[1]),
            )
        )
    return scores


def _score(trace: float, diagonal: float, variance: float) -> FitScore:
    return FitScore(
        fisher_trace=trace,
        perturbation_variance=variance,
        trace_score=trace * variance,
        diagonal_score=diagonal,
    )


@contextlib.contextmanager
def _streaming(stack: DecoderStack, gradient_checkpointing: bool) -> Iterator[Callable[[Window], FisherSums]]:
    """Yields a function from one window to its sums; undoes all it did to the model."""
    model = stack.model
    layers = range(stack.num_layers)
    slots = [
        (i, branch, p)
        for i in layers
        for branch, parameters in enumerate((stack.attention_parameters(i), stack.mlp_parameters(i)))
        for _, p in parameters
    ]
    # One row per parameter, so that the result does not depend on the order in which hooks fire.
    reduced = torch.zeros(len(slots), 2, dtype=torch.float64, device=stack.device)

    def reduce(slot: int) -> Callable[[nn.Parameter], None]:
        def hook(p: nn.Parameter) -> None:
            assert p.grad is not None
            reduced[slot] = _square_sums(p.grad, p.detach())
            p.grad = None

        return hook

    def window_sums(window: Window) -> FisherSums:
        reduced.zero_()
        targets = window.targets().to(stack.device)
        logits = stack.logits(window.ids[None].to(stack.device), shown=[window.shown])[0, :-1]
        # The mean keeps gradients of half-precision models in range; scaled back to the sum below.
        F.cross_entropy(logits.float(), targets).backward()
        per_branch = torch.zeros(stack.num_layers, 2, 2, dtype=torch.float64)
        for (i, branch, _), row in zip(slots, reduced.cpu(), strict=True):
            per_branch[i, branch] += row
        if not per_branch.isfinite().all():
            layer = int((~per_branch.isfinite()).any(dim=2).any(dim=1).nonzero()[-1])
            raise SdfpError(
                "model",
                f"its gradients are not finite in {logits.dtype} (from layer {layer} down)",
                "Score the model in float32 (or bfloat16, if it is float16 now), and check its weights for NaN.",
            )
        return FisherSums(1, per_branch * float(predicted(targets)) ** 2)

    modes = [(m, m.training) for m in model.modules()]
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    checkpointing = model.is_gradient_checkpointing
    handles = []
    try:
        model.eval()
        model.requires_grad_(False)
        for slot, (_, _, p) in enumerate(slots):
            p.grad = None
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(reduce(slot)))
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            # Hugging Face checkpoints only in training mode, which would also turn on dropout:
            # the flag is set on the layer alone, its children stay in eval mode.
            for layer in stack.layers:
                layer.training = True
        elif checkpointing:
            model.gradient_checkpointing_disable()
        with torch.enable_grad():
            yield window_sums
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in frozen:
            p.requires_grad_(flag)
        for _, _, p in slots:
            p.grad = None
        if gradient_checkpointing and not checkpointing:
            model.gradient_checkpointing_disable()
        elif checkpointing and not gradient_checkpointing:
            model.gradient_checkpointing_enable()
        for module, mode in modes:
            module.training = mode


def _square_sums(x: Tensor, times: Tensor) -> Tensor:
    """(sum x^2, sum (x * times)^2) of two same-shaped tensors, float64 [2] on their device."""
    sums = torch.zeros(2, dtype=torch.float64, device=x.device)
    for part, factor in zip(x.reshape(-1).split(_CHUNK), times.reshape(-1).split(_CHUNK), strict=True):
        wide = part.double()
        sums[0] += torch.dot(wide, wide)
        wide = wide * factor  # not in place: `part` itself in a float64 model
        sums[1] += torch.dot(wide, wide)
    return sums


def _check_shape(ids: Windows) -> None:
    if not isinstance(ids, Tensor):
        ids = ids[0].ids[None] if ids else torch.empty(0, 0)
    if ids.ndim != 2 or ids.dtype != torch.int64 or len(ids) == 0 or ids.shape[1] < 2:
        raise SdfpError(
            "calibration ids",
            f"shape {tuple(ids.shape)}, {ids.dtype}",
            "Give int64 [N, T] with N >= 1 and T >= 2.",
        )


def _check_tokens(stack: DecoderStack, ids: Tensor, length: int) -> None:
    vocabulary = stack.config.vocab_size
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise SdfpError(
            "calibration ids",
            f"token {int(ids.max())} is outside the model's vocabulary of {vocabulary}",
            "Use the tokenizer saved with this model.",
        )
    longest = getattr(stack.config, "max_position_embeddings", None)
    if longest and length > longest:
        raise SdfpError(
            "calibration ids",
            f"windows of {length} tokens exceed the model's {longest} positions",
            f"Ask for windows of at most {longest} tokens.",
        )
