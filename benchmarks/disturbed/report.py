"""Table, JSON and plot of the trade-off between long prompts' TTFT and chats' ITL."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.disturbed.load import Figures, Load
from benchmarks.result import write_result


@dataclass(frozen=True)
class Run:
    """`chunk` tokens of prompts per step at most, on one node; 0 where prefill has a node of its own."""

    setup: str
    chunk: int
    load: Load
    round: int
    figures: Figures


def table(runs: list[Run]) -> str:
    head = "chats: ITL p50   ITL p99  TTFT p50     tok/s   long: TTFT p50     tok/s"
    lines = [f"{'':<8}{'setup':<16}{head}"]
    for run in sorted(runs, key=lambda run: (run.load.num_chats, run.chunk, run.round)):
        it, chat = run.figures, run.figures.chat_itl
        lines.append(
            f"{run.load.num_chats:>2} chats {run.setup:<14}{1e3 * chat.p50:>15.0f}{1e3 * chat.p99:>10.0f}"
            f"{1e3 * it.chat_ttft.p50:>10.0f}{it.chat_tokens_per_s:>10.1f}{1e3 * it.long_ttft.p50:>17.0f}"
            f"{it.long_tokens_per_s:>10.1f}"
        )
    return "\n".join(lines)


def write(path: Path, runs: list[Run], conditions: dict[str, object]) -> None:
    found = {
        "conditions": conditions,
        "runs": [asdict(run) for run in runs],
    }
    write_result(path, "disturbed", found)


def plot(path: Path, runs: list[Run]) -> None:
    """A curve over chunk sizes per number of chats, and the point of two nodes beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for place, num_chats in enumerate(sorted({run.load.num_chats for run in runs})):
        mine = [run for run in runs if run.load.num_chats == num_chats]
        one = sorted((run for run in mine if run.chunk), key=lambda run: run.chunk)
        two = [run for run in mine if not run.chunk]
        color = f"C{place}"
        where = [(run.figures.long_ttft.p50, 1e3 * run.figures.chat_itl.p99) for run in one]
        axes.plot(*zip(*where, strict=True), "o-", color=color, label=f"one node, 2 cores, {num_chats} chats")
        for run, at in zip(one, where, strict=True):
            axes.annotate(str(run.chunk), at, textcoords="offset points", xytext=(4, 4))
        axes.plot(
            [run.figures.long_ttft.p50 for run in two],
            [1e3 * run.figures.chat_itl.p99 for run in two],
            "*",
            markersize=14,
            color=color,
            label=f"1P1D, 1 core each, {num_chats} chats",
        )
    axes.set_xlabel("TTFT of the long prompts, p50, s")
    axes.set_ylabel("ITL of the chats, p99, ms")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
