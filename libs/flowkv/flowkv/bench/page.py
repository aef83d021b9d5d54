"""The picture of a run: one HTML file, with the distributions and the run over time."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from flowkv.bench.figures import Distribution, Figures
from flowkv.bench.load import Outcome

WIDTH, HEIGHT, MARGIN = 440, 180, 34
NUM_BARS = 40
# Beyond it a histogram would be one bar at the left: its last bar holds the rest.
SHOWN_SHARE = 0.99
# Of a run of very many requests every nth is drawn.
MAX_POINTS = 4000
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #6b7686; --fill: #2f6fde; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #98a3b3; --fill: #6aa3ff; --back: #12161c; }
}
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
main { display: flex; flex-wrap: wrap; gap: 1rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 1px solid var(--soft); }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg .title { fill: var(--ink); font-weight: 600; }
.bar, .dot { fill: var(--fill); } .axis { stroke: var(--soft); }
"""


def page(title: str, conditions: str, figures: Figures, outcomes: Sequence[Outcome]) -> str:
    complete = [one for one in outcomes if one.is_complete]
    charts = [
        histogram("TTFT, ms", [1e3 * one.ttft_s for one in complete if one.ttft_s is not None]),
        histogram("TPOT, ms", [1e3 * one.tpot_s for one in complete if one.num_output_tokens > 1]),
        histogram("ITL, ms", [1e3 * gap for one in complete for gap in one.itls_s]),
        histogram("end to end, ms", [1e3 * one.event_times_s[-1] for one in complete if one.event_times_s]),
        scatter("TTFT, ms, by the second of the run", complete),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><p>{html.escape(conditions)}</p>{_table(figures)}"
        f"<main>{''.join(charts)}</main></html>\n"
    )


def _table(figures: Figures) -> str:
    lines = [
        f"{figures.num_complete} of {figures.num_sent} requests complete in {figures.duration_s:.1f} s",
        f"{figures.requests_per_s:.3f} requests/s, {figures.good_requests_per_s:.3f} of them good",
        f"{figures.output_tokens_per_s:.1f} output tokens/s, {figures.input_tokens_per_s:.1f} of input",
    ]
    head = "".join(f"<th>{name}</th>" for name in ("ms", "mean", "median", "p90", "p99", "max"))
    body = "".join(f"<tr><td>{name}</td>{_cells(each)}</tr>" for name, each in rows(figures))
    return f"<p>{'<br>'.join(lines)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def rows(figures: Figures) -> Iterator[tuple[str, Distribution]]:
    yield "TTFT", figures.ttft_ms
    yield "TPOT", figures.tpot_ms
    yield "ITL", figures.itl_ms
    yield "end to end", figures.e2e_ms


def _cells(one: Distribution) -> str:
    return "".join(f"<td>{value:.1f}</td>" for value in (one.mean, one.median, one.p90, one.p99, one.max))


def histogram(title: str, values: Sequence[float]) -> str:
    """Bars of equal width from 0 to the 99th percentile; the last one holds what is beyond."""
    if not values:
        return ""
    ordered = sorted(values)
    top = ordered[int(SHOWN_SHARE * (len(ordered) - 1))] or 1e-9
    counts = [0] * NUM_BARS
    for value in ordered:
        counts[min(int(value / top * NUM_BARS), NUM_BARS - 1)] += 1
    width = (WIDTH - 2 * MARGIN) / NUM_BARS
    drawn = []
    for place, count in enumerate(counts):
        height = (HEIGHT - 2 * MARGIN) * count / max(counts)
        x, y = MARGIN + place * width, HEIGHT - MARGIN - height
        drawn.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height:.1f}"/>'
        )
    return _chart(title, "".join(drawn), top, f"{max(counts)}")


def scatter(title: str, outcomes: Sequence[Outcome]) -> str:
    points = [(one.sent_s, 1e3 * one.ttft_s) for one in outcomes if one.ttft_s is not None]
    points = points[:: 1 + len(points) // MAX_POINTS]
    if not points:
        return ""
    right, top = (max(axis) or 1e-9 for axis in zip(*points, strict=True))
    dots = (
        f'<circle class="dot" r="2" cx="{MARGIN + (WIDTH - 2 * MARGIN) * x / right:.1f}" '
        f'cy="{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * y / top:.1f}"/>'
        for x, y in points
    )
    return _chart(title, "".join(dots), right, f"{top:.0f}")


def _chart(title: str, drawn: str, right: float, top: str) -> str:
    base = HEIGHT - MARGIN
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="title" x="{MARGIN}" y="16">{html.escape(title)}</text>{drawn}'
        f'<line class="axis" x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{base}" y2="{base}"/>'
        f'<text x="{MARGIN}" y="{base + 15}">0</text><text x="{WIDTH - MARGIN}" y="{base + 15}" '
        f'text-anchor="end">{right:.4g}</text><text x="4" y="{MARGIN + 4}">{top}</text></svg>'
    )
