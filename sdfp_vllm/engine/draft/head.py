"""The draft's own head: fewer rows of the target's, gathered once, or rounded ones.

Nothing of the target's head is written anew. What computes the logits is a twin of the target in which
the head's module alone is replaced, by one that holds the wanted rows, so that scaling, soft cap, bias
and head dtype are the target's own code. Whether that code does with the rows what it does with the
whole is checked on a row of hidden states at load.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.engine.draft.adapters import over_rows, padded_rows, without_adapters
from sdfp_vllm.engine.draft.rounded_linear import RoundedLinear
from sdfp_vllm.engine.draft.rounded_weights import ROWS
from sdfp_vllm.engine.draft.twins import RoundedMethod
from sdfp_vllm.engine.upstream.symbols import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
    init_logger,
)
from sdfp_vllm.plan.view import Precision

logger = init_logger(f"vllm.{__name__}")

# Where vLLM's models keep the module whose rows are the vocabulary; tried in this order.
_PLACES = (("lm_head",), ("model", "embed_tokens"))
# Kernels round differently over other numbers of rows, and rounded ones on purpose; a scale or a cap that is missing
# differs by more.
_TOLERANCE = {False: 0.02, True: 0.1}

Head = Callable[[Tensor], Tensor]


def padded(compute: Head, rows: Sequence[int]) -> Head:
    """`compute` over the numbers of rows that are fastest.

    Args:
        compute: Maps [T, hidden] to logits [T, vocab_size].
        rows: How many to run 1, 2, ... rows with; more than there are run as they come.
    """

    def run(hidden: Tensor) -> Tensor:
        count = len(hidden)
        spare = padded_rows(count, rows) - count
        return compute(nn.functional.pad(hidden, (0, 0, 0, spare)))[:count] if spare else compute(hidden)

    return run


class _Rows(nn.Module):
    """Rows of a vocabulary-parallel head, called by the target's logits processor like the head itself.

    Args:
        rows: Which of this rank's rows, int64 [N]; None for all.
    """

    def __init__(self, head: Any, rows: Tensor | None, precision: Precision):
        super().__init__()
        self.tp_size = head.tp_size
        self.weight: Any = None
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else nn.Parameter(_of(bias, rows), requires_grad=False)
        self._source, self._rows, self._precision = (
            [head],
            rows,
            precision,
        )  # in a list: no child of this module
        self.quant_method: Any = None
        self.take()

    def take(self) -> None:
        """Takes the rows from the head as it is now."""
        (head,) = self._source
        weight = _of(head.weight, self._rows)
        if self._precision == "full" and self.weight is not None and weight.device.type != "cpu":
            self.weight.data.copy_(weight)  # a captured graph reads these very rows
        elif self._precision == "full":
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.quant_method = UnquantizedEmbeddingMethod()
            self.quant_method.process_weights_after_loading(
                self
            )  # on a CPU: packs the rows for its fast product
        elif self.quant_method is None:
            self.quant_method = RoundedMethod(
                RoundedLinear(weight, None, self._precision, name="a draft's head")
            )
        else:
            self.quant_method.rounded.refresh(weight)

    @property
    def nbytes(self) -> int:
        """What the rows take, beside the target's."""
        if self._precision != "full":
            return self.quant_method.rounded.nbytes
        (head,) = self._source
        count = head.weight.shape[0] if self._rows is None else len(self._rows)
        return count * head.weight.shape[1] * head.weight.element_size()


