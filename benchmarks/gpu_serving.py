"""Prefill and decode as two nodes of one GPU beside one node that has all of it, in Llama-3.1-8B's shape.

`python -m benchmarks.gpu_serving --json FILE`: random weights, the whole system over HTTP. Chats run
without a pause, long prompts come in at fixed times. The cache moves by CUDA IPC; what that took is told too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.disturbed.load import Figures, Load, run
from benchmarks.gpu_engine import LLAMA_8B
from benchmarks.gpu_transfer import device_name
from benchmarks.model import default_model
from benchmarks.result import write_result
from benchmarks.serving.loop import RequestFailed
from benchmarks.serving.servers import Server, flowkv
from flowkv.local_cluster import ClusterError
from flowkv_common.bus.connection import connect
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import KVTransferred

_WARM_UP = Load(2, 64, 8, 2048, 2, num_long=1, period_s=2.0)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_ON_GPU = {
    "FLOWKV_DEVICE": "cuda:0",  # by number: two nodes share it
    "FLOWKV_LOAD_FORMAT": "dummy",
    "FLOWKV_DTYPE": "bfloat16",
    "FLOWKV_KV_DTYPE": "bfloat16",
    "FLOWKV_MAX_NUM_SEQS": "64",
    "FLOWKV_LENDING": "false",
}


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    device = device_name()
    load = Load(options.chats, 256, 128, options.long, 4, options.num_long, options.period)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="flowkv-gpu-") as folder:
        model = _model(Path(folder), Path(options.tokenizer or default_model()))
        try:
            for chunk in [0, *options.chunks]:
                rows.append(_setup(chunk, load, model, Path(folder) / f"run-{chunk}", options))
                found = {"device": device, "load": asdict(load), "rows": rows}
                found["kv_cache_bytes"] = options.kv_cache_bytes
                write_result(options.json, "gpu_serving", found)  # after each: the last may be minutes away
        except (ClusterError, RequestFailed) as error:
            print(error, file=sys.stderr)
            return 1
    print(table(rows))
    return 0


def _model(folder: Path, tokenizer: Path) -> Path:
    """A folder with the shape of the large model and the words of the small one."""
    model = folder / "llama-8b"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_8B))
    for name in _TOKENIZER_FILES:
        shutil.copy(tokenizer / name, model / name)
    return model


def _setup(chunk: int, load: Load, model: Path, run_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One node that takes `chunk` tokens of prompts in a step; with 0, two nodes."""
    name = f"one node, chunks of {chunk}" if chunk else "1P1D"
    print(f"[gpu_serving] {name}", file=sys.stderr, flush=True)
    settings = {**_ON_GPU, "FLOWKV_KV_CACHE_BYTES": str(options.kv_cache_bytes)}
    if chunk:  # a mixed node's chunk is half of its budget
        roles, budget = ["mixed"], 2 * chunk
    else:
        roles, budget = ["prefill", "decode"], options.budget
    settings["FLOWKV_TOKEN_BUDGET"] = str(budget)
    nodes = {role: os.sched_getaffinity(0) for role in roles}
    with flowkv(run_dir, str(model), num_threads=1, nodes=nodes, settings=settings) as server:
        asyncio.run(run(server.url, _WARM_UP, seed=-1))
        figures, transfers = asyncio.run(_watched(server, load))
    return {"setup": name, **asdict(figures), "transfers": transfers}


async def _watched(server: Server, load: Load) -> tuple[Figures, dict[str, Any] | None]:
    """The load's figures, and those of the long prompts' transfers, if there were any."""
    events: list[KVTransferred] = []
    async with (
        connect(server.nats_url, name="gpu_serving") as bus,
        await bus.subscribe(
            subjects.event("kv_transferred", ">"), KVTransferred, lambda event, _: events.append(event)
        ),
    ):
        figures = await run(server.url, load, seed=0)
    most = max((event.num_bytes for event in events), default=0)
    longs = [event for event in events if event.num_bytes == most]
    if not longs:
        return figures, None
    return figures, {
        "connectors": sorted({event.connector for event in events}),
        "num_handoffs": len(events),
        "long_bytes": most,
        "long_calls": median(event.num_calls for event in longs),
        "long_total_ms": 1e3 * median(event.total_s for event in longs),
        "long_exposed_ms": 1e3 * median(event.exposed_s for event in longs),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'':<26}{'chats: ITL p50':>15}{'p99':>8}{'TTFT p50':>10}{'tok/s':>9}{'long: TTFT p50':>16}"]
    for row in rows:
        itl, ttft, long = row["chat_itl"], row["chat_ttft"], row["long_ttft"]
        lines.append(
            f"{row['setup']:<26}{1e3 * itl['p50']:>15.1f}{1e3 * itl['p99']:>8.1f}{1e3 * ttft['p50']:>10.0f}"
            f"{row['chat_tokens_per_s']:>9.0f}{1e3 * long['p50']:>16.0f}"
        )
        if row["transfers"]:
            lines.append(f"  {row['transfers']}")
    return "\n".join(lines)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_serving", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokenizer", default="", help="a model folder; the default model's if empty")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 2048], help="of the one node")
    parser.add_argument("--budget", type=int, default=2048, help="tokens per step of the two nodes")
    parser.add_argument("--kv-cache-bytes", type=int, default=12 << 30, help="of each node")
    parser.add_argument("--chats", type=int, default=16, help="clients that chat")
    parser.add_argument("--long", type=int, default=8000, help="tokens of a long prompt")
    parser.add_argument("--num-long", type=int, default=8)
    parser.add_argument("--period", type=float, default=2.0, help="seconds between long prompts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
