"""An explanation as one HTML page: pictures are inline SVG, nothing is fetched, and it reads without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lightning_autosp.memory.devices import format_bytes

__all__ = ["page_of"]

_CATEGORIES = {
    "parameters": "#4e79a7",
    "optimizer": "#76b7b2",
    "gradients": "#9c755f",
    "inputs": "#bab0ac",
    "overhead": "#8d8d8d",
    "saved": "#f28e2b",
    "gathered": "#b07aa1",
    "collectives": "#e15759",
    "transient": "#59a14f",
    "workspace": "#edc948",
}
"""What memory is held by, from the bottom of the picture to its top, and its colour."""

_ALWAYS = ("parameters", "optimizer", "inputs", "overhead")
"""What is held whatever is kept for backward."""

_FORMS = {
    "sharded": "#59a14f",
    "joined": "#76b7b2",
    "attention": "#4e79a7",
    "in tiles": "#b07aa1",
    "on data": "#bab0ac",
    "in full": "#e15759",
}
"""What becomes of operators, and its colour."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 960, 300, 76, 24
_COLUMNS = 420
"""In which memory over time is drawn; of more operators the largest of each column is."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --ink: #1b1b1b; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1040px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p { margin: .3rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.cards div { background: var(--soft); border-radius: .5rem; padding: .5rem .9rem; }
.cards b { display: block; font-size: 1.15rem; }
.bad { color: #d62728; } .good { color: #2e8b57; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .4rem 0; list-style: none; padding: 0; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .35em; }
pre { overflow: auto; max-height: 30rem; background: var(--soft); padding: .6rem; font-size: .8rem; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""


def page_of(found: Mapping[str, Any]) -> str:
    """Return the page of an explanation.

    Args:
        found: What `Explanation.to_dict` gives, or a JSON file of it.
    """
    title = f"{found['name']}, {found['length']} positions on {found['world']} rank(s) of {found['device']}"
    sections = [
        ("Memory over time", _memory(found)),
        ("Memory at the peak, by checkpoint policy", _policies(found)),
        ("What becomes of the graph", _regions(found["regions"])),
        ("Attention", _attention(found["attention"])),
        ("Collectives", _collectives(found["collectives"])),
        ("Gathered, in full, in tiles", _rest(found["report"])),
        ("The graph that was captured, and the program of the first rank", _graphs(found["graph"])),
    ]
    body = "".join(f"<section><h2>{escape(heading)}</h2>{content}</section>" for heading, content in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{escape(found['name'])}</h1><p>{escape(title.partition(', ')[2])}, predicted</p>{_cards(found)}</header>"
        f"<main>{body}</main></body></html>\n"
    )


def _cards(found: Mapping[str, Any]) -> str:
    report, best = found["report"], found["policies"][found["policy"]]
    policy = found["policy"] if found["policy"] == best["policy"] else f"{found['policy']}: {best['policy']}"
    sent = sum(one["bytes"] for one in found["collectives"])
    fits = ("good", "fits") if found["fits"] else ("bad", "does not fit")
    cards = [
        (f"{format_bytes(best['peak'])} of {format_bytes(found['limit_bytes'])}", f'<span class="{fits[0]}">{fits[1]}</span>'),
        (policy, f"checkpoint policy, {format_bytes(best['saved'])} kept for backward"),
        (str(report["num_local"] + report["num_reductions"]), "operators on parts of the sequence"),
        (str(len(found["attention"])), "attention calls"),
        (f"{len(report['gathered'])} / {len(report['in_full'])}", "values gathered / operators in full"),
        (format_bytes(sent), "a rank hands to collectives"),
    ]
    return '<div class="cards">' + "".join(f"<div><b>{escape(head)}</b>{text}</div>" for head, text in cards) + "</div>"


def _memory(found: Mapping[str, Any]) -> str:
    """Draw what is held, operator by operator."""
    columns = _columns(found["memory"])
    if not columns:
        return "<p>Nothing runs.</p>"
    peak = max(_total(one) for one in columns)
    limit = found["limit_bytes"]
    highest_shown = limit if limit <= 1.5 * peak else peak
    # Where most is held all the time, the picture is of what comes and goes.
    always = min(_total(one) for one in columns)
    base = always if always > peak / 2 and highest_shown == peak else 0
    top = base + (highest_shown - base) * 1.05 + 1
    tall, step = _HEIGHT - _BOTTOM, (_WIDTH - _LEFT) / len(columns)

    def height(size: float) -> float:
        return tall * (1 - max(size - base, 0) / (top - base))

    drawn = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Bytes held over the operators of the step" id="memory">'
    ]
    for mark in range(5):
        size = base + (top - base) / 1.05 * mark / 4
        y, label = height(size), f"+{format_bytes(size - base)}" if base else format_bytes(size)
        drawn.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    below = [0.0] * len(columns)
    for name, colour in _CATEGORIES.items():
        above = [start + one["bytes"].get(name, 0) for start, one in zip(below, columns, strict=True)]
        if above != below:
            points = [*_edge(above, step, height), *reversed(_edge(below, step, height))]
            drawn.append(f'<polygon class="{name}" fill="{colour}" points="{" ".join(points)}"/>')
        below = above
    phases = [one["phase"] for one in columns]
    for phase in dict.fromkeys(phases):
        x = _LEFT + phases.index(phase) * step
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{tall}" stroke="currentColor" stroke-dasharray="2 3"/>')
        anchor, place = ("end", _WIDTH) if phase == "optimizer step" else ("start", x + 4)
        drawn.append(f'<text x="{place:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{escape(phase)}</text>')
    if limit <= top:
        y = height(limit)
        drawn.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d62728" stroke-dasharray="6 3"/>')
    highest = max(range(len(columns)), key=lambda index: _total(columns[index]))
    drawn.append(f'<circle cx="{_LEFT + (highest + 0.5) * step:.1f}" cy="{height(peak):.1f}" r="4" fill="#d62728"/>')
    for index, moment in enumerate(columns):
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in moment["bytes"].items())
        text = f"{moment['operator']} at {moment['where']}, {moment['phase']}: {format_bytes(_total(moment))} ({parts})"
        drawn.append(
            f'<rect x="{_LEFT + index * step:.2f}" y="0" width="{step:.2f}" height="{tall}" fill="transparent">'
            f"<title>{escape(text)}</title></rect>"
        )
    drawn.append("</svg>")
    at = columns[highest]
    most = (
        f"<p>The most is {format_bytes(peak)}, in {escape(at['phase'])}, at <code>{escape(at['operator'])}</code>, "
        f"<code>{escape(at['where'])}</code>. {_limit_text(limit, top)}"
        + (f" The picture starts at {format_bytes(base)}, which are held all the time.</p>" if base else "</p>")
    )
    held = {name for one in columns for name in one["bytes"]}
    return f"<figure>{''.join(drawn)}</figure>{_key({n: c for n, c in _CATEGORIES.items() if n in held})}{most}"


def _limit_text(limit: int, top: float) -> str:
    return f"The limit, {format_bytes(limit)}, is {'the dashed line' if limit <= top else 'above the picture'}."


def _edge(sizes: Sequence[float], step: float, height: Any) -> list[str]:
    """Return the points of a line of steps."""
    points = []
    for index, size in enumerate(sizes):
        y = f"{height(size):.1f}"
        points += [f"{_LEFT + index * step:.1f},{y}", f"{_LEFT + (index + 1) * step:.1f},{y}"]
    return points


def _columns(moments: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the largest moment of each column; the optimizer's step, which is one, as wide as can be seen."""
    stretch = max(1, -(-len(moments) // _COLUMNS))
    columns: list[Mapping[str, Any]] = []
    for phase in dict.fromkeys(one["phase"] for one in moments):
        own = [one for one in moments if one["phase"] == phase]
        columns += [max(own[start : start + stretch], key=_total) for start in range(0, len(own), stretch)]
        if phase == "optimizer step":
            columns += own * (len(columns) // 25)
    return columns


def _total(moment: Mapping[str, Any]) -> int:
    return sum(moment["bytes"].values())


def _policies(found: Mapping[str, Any]) -> str:
    policies = found["policies"]
    most = max(one["peak"] for one in policies.values())
    # Where most is held whatever is kept, the picture is of the rest.
    always = sum(next(iter(policies.values()))["categories"].get(name, 0) for name in _ALWAYS)
    shown = {name: colour for name, colour in _CATEGORIES.items() if always <= most / 2 or name not in _ALWAYS}
    most = max(1, most if always <= most / 2 else most - always)
    row, left = 26, 90
    drawn = [
        f'<svg viewBox="0 0 {_WIDTH} {row * len(policies)}" role="img" aria-label="Bytes at the peak by policy" id="policies">'
    ]
    for index, (name, one) in enumerate(policies.items()):
        x, y = float(left), index * row
        drawn.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        for category, colour in shown.items():
            size = one["categories"].get(category, 0)
            width = (_WIDTH - left) * size / most
            if size:
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{row - 6}" fill="{colour}">'
                    f"<title>{category} {format_bytes(size)}</title></rect>"
                )
            x += width
    drawn.append("</svg>")
    rows = [
        (
            f"<b>{escape(name)}</b>" if name == found["policy"] else escape(name),
            format_bytes(one["peak"]),
            "yes" if one["fits"] else '<span class="bad">no</span>',
            format_bytes(one["saved"]),
            format_bytes(one["host"]),
            f"{one['flops_again'] / one['flops']:.1%}" if one["flops"] else "",
            f"{one['step_seconds']:.3g} s",
            f"{escape(one['phase'])}, <code>{escape(one['where'])}</code>",
        )
        for name, one in policies.items()
    ]
    heads = ("policy", "peak", "fits", "kept", "on the host", "FLOPs again", "step, on the roofline", "where the peak is")
    used = {name for one in policies.values() for name, size in one["categories"].items() if size}
    without = f"<p>Without {format_bytes(always)} of {', '.join(_ALWAYS)}.</p>" if len(shown) < len(_CATEGORIES) else ""
    return (
        f"<figure>{''.join(drawn)}</figure>{_key({n: c for n, c in shown.items() if n in used})}{without}"
        f"{_table(heads, rows, numbers=(1, 3, 4, 5, 6))}"
    )


def _regions(regions: Sequence[Mapping[str, Any]]) -> str:
    total = sum(one["num_operators"] for one in regions) or 1
    drawn, x = [f'<svg viewBox="0 0 {_WIDTH} 34" role="img" aria-label="Regions of the graph, in order" id="regions">'], 0.0
    counts: dict[tuple[str, int, tuple[str, ...]], int] = {}
    for one in regions:
        width = _WIDTH * one["num_operators"] / total
        text = f"{one['form']}, {one['num_operators']} operator(s) at {', '.join(one['lines'])}"
        place = f'x="{x:.2f}" y="2" width="{width:.2f}" height="30"'
        drawn.append(f'<rect {place} fill="{_FORMS[one["form"]]}"><title>{escape(text)}</title></rect>')
        x += width
        key = (one["form"], one["num_operators"], tuple(one["lines"]))
        counts[key] = counts.get(key, 0) + 1
    drawn.append("</svg>")
    rows = [
        (f"{count} x", escape(form), str(number), "<br>".join(f"<code>{escape(line)}</code>" for line in lines))
        for (form, number, lines), count in counts.items()
    ]
    used = {one["form"] for one in regions}
    legend = _key({name: colour for name, colour in _FORMS.items() if name in used})
    return f"<figure>{''.join(drawn)}</figure>{legend}{_table(('', 'form', 'operators', 'lines'), rows, numbers=(0, 2))}"


def _attention(calls: Sequence[Mapping[str, Any]]) -> str:
    counts: dict[tuple[str, ...], int] = {}
    for one in calls:
        cost = (format_bytes(one["sent"]), f"{one['flops']:.3g}", format_bytes(one["peak"])) if one["chosen"] else ("", "", "")
        kept = f" ({format_bytes(one['mask_bytes'])})" if one["mask_bytes"] else ""
        row = (
            one["method"],
            f"<code>{escape(one['where'])}</code>",
            escape(one["mask"] + kept),
            *cost,
            escape(one["chosen"]).replace("; ", "<br>"),
        )
        counts[row] = counts.get(row, 0) + 1
    rows = [(f"{count} x", *row) for row, count in counts.items()]
    heads = ("", "method", "line", "mask", "sent", "FLOPs", "held", "estimated, best first")
    return _table(heads, rows, numbers=(0, 4, 5, 6)) if rows else "<p>The step has none.</p>"


def _collectives(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{one['count']} x",
            escape(one["operator"]),
            one["phase"],
            format_bytes(one["bytes"]),
            f"<code>{escape(one['where'])}</code>",
        )
        for one in found
    ]
    return (
        _table(("", "operator", "phase", "a rank hands over", "line"), rows, numbers=(0, 3)) if rows else "<p>There are none.</p>"
    )


def _rest(report: Mapping[str, Any]) -> str:
    rows = []
    for kind in ("gathered", "in_full", "kept"):
        name = {"in_full": "in full", "kept": "logits are kept"}.get(kind, kind)
        for one in report[kind]:
            rows.append(
                (
                    name,
                    escape(one["name"]),
                    format_bytes(one["bytes"]),
                    f"<code>{escape(one['where'])}</code>",
                    escape(one["reason"]),
                )
            )
    for one in report["tiled"]:
        text = f"{one['num_tiles']} tile(s)"
        rows.append(
            (
                "in tiles",
                escape(", ".join(one["results"])),
                format_bytes(one["bytes"]),
                f"<code>{escape(one['where'])}</code>",
                text,
            )
        )
    return _table(("", "operator", "whole", "line", "why"), rows, numbers=(2,)) if rows else "<p>Nothing.</p>"


def _graphs(graph: Mapping[str, str]) -> str:
    names = {"before": "Captured: whole tensors, the sequence a symbol", "after": "What the first rank runs: forward"}
    return "".join(f"<details><summary>{names[name]}</summary><pre>{escape(text)}</pre></details>" for name, text in graph.items())


def _key(colours: Mapping[str, str]) -> str:
    return '<ul class="key">' + "".join(f'<li><i style="background:{c}"></i>{escape(n)}</li>' for n, c in colours.items()) + "</ul>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table; cells are HTML."""
    kinds = [' class="n"' if column in numbers else "" for column in range(len(heads))]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, heads, strict=True))
    body = "".join("<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kinds, row, strict=True)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