def _of(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor.detach() if rows is None else tensor.detach()[rows]


class DraftHead:
    """The head over M tokens, or all: full-width logits, -inf for every other token.

    Args:
        compute: Maps [T, hidden] to the logits of the rows of all ranks, [T, N].
        columns: int64 [M], where among the N the tokens are; None if they are just these, in order.
        tokens: int64 [M], ascending; None for all.
        vocab_size: Width of the logits.
        rows: Holds the weights.
    """

    def __init__(
        self, compute: Head, columns: Tensor | None, tokens: Tensor | None, vocab_size: int, rows: _Rows
    ):
        self._compute, self._columns = compute, columns
        self.tokens, self.vocab_size, self.rows = tokens, vocab_size, rows

    @property
    def nbytes(self) -> int:
        """What it takes beside the target's head, on this rank."""
        return self.rows.nbytes

    def describe(self) -> str:
        """In words, for the log."""
        count = "all" if self.tokens is None else f"{len(self.tokens)} of {self.vocab_size}"
        return f"{count} logits in {self.rows._precision} precision"

    def gathered(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> logits of the tokens, [T, M]."""
        logits = self._compute(hidden)
        return logits if self._columns is None else logits[:, self._columns]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> [T, vocab_size]; a new tensor, which the sampler may overwrite."""
        logits = self.gathered(hidden)
        if self.tokens is None:
            return logits
        full = logits.new_full((len(logits), self.vocab_size), -torch.inf)
        return full.index_copy_(1, self.tokens, logits)


@torch.inference_mode()
def draft_head(target: Any, tokens: Tensor | None, precision: Precision = "full") -> DraftHead | None:
    """The head over `tokens`, int64 [M] ascending (None: all), at `precision`; None where that is the target's own.

    None, with the reason logged, also where it cannot be done: without it the draft uses the full head, which is
    always right. Every tensor-parallel rank must call this.
    """
    if tokens is None and precision == "full":
        return None
    # A multimodal model has its head inside its language model, or beside it.
    inner = target.get_language_model() if hasattr(target, "get_language_model") else target
    reason = "its head was not found at " + " or ".join(".".join(place) for place in _PLACES)
    for model, place in itertools.product(dict.fromkeys((inner, target)), _PLACES):
        head = without_adapters(_at(model, place))
        if getattr(head, "weight", None) is None:
            continue
        if not isinstance(head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod):
            reason = f"its head is quantised ({type(head.quant_method).__name__})"
            break
        rows = columns = None
        gathered = head.org_vocab_size
        if tokens is not None:
            tokens = tokens.to(head.weight.device)
            rows, columns, gathered = _shares(head, tokens)
            if gathered > head.org_vocab_size:
                reason = "its tokens lie too unevenly over the tensor-parallel ranks"
                break
        own = _Rows(head, rows, precision)
        twin = _with(model, place, own)
        if tokens is not None and "logits_processor" in model._modules:
            processor = over_rows(model.logits_processor, _tokens_of(columns, tokens, gathered))
            twin = _with(twin, ("logits_processor",), processor)
        row = torch.randn(1, head.weight.shape[1], dtype=_dtype(model), device=head.weight.device)
        whole, part = target.compute_logits(row), twin.compute_logits(row)
        if part.shape[1] != (gathered if tokens is not None else whole.shape[1]):
            continue  # this module is not the one that computes the logits
        made = DraftHead(twin.compute_logits, columns, tokens, whole.shape[1], own)
        wanted = whole if tokens is None else whole[:, tokens]
        if (made.gathered(row) - wanted).abs().max() <= _TOLERANCE[precision != "full"] * whole.abs().max():
            vars(head)[ROWS] = own  # weights that are loaded anew pass by there
            return made
        reason = "its logits are computed in a way that rows of the head do not reproduce"
    logger.warning(
        "SDFP drafts with the full head of %s, not with the plan's (%s tokens, %s): %s. Output does not change, "
        "drafting costs more than the plan reckons with.",
        type(target).__name__,
        "all" if tokens is None else len(tokens),
        precision,
        reason,
    )
    return None


def _shares(head: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """This rank's rows, int64 [N / ranks]; where the tokens are among all ranks' rows (None: in order); and N.

    Each rank holds a stretch of the vocabulary. Ranks gather equally many logits, so those with fewer
    tokens repeat their first row.
    """
    if head.tp_size == 1:
        return tokens, None, len(tokens)
    stretch = head.shard_indices.num_org_elements_padded
    rank = head.shard_indices.padded_org_vocab_start_index // stretch
    owner = tokens // stretch
    counts = torch.bincount(owner, minlength=head.tp_size)
    widest = int(counts.max())
    rows = torch.zeros(widest, dtype=torch.int64, device=tokens.device)
    own = tokens[owner == rank] - rank * stretch
    rows[: len(own)] = own
    first = counts.cumsum(0) - counts
    columns = owner * widest + torch.arange(len(tokens), device=tokens.device) - first[owner]
    return rows, columns, widest * head.tp_size


def _at(model: nn.Module, place: tuple[str, ...]) -> Any:
    """The submodule at `place`, or None."""
    for name in place:
        model = getattr(model, name, None)  # type: ignore[assignment]
    return model


def _tokens_of(columns: Tensor | None, tokens: Tensor, count: int) -> Tensor:
    """Which token each of the `count` gathered logits is of, int64 [count]; some ranks repeat a row, which is no one's."""
    return tokens if columns is None else tokens.new_zeros(count).index_copy_(0, columns, tokens)


def _with(model: nn.Module, place: tuple[str, ...], module: nn.Module) -> Any:
    """A twin of `model` that shares everything with it but the submodule at `place`."""
    name, *rest = place
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    old = model._modules[name]
    assert old is not None
    new = _with(old, tuple(rest), module) if rest else module
    twin.__dict__["_modules"] = {**model._modules, name: new}
    return twin


def _dtype(model: nn.Module) -> torch.dtype:
    """Of hidden states: a head may be kept in another one."""
    return next(model.model.parameters()).dtype  # type: ignore[union-attr]
