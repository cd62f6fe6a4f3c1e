"""DraftView: the target as its draft sees it: which residual branches run, and at which precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sdfp_vllm.plan.keep import Branch, KeepSet

# Weights as they are, or rounded: the arithmetic of each is in `sdfp_vllm/plan/rounding.py`.
Precision = Literal["full", "int8", "fp8", "int4", "mxfp4"]
Mode = Literal["skip", "full", "int8", "fp8", "int4", "mxfp4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ROUNDED = PRECISIONS[1:]
BRANCHES: tuple[Branch, Branch] = ("attention", "mlp")

Unit = tuple[Branch, int]  # one branch of one layer


@dataclass(frozen=True, eq=False)
class DraftView(KeepSet):
    """A keep set with a precision for each branch that runs; a keep set alone is a view at full precision.

    Attributes:
        rounded: (branch, layer, precision) of the branches whose linears run on rounded weights, sorted.
    """

    rounded: tuple[tuple[Branch, int, Precision], ...] = ()

    def _key(self) -> tuple[object, ...]:
        return (self.layers, self.attention, self.mlp, self.rounded)

    @classmethod
    def at(cls, keep: KeepSet | Iterable[int], precision: Precision | Mapping[Unit, Precision]) -> DraftView:
        """`keep` with one precision for all that runs, or one for each unit (those not named: full)."""
        keep = KeepSet.of(keep)
        of = (lambda unit: precision) if isinstance(precision, str) else (lambda u: precision.get(u, "full"))
        rounded = sorted((b, i, p) for b, i in keep.units() if (p := of((b, i))) != "full")
        return cls(keep.layers, keep.attention, keep.mlp, tuple(rounded))

    @classmethod
    def of(cls, keep: KeepSet | Iterable[int]) -> DraftView:
        """`keep` itself if it is a view, or the view of it at full precision."""
        return keep if isinstance(keep, DraftView) else cls.at(keep, "full")

    @classmethod
    def from_modes(cls, attention: Sequence[Mode], mlp: Sequence[Mode]) -> DraftView:
        """From what is chosen for each layer's attention and each layer's MLP."""
        chosen: dict[Unit, Mode] = {("attention", i): c for i, c in enumerate(attention)}
        chosen |= {("mlp", i): c for i, c in enumerate(mlp)}
        return cls.from_units({unit: c for unit, c in chosen.items() if c != "skip"})

    def modes(self, branch: Branch, num_layers: int) -> list[Mode]:
        """What is chosen for `branch` of each layer: as it is stored."""
        return [
            self.precision(i, branch) if branch in self.branches(i) else "skip" for i in range(num_layers)
        ]

    @classmethod
    def from_units(cls, units: Mapping[Unit, Precision]) -> DraftView:
        """From the branches that run and the precision of each."""
        keep = KeepSet.from_branches(*([i for b, i in units if b == branch] for branch in BRANCHES))
        return cls.at(keep, units)

    def as_units(self) -> dict[Unit, Precision]:
        """The branches that run and the precision of each."""
        return {(b, i): self.precision(i, b) for b, i in self.units()}

    @property
    def keep(self) -> KeepSet:
        """What runs, whatever the precision."""
        return KeepSet(self.layers, self.attention, self.mlp)

    def precision(self, layer: int, branch: Branch) -> Precision:
        return self._precisions.get((branch, layer), "full")

    @property
    def _precisions(self) -> dict[Unit, Precision]:
        known = self.__dict__.get("_known")
        if known is None:  # frozen: kept beside the fields, a search asks a thousand times
            known = {(b, i): p for b, i, p in self.rounded}
            object.__setattr__(self, "_known", known)
        return known

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_known"}

    def after(self, layer: int) -> DraftView:
        """What of it lies behind `layer`."""
        return DraftView.at(super().after(layer), self._precisions)

    def __str__(self) -> str:
        kept = super().__str__()
        used = Counter(self.precision(i, b) for b, i in self.units())
        if set(used) <= {"full"}:
            return kept
        if len(used) == 1:
            return f"{kept}, in {next(iter(used))}"
        most = used.most_common(1)[0][0]
        others = (f"{b} {i} {self.precision(i, b)}" for b, i in self.units() if self.precision(i, b) != most)
        return f"{kept}, in {most} but for {', '.join(others)}"
