"""The figures as a picture, where matplotlib is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CURVES = ("free list", "one-sided", "aligned", "decode alone")


def plot(report: dict[str, Any], file: Path) -> str:
    """Copies per request against the leased part, and the longest free run over time; says what it did."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed"
    picture = import_module("matplotlib.figure").Figure(figsize=(12, 4.5), layout="constrained")
    copies, runs = picture.subplots(1, 2)
    for has_cache, style in ((False, "-"), (True, "--")):
        replays = [r for r in report["replays"] if r["conditions"]["has_cache"] == has_cache]
        levels = [100 * r["conditions"]["level"] for r in replays]
        for color, name in enumerate(CURVES):
            means = [r["copies_per_request"][name]["mean"] for r in replays]
            label = f"{name}, cache {'on' if has_cache else 'off'}"
            if replays:
                copies.plot(levels, means, style, marker="o", color=f"C{color}", label=label)
        for color, replay in enumerate(replays):
            longest = replay["longest_free_run"]["decode"]
            places = [(i + 1) * replay["num_requests"] / len(longest) for i in range(len(longest))]
            label = f"{levels[color]:.0f} %, cache {'on' if has_cache else 'off'}"
            runs.plot(places, longest, style, color=f"C{color}", label=label)
    copies.set(xlabel="blocks leased, %", ylabel="copies per request, mean", yscale="log")
    runs.set(xlabel="requests", ylabel="longest free run of decode, blocks", yscale="log")
    for axes in (copies, runs):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    picture.suptitle(f"{report['trace']}, commit {report['commit']}")
    picture.savefig(file, dpi=120)
    return f"plot: {file}"
