"""Short chats disturbed by long prompts: prefill and decode on two nodes, beside one node's chunk sizes.

Chats run without a pause, long prompts come in at fixed times. On the CPU two nodes have one core each, one
node has both. On a GPU all nodes share it, with random weights in Llama-3.1-8B's shape; the cache moves by
CUDA IPC.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import BenchmarkFailed
from benchmarks.clusters import UNBOUNDED, start_cluster
from benchmarks.load import check_complete, ttfts
from benchmarks.report import Report, make_parser, quantiles, set_missing
from benchmarks.shapes import LLAMA_8B_CONFIG, require_gpu
from flowkv.bench.load import Lengths, ask, closed_loop

COLUMNS = (
    "setup", "num_chats", "chat_itl_s", "chat_ttft_s", "chat_tokens_per_s", "long_ttft_s",
    "long_tokens_per_s",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# By device: what the options are if not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "chunks": [32, 64, 128, 256, 512],
        "chats": [4],
        "long": 2000,
        "num_long": 4,
        "period": 12.0,
        "kv_cache_bytes": 2 << 30,
    },
    "cuda": {
        "chunks": [512, 2048],
        "chats": [16],
        "long": 8000,
        "num_long": 8,
        "period": 2.0,
        "kv_cache_bytes": 12 << 30,
    },
}
CHATS = {"cpu": Lengths(64, 64), "cuda": Lengths(256, 128)}
ON_GPU: dict[str, object] = {
    "device": "cuda:0",  # by number: two nodes share it
    "load_format": "dummy",
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "max_num_seqs": 64,
}


class Load(NamedTuple):
    """`num_chats` clients with one chat after the other; `num_long` prompts, one every `period_s`."""

    num_chats: int
    chat: Lengths
    long: Lengths
    num_long: int
    period_s: float

    @property
    def duration_s(self) -> float:
        return self.num_long * self.period_s


WARM_UPS = {
    "cpu": Load(2, Lengths(32, 8), Lengths(600, 2), num_long=1, period_s=1.0),
    "cuda": Load(2, Lengths(32, 8), Lengths(2048, 2), num_long=1, period_s=2.0),
}


def main(argv: Sequence[str]) -> int:
    parser = make_parser("disturbed", __doc__, model=True, devices=("cpu", "cuda"))
    parser.add_argument("--chunks", type=int, nargs="+", help="of the one node")
    parser.add_argument("--chats", type=int, nargs="+", help="clients that chat")
    parser.add_argument("--long", type=int, help="tokens of a long prompt")
    parser.add_argument("--num-long", type=int, help="long prompts")
    parser.add_argument("--period", type=float, help="seconds between long prompts")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--kv-cache-bytes", type=int, help="of each node")
    parser.add_argument("--budget", type=int, default=2048, help="tokens per step of two nodes on a GPU")
    options = parser.parse_args(argv)
    set_missing(options, **DEFAULTS[options.device])
    model = options.model
    cores = sorted(os.sched_getaffinity(0))[:2]
    if options.device == "cuda":
        report = Report(options, gpu=require_gpu())
    elif len(cores) < 2:
        raise BenchmarkFailed("2 cores are needed")
    else:
        report = Report(options, pinned="1P1D: a core and a thread per node; one node: both cores, 2 threads")
    with tempfile.TemporaryDirectory() as folder:
        if options.device == "cuda":  # the shape of the large model and the words of the small one
            (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B_CONFIG))
            for name in TOKENIZER_FILES:
                shutil.copy(Path(model) / name, folder)
            model = folder
        for chunk in [0, *options.chunks]:
            measure(model, chunk, cores, options, report)
    return report.finish(*COLUMNS)


def measure(model: str, chunk: int, cores: list[int], options: argparse.Namespace, report: Report) -> None:
    """One node that takes `chunk` tokens of prompts in a step; with 0, two nodes."""
    name = f"chunk {chunk}" if chunk else "1P1D"
    report.say(name)
    nodes = {"mixed": set(cores)} if chunk else {"prefill": {cores[0]}, "decode": {cores[-1]}}
    settings: dict[str, object] = {"lending": False, "kv_cache_bytes": options.kv_cache_bytes, **UNBOUNDED}
    settings["num_threads"] = max(map(len, nodes.values()))
    if options.device == "cuda":
        nodes = {role: os.sched_getaffinity(0) for role in nodes}
        settings |= {**ON_GPU, "num_threads": 1, "token_budget": options.budget}
    if chunk:  # a mixed node's chunk is half of its budget
        settings["token_budget"] = 2 * chunk
    with start_cluster(model, {}, cores=nodes, settings=settings) as started:
        asyncio.run(run_load(started.cluster.url, WARM_UPS[options.device], seed=-1))
        for num_chats in options.chats:
            long = Lengths(options.long, 4)
            load = Load(num_chats, CHATS[options.device], long, options.num_long, options.period)
            for number in range(options.repeat):
                figures = asyncio.run(run_load(started.cluster.url, load, seed=number))
                report.add_row(setup=name, chunk=chunk, **load._asdict(), round=number, **figures)


async def run_load(url: str, load: Load, seed: int) -> dict[str, Any]:
    """The chats begin before the first long prompt and end when the last one has had its time.

    ITL is over all gaps of all chats. Raises BenchmarkFailed.
    """
    rng = random.Random(seed)
    began = time.monotonic()

    def turns() -> Iterator[None]:
        while time.monotonic() - began < load.duration_s:
            yield

    async with asyncio.TaskGroup() as tasks:
        chatting = tasks.create_task(closed_loop(url, rng, load.chat, load.num_chats, turns()))
        asked = []
        for number in range(load.num_long):
            await asyncio.sleep(began + (number + 0.5) * load.period_s - time.monotonic())
            asked.append(tasks.create_task(ask(url, rng, *load.long[:2])))
    chats, longs = chatting.result(), [task.result() for task in asked]
    check_complete([*chats, *longs])
    duration_s = time.monotonic() - began
    return {
        "chat_itl_s": quantiles(gap for outcome in chats for gap in outcome.itls_s),
        "chat_ttft_s": ttfts(chats),
        "long_ttft_s": ttfts(longs),
        "chat_tokens_per_s": round(sum(len(outcome.token_ids) for outcome in chats) / duration_s, 2),
        "long_tokens_per_s": round(len(longs) * load.long.num_prompt_tokens / duration_s, 2),
    }
