"""Moves of a local search: from one view to its neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import BRANCHES, DraftView, Precision, Unit

EVERYTHING: Mapping[str, bool] = dict.fromkeys(BRANCHES, True)


def units(view: KeepSet, num_layers: int, *, kept: bool, whole: bool) -> Iterator[tuple[Unit, ...]]:
    """What can be dropped (`kept`) or added: layers, and unless `whole` single branches."""
    for i in range(num_layers):
        there: list[Unit] = [(b, i) for b in BRANCHES if (b in view.branches(i)) == kept]
        if len(there) == 2:
            yield tuple(there)
        if not whole:
            yield from ((unit,) for unit in there)


def without(view: KeepSet, unit: Sequence[Unit]) -> DraftView:
    """`view` with `unit` skipped."""
    return DraftView.from_units({u: p for u, p in _units(view).items() if u not in unit})


def with_(view: KeepSet, unit: Sequence[Unit], can_round: Mapping[str, bool] = EVERYTHING) -> DraftView:
    """`view` with `unit` running, at the precision that most of the view has; in full where it cannot be rounded."""
    usual = _usual(view)
    added: dict[Unit, Precision] = {u: usual if can_round[u[0]] else "full" for u in unit}
    return DraftView.from_units({**_units(view), **added})


def retuned(
    view: KeepSet, precisions: Sequence[Precision], can_round: Mapping[str, bool] = EVERYTHING
) -> list[DraftView]:
    """`view` with one branch at another of `precisions`; experts, which cannot be rounded, stay as they are."""
    now = _units(view)
    return [
        DraftView.from_units({**now, unit: p})
        for unit, old in now.items()
        for p in precisions
        if p != old and can_round[unit[0]]
    ]


def shifts(view: KeepSet, num_layers: int) -> list[DraftView]:
    """Each kept layer, or lone branch, moved to the nearest layer on either side that is skipped."""
    touched, now, moved = set(view.touched()), _units(view), []
    for i in view.touched():
        mine = {(b, i): now[b, i] for b in BRANCHES if b in view.branches(i)}
        for step in (-1, 1):
            j = i + step
            while j in touched:
                j += step
            if 0 <= j < num_layers:
                others = {u: p for u, p in now.items() if u not in mine}
                moved.append(DraftView.from_units({**others, **{(b, j): p for (b, _), p in mine.items()}}))
    return moved


def merged(view: KeepSet, fewer: KeepSet, more: KeepSet) -> DraftView:
    """`fewer`'s drop and `more`'s addition, both at once."""
    now, added = _units(view), _units(more)
    return DraftView.from_units({**_units(fewer), **{u: p for u, p in added.items() if u not in now}})


def _units(view: KeepSet) -> dict[Unit, Precision]:
    return DraftView.of(view).as_units()


def _usual(view: KeepSet) -> Precision:
    counts = Counter(_units(view).values())
    return counts.most_common(1)[0][0] if counts else "full"
