"""SkipPlan: the contract between the offline job, which writes it, and the runtime, which obeys it.

A plan is a folder with `plan.json` and, where the plan has bridges, `bridges.safetensors`, and where its
draft head is restricted, `head.safetensors`.
Nothing in it is executable; loading it reads no file outside the folder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sdfp_vllm.errors import PlanError
from sdfp_vllm.fingerprint import Fingerprint, fingerprint, resolve_model_dir
from sdfp_vllm.keep import SUBLAYER_ARCHITECTURES, KeepSet
from sdfp_vllm.pacing.record import Pacing
from sdfp_vllm.plan_file import read_plan, write_atomically, write_plan

SCHEMA_VERSION = 2
PLAN_FILE = "plan.json"
BRIDGE_FILE = "bridges.safetensors"
HEAD_FILE = "head.safetensors"
MAX_DRAFT_TOKENS = 32
MAX_BRIDGE_RANK = 64

Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Layer = Annotated[int, Field(ge=0, strict=True)]
DraftTokens = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS, strict=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FitScore(_Strict):
    """Sensitivity of one block of parameters (SDFP, arXiv 2602.05499; FIT, arXiv 2210.08502).

    With the empirical Fisher diagonal F_j over N sequences and parameters theta_j:
    `fisher_trace` = sum_j F_j; `perturbation_variance` = mean_j theta_j^2 (removing a block
    perturbs theta by -theta); `trace_score` = fisher_trace * perturbation_variance;
    `diagonal_score` = sum_j F_j * theta_j^2.
    """

    fisher_trace: NonNegative
    perturbation_variance: NonNegative
    trace_score: NonNegative
    diagonal_score: NonNegative


class LayerScore(_Strict):
    """Scores of decoder layer `layer`: the whole, and its two residual branches."""

    layer: Layer
    total: FitScore
    attention: FitScore
    mlp: FitScore


class CostModel(_Strict):
    """Measured time of one decode step's parts at batch 1, in milliseconds.

    `verify_ms[m - 1]` is the full model's forward over m rows (m - 1 draft tokens), head
    included; one draft step costs `len(kept) * layer_ms + head_ms`, plus
    `draft_overhead_ms`, bridges included; every round pays `round_overhead_ms` in plain decoding and in
    drafting alike. A restricted draft head takes `draft_head_ms` in the place of `head_ms` (None: full).
    A layer of which one branch runs costs `attention_ms` or `mlp_ms`, which add up to `layer_ms`.
    """

    layer_ms: NonNegative
    attention_ms: NonNegative | None = None
    mlp_ms: NonNegative | None = None
    head_ms: NonNegative
    draft_head_ms: NonNegative | None = None
    verify_ms: list[NonNegative] = Field(min_length=1)
    draft_overhead_ms: NonNegative
    round_overhead_ms: NonNegative
    device: str
    dtype: str
    threads: int = Field(ge=1)


class Candidate(_Strict):
    """One point of the searched curve: a keep set (as in the plan) and what it is predicted to give.

    `acceptance[j]` is the chance that draft token j is accepted given that all before it
    were; `speedup[k]` the predicted tokens per second over plain decoding's with k draft
    tokens a round (`speedup[0]` = 1).
    """

    kept_layers: list[Layer]
    kept_attention: list[Layer] = []
    kept_mlp: list[Layer] = []
    acceptance: list[Probability]
    speedup: list[NonNegative]

    @property
    def keep(self) -> KeepSet:
        return KeepSet(tuple(self.kept_layers), tuple(self.kept_attention), tuple(self.kept_mlp))


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
    """Bridges over runs of skipped layers (`sdfp_vllm/bridge.py` has the formulas).

    Their tensors lie in `bridges.safetensors` beside the plan, a name that no plan can change;
    `sha256` is that file's.
    """

    kind: Literal["bias", "affine", "low-rank"]
    rank: Annotated[int, Field(ge=0, le=MAX_BRIDGE_RANK, strict=True)]
    runs: list[BridgeRun] = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _rank_fits_kind(self) -> Bridges:
        if (self.kind == "low-rank") != (self.rank > 0):
            raise ValueError(f"kind {self.kind} has rank {self.rank}")
        return self


class DraftHead(_Strict):
    """A draft head that computes the logits of `tokens` ids only; the draft never proposes the others.

    The ids lie in `head.safetensors` beside the plan, a name that no plan can change; `sha256` is that
    file's. `coverage` is the share of tokens in the target's own text that are among them, on text they
    were not chosen by.
    """

    tokens: Annotated[int, Field(ge=1, strict=True)]
    coverage: Probability
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Provenance(_Strict):
    """How the plan was made; enough to make it again."""

    calibration: str
    calibration_tokens: int = Field(ge=0)
    seed: int
    selector: str
    created: str
    sdfp_version: str
    torch_version: str
    transformers_version: str
    git_sha: str | None = None


class SkipPlan(_Strict):
    """Which decoder layers draft, how many tokens a round, and why.

    `kept_layers` run whole; of `kept_attention` and `kept_mlp` only that residual branch runs.
    `draft_tokens_by_batch` holds (largest batch size, draft length) pairs, ascending; the
    draft length for a batch larger than the last is that of the last. `worthwhile` is false
    where no candidate beat plain decoding on the machine that made the plan.
    """

    schema_version: Literal[2] = 2
    model: str
    fingerprint: Fingerprint
    kept_layers: list[Layer]
    kept_attention: list[Layer] = []
    kept_mlp: list[Layer] = []
    num_speculative_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS, strict=True)]
    draft_tokens_by_batch: list[tuple[Annotated[int, Field(ge=1, strict=True)], DraftTokens]] = []
    bridges: Literal["none"] | Bridges = "none"
    head: Literal["full"] | DraftHead = "full"
    worthwhile: bool
    prediction: Prediction
    scores: list[LayerScore]
    curve: list[Candidate]
    cost: CostModel | None = None
    pacing: Pacing | None = None
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
        named = [("", self.keep), *((f"curve[{i}].", c.keep) for i, c in enumerate(self.curve))]
        for name, keep in named:
            if problem := keep.problem(n):
                raise ValueError(name + problem)
        architecture = self.fingerprint.architecture
        if self.keep.partial and architecture not in SUBLAYER_ARCHITECTURES:
            raise ValueError(
                f"kept_attention and kept_mlp must be empty: {architecture} drafts with whole layers only"
            )
        if self.bridges != "none" and self.keep.partial:
            raise ValueError("bridges belong to whole layers, but kept_attention or kept_mlp is not empty")
        if self.bridges != "none":
            skipped = runs_skipped(self.kept_layers, n)
            runs = [(r.first, r.last) for r in self.bridges.runs]
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
        if self.head != "full" and self.head.tokens >= self.fingerprint.vocab_size:
            raise ValueError(
                f"head has {self.head.tokens} tokens of a vocabulary of {self.fingerprint.vocab_size}"
            )
        return self

    @property
    def keep(self) -> KeepSet:
        """What drafts."""
        return KeepSet(tuple(self.kept_layers), tuple(self.kept_attention), tuple(self.kept_mlp))

    def save(
        self, folder: str | Path, tensors: bytes | None = None, head_tokens: bytes | None = None
    ) -> Path:
        """Writes `<folder>/plan.json` atomically (a reader sees the old plan or the new one) and returns its path.

        Args:
            tensors: Content of `bridges.safetensors`, given if and only if the plan has bridges. Written
                first: a reader in between finds that it is not the plan's, and is told so.
            head_tokens: The same for `head.safetensors` and a restricted head.

        Raises:
            PlanError: If the folder cannot be written.
        """
        if (tensors is None) != (self.bridges == "none"):
            raise ValueError("a plan with bridges is saved with their tensors, one without has none")
        if (head_tokens is None) != (self.head == "full"):
            raise ValueError("a plan with a restricted head is saved with its tensors, one without has none")
        folder = Path(folder)
        path = folder / PLAN_FILE
        beside = {BRIDGE_FILE: tensors, HEAD_FILE: head_tokens}
        for name, content in beside.items():
            if content is not None:
                write_atomically(folder / name, content)
        write_plan(self, path)
        for name, content in beside.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)  # of the plan that was here before
        return path


def runs_skipped(kept: Sequence[int], num_layers: int) -> set[tuple[int, int]]:
    """The maximal runs (first, last) of layers that `kept`, ascending, leaves out."""
    edges = [-1, *kept, num_layers]
    return {(a + 1, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1}


def load_plan(path: str | Path, expected: Fingerprint | None = None) -> SkipPlan:
    """Reads and validates a plan from a plan folder or its plan.json.

    Args:
        expected: The served model's fingerprint; a plan for another model is refused.

    The tensors of its bridges and the tokens of its head are read and checked as well.

    Raises:
        PlanError: Naming the file, the field and the way out. No other exception leaves here.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PLAN_FILE
    plan = read_plan(path, SkipPlan, SCHEMA_VERSION, "sdfp plan MODEL")
    if expected is not None and (differences := plan.fingerprint.differences(expected)):
        raise PlanError(
            str(path),
            "was made for another model: " + "; ".join(differences),
            "Make one for this model with `sdfp plan MODEL`, or serve the model the plan names.",
        )
    if plan.bridges != "none":
        from sdfp_vllm.bridge_file import load_bridges  # torch, which a plan without bridges does not need

        load_bridges(path.parent, plan)
    if plan.head != "full":
        from sdfp_vllm.head_file import load_head

        load_head(path.parent, plan)
    return plan


