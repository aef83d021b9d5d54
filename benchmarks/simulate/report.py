"""What is told of a run: numbers for JSON, and a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from benchmarks.simulate.run import Outcome


class Quantiles(msgspec.Struct, frozen=True):
    p50: float
    p90: float
    p99: float


class Figures(msgspec.Struct, frozen=True):
    """One run in numbers. Good requests met both targets; goodput is those per second of arrivals;
    utilisation is by the role that a node was started as."""

    policy: str
    split: str
    num_requests: int
    num_good: int
    good_share: float
    goodput: float
    ttft_s: Quantiles
    tpot_s: Quantiles
    itl_s: Quantiles
    total_s: Quantiles
    prefill_utilisation: float
    decode_utilisation: float
    cached_share: float
    num_lendings: int
    num_waits: int
    refusals: dict[str, int]
    simulated_s: float
    wall_s: float

    @property
    def requests_per_wall_s(self) -> float:
        return self.num_requests / self.wall_s


def figures(outcome: Outcome) -> Figures:
    lives = outcome.lives
    done = [life for life in lives if life.is_done]
    num_prompt_tokens = sum(life.request.num_prompt_tokens for life in done)
    return Figures(
        policy=outcome.policy,
        split=f"{outcome.num_prefill}P:{len(outcome.nodes) - outcome.num_prefill}D",
        num_requests=len(lives),
        num_good=outcome.num_good,
        good_share=outcome.num_good / len(lives),
        goodput=outcome.num_good / max(lives[-1].request.arrival_s, 1e-9),
        ttft_s=_quantiles([life.ttft_s for life in done]),
        tpot_s=_quantiles([life.tpot_s for life in done if life.request.num_output_tokens > 1]),
        itl_s=Quantiles(*(outcome.itl.quantile(part) for part in (0.5, 0.9, 0.99))),
        total_s=_quantiles([life.total_s for life in done]),
        prefill_utilisation=_utilisation(outcome, "prefill"),
        decode_utilisation=_utilisation(outcome, "decode"),
        cached_share=sum(life.num_cached_tokens for life in done) / max(1, num_prompt_tokens),
        num_lendings=outcome.num_lendings,
        num_waits=sum(life.num_waits for life in lives),
        refusals=dict(Counter(str(life.refused_with) for life in lives if life.refused_with)),
        simulated_s=outcome.span_s,
        wall_s=outcome.wall_s,
    )


COLUMNS = (
    "policy", "split", "good", "goodput/s", "TTFT p50 / p90 / p99 s", "TPOT p50 / p90 / p99 ms",
    "ITL p50 / p90 / p99 ms", "busy P / D", "cached", "lent", "waits", "refused", "requests/s",
)  # fmt: skip


def table(all_figures: Sequence[Figures]) -> str:
    """One line for each run."""
    return layout([COLUMNS, *map(_line, all_figures)])


def layout(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(found: Figures) -> list[str]:
    return [
        found.policy,
        found.split,
        f"{found.good_share:.1%}",
        f"{found.goodput:.2f}",
        " / ".join(f"{value:.2f}" for value in msgspec.structs.astuple(found.ttft_s)),
        " / ".join(f"{value * 1e3:.1f}" for value in msgspec.structs.astuple(found.tpot_s)),
        " / ".join(f"{value * 1e3:.1f}" for value in msgspec.structs.astuple(found.itl_s)),
        f"{found.prefill_utilisation:.0%} / {found.decode_utilisation:.0%}",
        f"{found.cached_share:.0%}",
        str(found.num_lendings),
        str(found.num_waits),
        str(sum(found.refusals.values())),
        f"{found.requests_per_wall_s:.0f}",
    ]


def _quantiles(values: Sequence[float]) -> Quantiles:
    ordered = sorted(values)

    def at(part: float) -> float:
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0

    return Quantiles(at(0.5), at(0.9), at(0.99))


def _utilisation(outcome: Outcome, role: str) -> float:
    nodes = [node for node in outcome.nodes if node.role == role]
    busy_s = sum(node.batch.busy_s for node in nodes)
    return busy_s / (len(nodes) * outcome.span_s) if nodes and outcome.span_s else 0.0
