"""Runs over time as a picture, where matplotlib is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.simulate.run import Outcome

NUM_BINS = 60


def plot(outcomes: Sequence[Outcome], title: str, file: Path) -> str:
    """One row per run: the cap of each node, what queues and decodes, good and other arrivals. Says what it
    did."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed"
    size = (13, 2.6 * len(outcomes) + 0.6)
    picture = import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    rows = picture.subplots(len(outcomes), 3, squeeze=False)
    for outcome, (caps, load, requests) in zip(outcomes, rows, strict=True):
        _plot_caps(outcome, caps)
        _plot_load(outcome, load)
        _plot_requests(outcome, requests)
    picture.suptitle(title)
    picture.savefig(file, dpi=110)
    return f"plot: {file}"


def _plot_caps(outcome: Outcome, axes: Any) -> None:
    caps = list(zip(*(sample.caps for sample in outcome.samples), strict=True))
    extent = (0, outcome.samples[-1].at_s, len(outcome.nodes), 0)
    axes.imshow(caps, aspect="auto", interpolation="nearest", extent=extent, cmap="viridis")
    axes.set(title=f"{outcome.policy}: prefill cap", ylabel="node", xlabel="s")


def _plot_load(outcome: Outcome, axes: Any) -> None:
    times = [sample.at_s for sample in outcome.samples]
    axes.plot(times, [sample.num_queued_tokens / 1e3 for sample in outcome.samples], color="C0")
    axes.set(ylabel="1,000 prompt tokens queued", xlabel="s")
    axes.yaxis.label.set_color("C0")
    other = axes.twinx()
    other.plot(times, [sample.num_decoding for sample in outcome.samples], color="C1")
    other.set_ylabel("sequences decoding", color="C1")


def _plot_requests(outcome: Outcome, axes: Any) -> None:
    """By their arrival."""
    width_s = max(outcome.lives[-1].request.arrival_s / NUM_BINS, 1e-9)
    arrived = Counter(int(life.request.arrival_s / width_s) for life in outcome.lives)
    good = Counter(int(life.request.arrival_s / width_s) for life in outcome.lives if not life.is_bad)
    times = [number * width_s for number in range(NUM_BINS)]
    axes.step(times, [arrived[number] / width_s for number in range(NUM_BINS)], label="arrivals")
    axes.step(times, [good[number] / width_s for number in range(NUM_BINS)], label="of them good")
    axes.set(ylabel="requests/s", xlabel="s")
    axes.legend(fontsize="small")
