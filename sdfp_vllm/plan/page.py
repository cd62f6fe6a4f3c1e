"""The page that `sdfp show --html` writes: tables, bars and one inline SVG, nothing from elsewhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

from sdfp_vllm.plan.schema import SkipPlan
from sdfp_vllm.plan.show import (
    best_draft_tokens,
    details,
    kept_mark,
    parts,
    score_name,
    verdict,
    write_drawing,
)

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .15em .8em; text-align: right }
th { border-bottom: 1px solid #888 } td.name { text-align: left; color: #666 }
.kept { background: #e5f5e0 } .bar { display: inline-block; height: .8em; background: #31a354 }
tr:not(.kept) .bar { background: #bbb } td.wide { width: 14em; text-align: left }
svg text { font: 11px sans-serif; fill: #444 }
"""
_WIDTH, _HEIGHT, _MARGIN = 560, 260, 36


def draw_html(plan: SkipPlan, path: Path) -> None:
    """Writes one self-contained page: no script, no font, no picture from elsewhere.

    Raises:
        SdfpError: If the file cannot be written.
    """
    write_drawing(path, lambda: path.write_text(page(plan), encoding="utf-8"), "--html")


def page(plan: SkipPlan) -> str:
    """HTML text of the whole page."""
    title = f"SDFP plan for {plan.model}"
    rows = "".join(f"<tr><td class=name>{escape(n)}<td class=name>{escape(v)}" for n, v in details(plan))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><p>{escape(verdict(plan))}</p>"
        f"<h2>FIT scores ({score_name(plan).replace('_', ' ')})</h2>{_layers(plan)}"
        f"<h2>Search</h2>{_picture(plan)}{_curve(plan)}"
        f"<h2>How it was made</h2><table>{rows}</table></html>\n"
    )


def _layers(plan: SkipPlan) -> str:
    name = score_name(plan)
    top = max((getattr(s.total, name) for s in plan.scores), default=0.0) or 1.0
    rows = []
    for s in plan.scores:
        values = [getattr(part, name) for part in (s.attention, s.mlp, s.total)]
        cells = "".join(f"<td>{v:.3g}" for v in values)
        kept = kept_mark(plan.view.branches, s.layer)
        mark = ("<tr class=kept>" if kept else "<tr>", kept)
        bar = f"<td class=wide><span class=bar style='width:{100 * values[2] / top:.1f}%'></span>"
        rows.append(f"{mark[0]}<td>{s.layer}<td>{mark[1]}{cells}{bar}")
    return "<table><tr><th>layer<th><th>attention<th>MLP<th>total<th>" + "".join(rows) + "</table>"


def _curve(plan: SkipPlan) -> str:
    rows = []
    for c in plan.curve:
        chosen = c.view == plan.view.branches
        k = plan.num_speculative_tokens if chosen else best_draft_tokens(c)
        accepted = " ".join(f"{a:.2f}" for a in c.acceptance)
        rows.append(
            f"<tr{' class=kept' if chosen else ''}><td>{parts(c)}<td>{k}<td>{accepted}<td>{c.speedup[k]:.2f}x"
        )
    head = "<tr><th>layers kept<th>tokens a round<th>acceptance by token<th>predicted speedup"
    return f"<table>{head}{''.join(rows)}</table>"


def _picture(plan: SkipPlan) -> str:
    """Best predicted speedup over the number of layers kept; the dashed line is plain decoding."""
    points = sorted((c.keep.size, max(c.speedup[1:])) for c in plan.curve if len(c.speedup) > 1)
    if not points:
        return ""
    top = max(1.1, *(y for _, y in points))
    layers = plan.fingerprint.num_layers

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _MARGIN + x / layers * (_WIDTH - 2 * _MARGIN),
            _HEIGHT - _MARGIN - y / top * (_HEIGHT - 2 * _MARGIN),
        )

    line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)
    dots = "".join("<circle cx='{:.1f}' cy='{:.1f}' r='3' fill='#888'/>".format(*at(x, y)) for x, y in points)
    best = "<circle cx='{:.1f}' cy='{:.1f}' r='6' fill='#31a354'/>".format(
        *at(plan.keep.size, plan.prediction.speedup)
    )
    (x0, y1), (x1, _) = at(0, 1.0), at(layers, 1.0)
    labels = "".join(
        f"<text x='{at(x, 0)[0]:.1f}' y='{_HEIGHT - 14}' text-anchor='middle'>{x:g}</text>" for x, _ in points
    )
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img' aria-label='predicted speedup over layers kept'>"
        f"<line x1='{x0}' y1='{y1:.1f}' x2='{x1}' y2='{y1:.1f}' stroke='#888' stroke-dasharray='4'/>"
        f"<text x='2' y='{y1:.1f}'>1.0x</text><text x='2' y='{at(0, top)[1]:.1f}'>{top:.2f}x</text>"
        f"<polyline points='{line}' fill='none' stroke='#888'/>{dots}{best}{labels}"
        f"<text x='{_WIDTH / 2}' y='{_HEIGHT - 1}' text-anchor='middle'>layers kept</text></svg>"
    )
