"""KeepSet: which parts of the target draft. One value for plan, search and runtime."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Branch = Literal["attention", "mlp"]


@dataclass(frozen=True, eq=False)
class KeepSet:
    """What is kept of a stack of decoder layers; the rest is an identity on the residual stream.

    Attributes:
        layers: Layers that run whole.
        attention, mlp: Layers of which only that residual branch runs.
    """

    layers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    def _key(self) -> tuple[object, ...]:
        return (self.layers, self.attention, self.mlp, ())

    # A keep set is the view of the same branches at full precision (`DraftView`), and equal to it.
    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, KeepSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    @classmethod
    def of(cls, keep: KeepSet | Iterable[int]) -> KeepSet:
        """`keep` itself, or the keep set of the layers it lists."""
        return keep if isinstance(keep, KeepSet) else cls(tuple(keep))

    @classmethod
    def from_branches(cls, attention: Iterable[int], mlp: Iterable[int]) -> KeepSet:
        """From the layers whose attention runs and those whose MLP runs; with both, a layer runs whole."""
        a, m = set(attention), set(mlp)
        return cls(*(tuple(sorted(part)) for part in (a & m, a - m, m - a)))

    @property
    def partial(self) -> bool:
        """Whether some layer runs one branch only."""
        return bool(self.attention or self.mlp)

    @property
    def size(self) -> float:
        """Layers that run, a branch counted as half of one."""
        return len(self.layers) + (len(self.attention) + len(self.mlp)) / 2

    def branches(self, layer: int) -> frozenset[Branch]:
        """The residual branches of `layer` that run."""
        whole = layer in self.layers
        kept: dict[Branch, bool] = {
            "attention": whole or layer in self.attention,
            "mlp": whole or layer in self.mlp,
        }
        return frozenset(name for name, runs in kept.items() if runs)

    def units(self) -> list[tuple[Branch, int]]:
        """The branches that run, by layer."""
        return [(b, i) for i in self.touched() for b in ("attention", "mlp") if b in self.branches(i)]

    def precision(self, layer: int, branch: Branch) -> Any:
        """At which precision a branch runs: a keep set alone is a view at full precision (`DraftView`)."""
        return "full"

    def touched(self) -> list[int]:
        """Layers of which anything runs, ascending."""
        return sorted((*self.layers, *self.attention, *self.mlp))

    def after(self, layer: int) -> KeepSet:
        """What of it lies behind `layer`."""
        parts = (self.layers, self.attention, self.mlp)
        return KeepSet(*(tuple(i for i in part if i > layer) for part in parts))

    def problem(self, num_layers: int) -> str | None:
        """What is wrong with it in a model of `num_layers` layers, naming the field; None for nothing."""
        if not self.touched():
            return "kept_layers, kept_attention and kept_mlp are all empty: nothing would draft"
        fields = {"kept_layers": self.layers, "kept_attention": self.attention, "kept_mlp": self.mlp}
        for name, kept in fields.items():
            if list(kept) != sorted(set(kept)):
                return f"{name} must ascend without repeats, got {list(kept)}"
            if kept and not 0 <= kept[0] <= kept[-1] < num_layers:
                wrong = kept[-1] if kept[-1] >= num_layers else kept[0]
                return f"{name} names layer {wrong}, but the model has {num_layers} layers (0 to {num_layers - 1})"
        if len(set(self.touched())) < len(self.touched()):
            twice = sorted(i for i in set(self.touched()) if self.touched().count(i) > 1)
            return f"kept_layers, kept_attention and kept_mlp must not share layers, but share {twice}"
        return None

    def __str__(self) -> str:
        named = (("", self.layers), ("attention of ", self.attention), ("MLP of ", self.mlp))
        return ", ".join(f"{name}{_listed(kept)}" for name, kept in named if kept) or "nothing"


def _listed(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers))
