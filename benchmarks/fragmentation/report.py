"""What is told of a replay: numbers for JSON, and a table for people."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.fragmentation.replay import Replay
from benchmarks.fragmentation.sides import DecodeSide

COLUMNS = ("prefill alone", "decode alone", "one-sided", "aligned", "larger side", "free list")


def figures(replay: Replay) -> dict[str, Any]:
    """All that was observed, in types that JSON knows. Times in microseconds, runs in blocks."""
    return {
        "conditions": asdict(replay.conditions),
        "num_requests": replay.copies["aligned"].total(),
        "num_left_out": replay.num_left_out,
        "copies_per_request": {name: of_counts(replay.copies[name]) for name in COLUMNS},
        "longest_free_run": dict(replay.longest_free_run),
        "take_cpu_us": of_times(replay.alone.take_ns),
        "take_aligned_cpu_us": of_times(replay.told.take_ns),
        "grow_moved_ratio": _ratio(replay.alone),
        "hit_ratio": {
            name: hits / max(1, replay.num_prompt_blocks) for name, hits in replay.num_hit_blocks.items()
        },
    }


def of_counts(counts: Counter[int]) -> dict[str, float]:
    """Mean, p50, p99 and the greatest of a histogram."""
    total = counts.total()
    mean = sum(value * times for value, times in counts.items()) / max(1, total)
    return {
        "mean": round(mean, 4),
        "p50": _percentile(counts, 0.5),
        "p99": _percentile(counts, 0.99),
        "max": max(counts, default=0),
    }


def of_times(times_ns: array[int]) -> dict[str, float]:
    ordered = sorted(times_ns)
    return {
        name: ordered[min(len(ordered) - 1, int(len(ordered) * part))] / 1e3 if ordered else 0.0
        for name, part in (("p50", 0.5), ("p99", 0.99))
    }


def table(all_figures: Sequence[dict[str, Any]]) -> str:
    """One line for each replay: mean / p99 of the copies per request."""
    head = ["leased", "cache", *COLUMNS, "take p50/p99 CPU us", "moved", "hits"]
    lines = [head]
    for found in all_figures:
        conditions, copies = found["conditions"], found["copies_per_request"]
        lines.append(
            [
                f"{conditions['level']:.0%}",
                "on" if conditions["has_cache"] else "off",
                *(f"{copies[name]['mean']:.2f} / {copies[name]['p99']}" for name in COLUMNS),
                f"{found['take_cpu_us']['p50']:.0f} / {found['take_cpu_us']['p99']:.0f}",
                f"{found['grow_moved_ratio']:.1%}",
                f"{found['hit_ratio'].get('segments', 0):.1%}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _percentile(counts: Counter[int], part: float) -> int:
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen > part * counts.total():
            return value
    return max(counts, default=0)


def _ratio(side: DecodeSide) -> float:
    return side.num_moved / side.num_grown if side.num_grown else 0.0
