"""The bare engine on a GPU, in Llama-3.1-8B's shape: `python -m benchmarks.gpu_engine --json FILE`.

Random weights. Steps of decode with graphs and without, and whole prompts, each beside what the device cannot
beat: bytes over the measured read bandwidth, operations over the measured rate of a large matmul.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.engine.floor import Machine, Work
from benchmarks.engine.jobs import Job
from benchmarks.result import write_result
from flowkv_common.wire.messages import SamplingParams
from flowkv_engine.engine.batch import PackedBatch, WorkItem, pack
from flowkv_engine.engine.model import LoadedModel, load_model
from flowkv_engine.engine.runner import Runner
from flowkv_engine.engine.sequence import Sequence as Tokens

BLOCK_SIZE = 16
MATMUL_SIZE = 8192
READ_BYTES = 4 << 30
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


class Row(NamedTuple):
    """`batch` sequences of `context` tokens, or one prompt of so many where `batch` is 0. Milliseconds."""

    batch: int
    context: int
    graphs: bool
    median_ms: float
    min_ms: float
    max_ms: float
    floor_ms: float
    tokens_per_s: float


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of several: a sum over more than any cache holds, and a large matmul in `dtype`."""
    on_gpu = device.type == "cuda"
    data = torch.ones((READ_BYTES if on_gpu else READ_BYTES >> 5) // 4, device=device)
    size = MATMUL_SIZE if on_gpu else MATMUL_SIZE >> 4
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)  # of ones it would be faster
    return Machine(
        data.numel() * 4 / min(timed(data.sum, 10, device)),
        2 * size**3 / min(timed(lambda: left @ right, 10, device)),
    )


def timed(work: Callable[[], object], num_runs: int, device: torch.device) -> list[float]:
    """Seconds until the device has done it, after two runs that are not counted."""
    seconds = []
    for _ in range(2 + num_runs):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


class Bench:
    """One model over one pool, with and without graphs."""

    def __init__(self, model: LoadedModel, num_blocks: int, max_num_seqs: int, token_budget: int) -> None:
        shape = (num_blocks, model.num_layers, 2, BLOCK_SIZE, model.num_kv_heads, model.head_dim)
        weight = next(model.module.parameters())
        self.pool = torch.empty(shape, dtype=weight.dtype, device=weight.device).normal_()
        self.runner = Runner(
            model, self.pool, attention="auto", max_num_seqs=max_num_seqs, token_budget=token_budget
        )

    def has_graphs(self, batches: Sequence[PackedBatch]) -> bool:
        graphs = self.runner._graphs
        return graphs is not None and all(graphs.shape_of(batch) for batch in batches)

    def decoding(self, num_sequences: int, context: int) -> PackedBatch:
        """A step of decode of so many. KV is whatever lies in the pool."""
        items = [WorkItem(self._tokens(number, context, 1), 1) for number in range(num_sequences)]
        return pack(items, BLOCK_SIZE)

    def run(self, batches: Sequence[PackedBatch], num_runs: int, *, graphs: bool) -> list[float]:
        """Seconds for all of them, one after the other."""
        recorded = self.runner._graphs
        if not graphs:
            self.runner._graphs = None
        try:
            return timed(lambda: [self.runner.run(batch) for batch in batches], num_runs, self.pool.device)
        finally:
            self.runner._graphs = recorded

    def prompt(self, num_tokens: int, chunk: int) -> list[PackedBatch]:
        """Its chunks."""
        chunks = []
        for first in range(0, num_tokens, chunk):
            tokens = self._tokens(0, num_tokens, num_tokens - first)
            chunks.append(pack([WorkItem(tokens, min(chunk, num_tokens - first))], BLOCK_SIZE))
        return chunks

    def _tokens(self, number: int, context: int, num_left: int) -> Tokens:
        num_blocks = -(-context // BLOCK_SIZE)
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        blocks = list(range(number * num_blocks, (number + 1) * num_blocks))
        tokens = Tokens("", 0, "bench", "", [1] * context, [], sampling, 0.0, blocks)
        tokens.num_computed_tokens = context - num_left
        return tokens


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(options.config).read_text() if options.config else json.dumps(LLAMA_8B)
        (Path(folder) / "config.json").write_text(config)
        work = Work.of(Path(folder))
        model = load_model(
            folder, name="bench", dtype=dtype, load_format="dummy", on_progress=print, device=device
        )
    machine = measure(device, dtype)
    needed = max(max(options.batches) * options.context, max(options.prompts))
    most = max(options.batches)
    bench = Bench(model, -(-needed // BLOCK_SIZE) + most, most, options.chunk)
    rows = []
    jobs = [(batch, options.context, [bench.decoding(batch, options.context)]) for batch in options.batches]
    jobs += [(0, num_tokens, bench.prompt(num_tokens, options.chunk)) for num_tokens in options.prompts]
    for batch, num_tokens, steps in jobs:
        for graphs in (False, True)[: 1 + bench.has_graphs(steps)]:
            seconds = bench.run(steps, options.repeat, graphs=graphs)
            rows.append(_row(batch, num_tokens, graphs, seconds, work, machine, dtype))
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "attention": bench.runner.attention.name,
        "dtype": options.dtype,
        "read_gb_per_s": machine.read_bytes_per_s / 1e9,
        "tflop_per_s": machine.flop_per_s / 1e12,
        "rows": [row._asdict() for row in rows],
    }
    write_result(options.json, "gpu_engine", found)
    print(table(rows))
    return 0


def _row(
    batch: int,
    context: int,
    graphs: bool,
    seconds: list[float],
    work: Work,
    machine: Machine,
    dtype: torch.dtype,
) -> Row:
    floor_s = work.floor_s(Job(batch, context, num_steps=1), machine, dtype.itemsize, dtype.itemsize)
    middle_s = median(seconds)
    return Row(
        batch=batch,
        context=context,
        graphs=graphs,
        median_ms=middle_s * 1e3,
        min_ms=min(seconds) * 1e3,
        max_ms=max(seconds) * 1e3,
        floor_ms=floor_s * 1e3,
        tokens_per_s=(batch or context) / middle_s,
    )


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'work':<22}{'graphs':>8}{'median ms':>12}{'min':>10}{'max':>10}{'floor':>10}{'tokens/s':>12}"]
    for row in rows:
        work = f"decode {row.batch} x {row.context}" if row.batch else f"prompt of {row.context}"
        lines.append(
            f"{work:<22}{'on' if row.graphs else 'off':>8}{row.median_ms:>12.2f}{row.min_ms:>10.2f}"
            f"{row.max_ms:>10.2f}{row.floor_ms:>10.2f}{row.tokens_per_s:>12,.0f}"
        )
    return "\n".join(lines)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_engine", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--config", default="", help="a config.json of another shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024, 2048, 8192])
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt in one step")
    parser.add_argument("--repeat", type=int, default=20)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
