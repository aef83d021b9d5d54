"""Calls and time against prompt length, one picture per shape. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.transfer.measure import Row
from benchmarks.transfer.shapes import SHAPES
from benchmarks.transfer.strategies import STRATEGIES

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(rows: Sequence[Row], json_path: Path) -> list[Path]:
    """Writes `<json>-<shape>.png` for each shape in `rows` and returns the paths."""
    return [
        _plot_shape([row for row in rows if row.shape == shape], json_path, shape)
        for shape in dict.fromkeys(row.shape for row in rows)
    ]


def _plot_shape(rows: list[Row], json_path: Path, shape: str) -> Path:
    connectors = list(dict.fromkeys(row.connector for row in rows))
    figure, axes = pyplot.subplots(
        2, len(connectors), figsize=(3.4 * len(connectors) + 1, 7), sharex=True, sharey="row", squeeze=False
    )
    for column, connector in enumerate(connectors):
        shown = [row for row in rows if row.connector == connector]
        axes[0, column].set_title(connector)
        _draw(axes[0, column], shown, "num_calls")
        _draw(axes[1, column], shown, "median_ms")
        limits = sorted({row.num_tokens: row.memcpy_median_ms for row in shown}.items())
        axes[1, column].plot(*zip(*limits, strict=True), "k--", label="memcpy, one thread")
        axes[1, column].set_xlabel("prompt tokens")
    axes[0, 0].set_ylabel("calls per request")
    axes[1, 0].set_ylabel("median time, ms")
    figure.suptitle(f"KV transfer of one request, {SHAPES[shape].title}")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize="small")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    path = json_path.with_name(f"{json_path.stem}-{shape}.png")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw(axis: Any, rows: list[Row], attribute: str) -> None:
    for name, strategy in STRATEGIES.items():
        points = sorted((row.num_tokens, getattr(row, attribute)) for row in rows if row.strategy == name)
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", label=strategy.title)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