def plans_root() -> Path:
    """The per-user folder of plans: $SDFP_CACHE_DIR, else $XDG_CACHE_HOME/sdfp, else ~/.cache/sdfp."""
    if root := os.environ.get("SDFP_CACHE_DIR"):
        return Path(root) / "plans"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdfp" / "plans"


def default_plan_dir(fp: Fingerprint) -> Path:
    """Where `sdfp plan MODEL` writes and `--speculative-model sdfp` looks, by model fingerprint."""
    # By schema: another release's plan is one that is not there, not one that is damaged.
    return plans_root() / f"v{SCHEMA_VERSION}" / f"{fp.architecture}-{fp.sha256[:16]}"


def find_plan(
    model: str, plan: str | Path | None = None, revision: str | None = None
) -> tuple[SkipPlan, Path]:
    """Loads the plan at `plan`, or the default one of the model's fingerprint; returns it and where it lies.

    Raises:
        SdfpError: If there is no such model, or no plan (PlanError), or it is damaged or made for another model.
    """
    target = fingerprint(resolve_model_dir(model, revision))
    folder = default_plan_dir(target) if plan is None else Path(plan)
    if plan is None and not (folder / PLAN_FILE).is_file():
        raise PlanError(
            f"model {model!r}",
            f"has no plan yet (looked for {folder})",
            f"Make one with `sdfp plan {model}`, or name a plan folder.",
        )
    return load_plan(folder, expected=target), folder
