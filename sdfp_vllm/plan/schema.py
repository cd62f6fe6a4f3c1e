"""SkipPlan: what is stored in a plan, and what makes it consistent."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sdfp_vllm.pacing.record import CONFIDENCE_EDGES, Pacing
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.families import SUBLAYER_ARCHITECTURES
from sdfp_vllm.plan.fingerprint import Fingerprint
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import BRANCHES, DraftView, Mode, Precision
from sdfp_vllm.plan.window import DraftWindow

SCHEMA_VERSION = 3
MAX_DRAFT_TOKENS = 32
MAX_BRIDGE_RANK = 64

Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Layer = Annotated[int, Field(ge=0, strict=True)]
DraftTokens = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS, strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FitScore(_Strict):
    """Sensitivity of one block of parameters (SDFP, arXiv 2602.05499; FIT, arXiv 2210.08502).

    With the empirical Fisher diagonal F_j over N sequences and parameters theta_j:
    `fisher_trace` = sum_j F_j; `perturbation_variance` = mean_j theta_j^2 (removing a block
    perturbs theta by -theta); `trace_score` = fisher_trace * perturbation_variance;
    `diagonal_score` = sum_j F_j * theta_j^2. Rounding perturbs by q(theta) - theta instead:
    `rounding_scores` holds fisher_trace * mean_j (q(theta_j) - theta_j)^2 by precision.
    """

    fisher_trace: NonNegative
    perturbation_variance: NonNegative
    trace_score: NonNegative
    diagonal_score: NonNegative
    rounding_scores: dict[Precision, NonNegative] = {}


class LayerScore(_Strict):
    """Scores of decoder layer `layer`: the whole, and its two residual branches."""

    layer: Layer
    total: FitScore
    attention: FitScore
    mlp: FitScore


class Candidate(_Strict):
    """One point of the searched curve: a view (as in the plan) and what it is predicted to give.

    `acceptance[j]` is the chance that draft token j is accepted given that all before it
    were; `speedup[k]` the predicted tokens per second over plain decoding's with k draft
    tokens a round (`speedup[0]` = 1).
    """

    attention: list[Mode]
    mlp: list[Mode]
    acceptance: list[Probability]
    speedup: list[NonNegative]

    @property
    def view(self) -> DraftView:
        return _view(tuple(self.attention), tuple(self.mlp))

    @property
    def keep(self) -> KeepSet:
        return self.view.keep


class Prediction(_Strict):
    """What the plan promises for the keep set and draft length it names."""

    acceptance_rate: Probability
    mean_accepted_length: NonNegative
    speedup: NonNegative


class BridgeRun(_Strict):
    """A bridge over the skipped layers `first` to `last`.

    `regularisation` is the ridge penalty over the inputs' mean square, chosen on held-out tokens;
    `error` the error left there, as a share of what skipping without a bridge leaves.
    """

    first: Layer
    last: Layer
    regularisation: NonNegative
    error: NonNegative


class Bridges(_Strict):
    """Bridges over runs of skipped layers (`plan/bridge.py` has the formulas).

    Their tensors lie in `bridges.safetensors` beside the plan, a name that no plan can change;
    `sha256` is that file's.
    """

    kind: Literal["bias", "affine", "low-rank"]
    rank: Annotated[int, Field(ge=0, le=MAX_BRIDGE_RANK, strict=True)]
    runs: list[BridgeRun] = Field(min_length=1)
    sha256: Sha256

    @model_validator(mode="after")
    def _rank_fits_kind(self) -> Bridges:
        if (self.kind == "low-rank") != (self.rank > 0):
            raise ValueError(f"kind {self.kind} has rank {self.rank}")
        return self


class DraftHead(_Strict):
    """The draft's head: over `tokens` ids only (None: all), which are then all it proposes, and at which precision.

    The ids lie in `head.safetensors` beside the plan, a name that no plan can change; `sha256` is that
    file's. `coverage` is the share of tokens in the target's own text that are among them, on text they
    were not chosen by.
    """

    tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    precision: Precision = "full"
    coverage: Probability = 1.0
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _file_fits_tokens(self) -> DraftHead:
        if (self.tokens is None) != (self.sha256 is None):
            raise ValueError("a head over some tokens has a file with a hash, one over all has none")
        return self


class StoredView(_Strict):
    """What drafts: for each layer's attention and MLP whether it runs and at which precision; bridges; the head; how much of
    a long context is attended to (None: all)."""

    attention: list[Mode] = Field(min_length=1)
    mlp: list[Mode] = Field(min_length=1)
    bridges: Bridges | None = None
    head: DraftHead = DraftHead()
    window: DraftWindow | None = None

    @classmethod
    def of(
        cls,
        view: KeepSet,
        num_layers: int,
        bridges: Bridges | None = None,
        head: DraftHead | None = None,
        window: DraftWindow | None = None,
    ) -> StoredView:
        """As it is stored for a model of `num_layers` layers."""
        full = DraftView.of(view)
        attention, mlp = (full.modes(branch, num_layers) for branch in BRANCHES)
        head = head or DraftHead()
        return cls(attention=attention, mlp=mlp, bridges=bridges, head=head, window=window)

    @property
    def branches(self) -> DraftView:
        """What runs, and how."""
        return _view(tuple(self.attention), tuple(self.mlp))


class Chances(_Strict):
    """How often drafts are accepted, as tried on the target's own text.

    Attributes:
        acceptance: Chance that draft token j is accepted, given that all before it were.
        confidence: Per bin of CONFIDENCE_EDGES, the chance that a draft of such confidence is accepted.
    """

    acceptance: list[Probability] = Field(min_length=1)
    confidence: list[Probability] = Field(
        min_length=len(CONFIDENCE_EDGES) + 1, max_length=len(CONFIDENCE_EDGES) + 1
    )


class Speeds(_Strict):
    """Tokens per second on the same prompts, batch 1, decoding alone.

    Attributes:
        plain, drafted: Plain vLLM in the plan's dtype, and this plan with drafts of the model alone.
        copies: This plan with copies from the context, as the engine drafts by default.
        other: Plain vLLM in the checkpoint's own dtype, where that is another one; `other_dtype` names it.
        acceptance_rate: Accepted over drafted tokens, without copies.
        identical: How many of `prompts` answers equal plain vLLM's.
    """

    plain: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    drafted: NonNegative
    copies: NonNegative
    other: NonNegative | None = None
    other_dtype: str | None = None
    acceptance_rate: Probability
    mean_accepted_length: NonNegative
    prompts: int = Field(ge=1)
    identical: int = Field(ge=0)
    engine: Literal["eager", "compiled"]


class WindowTried(_Strict):
    """Drafts after texts of `context` tokens, batch 1, that see the last `last` of them (None: all)."""

    context: int = Field(ge=1, strict=True)
    last: Annotated[int, Field(ge=1, strict=True)] | None
    tokens_per_second: NonNegative
    acceptance_rate: Probability


class Provenance(_Strict):
    """How the plan was made; enough to make it again."""

    calibration: str
    calibration_tokens: int = Field(ge=0)
    score_text: Literal["own", "corpus"] = "corpus"
    seed: int
    selector: str
    created: str
    sdfp_version: str
    torch_version: str
    transformers_version: str
    git_sha: str | None = None


class SkipPlan(_Strict):
    """Which view of the target drafts, how many tokens a round, and why.

    `draft_tokens_by_batch` holds (largest batch size, draft length) pairs, ascending; the
    draft length for a batch larger than the last is that of the last. `worthwhile` is false
    where plain decoding was as fast on the machine that made the plan: measured, where `check` holds a
    measurement, else predicted. `extra_bytes` is what rounded copies of weights take beside the model's.
    `revision` is what was asked for of a `model` that is an id; None for the hub's default.
    """

    schema_version: Literal[3] = 3
    model: str
    revision: str | None = None
    fingerprint: Fingerprint
    view: StoredView
    extra_bytes: Annotated[int, Field(ge=0, strict=True)] = 0
    num_speculative_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS, strict=True)]
    draft_tokens_by_batch: list[tuple[Annotated[int, Field(ge=1, strict=True)], DraftTokens]] = []
    worthwhile: bool
    prediction: Prediction
    scores: list[LayerScore]
    curve: list[Candidate]
    costs: Costs | None = None
    chances: Chances | None = None
    check: Speeds | None = None
    windows: list[WindowTried] = []
    made: Provenance

    @field_validator("draft_tokens_by_batch")
    @classmethod
    def _batches_ascend(cls, table: list[tuple[int, int]]) -> list[tuple[int, int]]:
        sizes = [size for size, _ in table]
        if sizes != sorted(set(sizes)):
            raise ValueError("batch sizes must ascend")
        return table

    @model_validator(mode="after")
    def _layers_exist(self) -> SkipPlan:
        n = self.fingerprint.num_layers
        views: list[tuple[str, StoredView | Candidate]] = [("view", self.view)]
        views += [(f"curve[{i}]", c) for i, c in enumerate(self.curve)]
        for name, of in views:
            if not len(of.attention) == len(of.mlp) == n:
                raise ValueError(
                    f"{name} has {len(of.attention)} attention and {len(of.mlp)} mlp, the model {n} layers"
                )
            if set(of.attention) | set(of.mlp) == {"skip"}:
                raise ValueError(f"{name} skips every branch: nothing would draft")
        architecture = self.fingerprint.architecture
        if self.keep.partial and architecture not in SUBLAYER_ARCHITECTURES:
            raise ValueError(
                f"view skips one branch of a layer and not the other: {architecture} drafts with whole layers only"
            )
        bridges = self.view.bridges
        if bridges is not None and self.keep.partial:
            raise ValueError("bridges belong to whole layers, but the view skips single branches")
        if bridges is not None:
            skipped = runs_skipped(self.keep.layers, n)
            runs = [(r.first, r.last) for r in bridges.runs]
            if runs != sorted(set(runs)) or not set(runs) <= skipped:
                raise ValueError(
                    f"bridges name the runs {runs}, which are not runs of skipped layers in order"
                )
        # Lengths first: a damaged layer count may be astronomical.
        if self.scores and (len(self.scores) != n or any(s.layer != i for i, s in enumerate(self.scores))):
            raise ValueError(f"scores must list layers 0 to {n - 1} once each, in order")
        return self

    @model_validator(mode="after")
    def _head_is_smaller(self) -> SkipPlan:
        tokens = self.view.head.tokens
        if tokens is not None and tokens >= self.fingerprint.vocab_size:
            raise ValueError(f"head has {tokens} tokens of a vocabulary of {self.fingerprint.vocab_size}")
        return self

    @model_validator(mode="after")
    def _costs_are_the_views(self) -> SkipPlan:
        costs, view = self.costs, self.view.branches
        if costs is None:
            return self
        if costs.num_layers != self.fingerprint.num_layers:
            raise ValueError(
                f"costs are of {costs.num_layers} layers, the model has {self.fingerprint.num_layers}"
            )
        if unmeasured := self.used_precisions() - set(costs.precisions):
            raise ValueError(f"costs have no times for {', '.join(sorted(unmeasured))}, which the view uses")
        if not all(0.0 < costs.step_ms(view, m) < math.inf for m in costs.rows):
            raise ValueError("costs: a draft step must take time at each of rows")
        return self

    @property
    def model_argument(self) -> str:
        """The model as commands take it, with its revision."""
        return self.model + (f" --revision {self.revision}" if self.revision else "")

    @property
    def keep(self) -> KeepSet:
        """What drafts, whatever the precision."""
        return self.view.branches.keep

    @property
    def promised_speedup(self) -> float:
        """What the engine's default drafting gave over plain decoding; where it was not measured, the prediction."""
        return self.check.copies / self.check.plain if self.check else self.prediction.speedup

    def used_precisions(self) -> set[Mode]:
        """The precisions that the view's branches run at."""
        return {*self.view.attention, *self.view.mlp} - {"skip"}

    def with_window(self, window: DraftWindow | None) -> SkipPlan:
        """The same plan with drafts that attend through `window`; what it promises was tried with its own."""
        return self.model_copy(update={"view": self.view.model_copy(update={"window": window})})

    def at_full_precision(self) -> SkipPlan:
        """The same plan without rounded copies: what it promises is then not what was tried."""
        keep, head = self.keep, self.view.head.model_copy(update={"precision": "full"})
        view = StoredView.of(keep, self.fingerprint.num_layers, self.view.bridges, head, self.view.window)
        costs = self.costs and self.costs.model_copy(update={"draft_head": None})
        rows = (head.tokens or 0) * self.fingerprint.hidden_size
        wide = 4 if self.costs and self.costs.dtype == "float32" else 2
        changes = {
            "view": view,
            "extra_bytes": rows * wide,
            "costs": costs,
            "check": None,
            "draft_tokens_by_batch": [],
        }
        if keep.size == self.fingerprint.num_layers:  # the target drafting for itself
            changes |= {"worthwhile": False}
        return self.model_copy(update=changes)

    @property
    def pacing(self) -> Pacing | None:
        """What an engine paces its drafts by; None where costs or chances are not known."""
        if self.costs is None or self.chances is None:
            return None
        costs, view = self.costs, self.view.branches
        return Pacing(
            rows=costs.rows,
            target_ms=[costs.target_ms(m) for m in costs.rows],
            draft_ms=[costs.step_ms(view, m) for m in costs.rows],
            draft_overhead_ms=costs.draft_overhead_ms,
            round_overhead_ms=costs.round_overhead_ms,
            acceptance=self.chances.acceptance,
            confidence=self.chances.confidence,
        )


@lru_cache(maxsize=1024)
def _view(attention: tuple[Mode, ...], mlp: tuple[Mode, ...]) -> DraftView:
    return DraftView.from_modes(attention, mlp)


def runs_skipped(kept: Sequence[int], num_layers: int) -> set[tuple[int, int]]:
    """The maximal runs (first, last) of layers that `kept`, ascending, leaves out."""
    edges = [-1, *kept, num_layers]
    return {(a + 1, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1}
