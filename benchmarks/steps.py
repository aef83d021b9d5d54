"""Single engine steps on a device, with graphs and without, beside what the device cannot beat.

Llama-3.1-8B's shape, random weights. Steps of decode, and whole prompts in chunks. The floor: bytes over the
measured read bandwidth, or operations over the measured rate of a large matmul.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import BenchmarkFailed
from benchmarks.floor import Work, device_times, measure_machine
from benchmarks.parties import Job
from benchmarks.report import Report, make_parser, spread
from benchmarks.shapes import BLOCK_SIZE, LLAMA_8B_CONFIG
from flowkv_common.wire.messages import SamplingParams
from flowkv_engine.engine.batch import PackedBatch, WorkItem, pack
from flowkv_engine.engine.batch import Sequence as Tokens
from flowkv_engine.engine.model import LoadedModel, load_model
from flowkv_engine.engine.runner import Runner


class Bench:
    """One model over one pool, with and without graphs."""

    def __init__(self, model: LoadedModel, num_blocks: int, max_num_seqs: int, token_budget: int) -> None:
        shape = (num_blocks, model.num_layers, 2, BLOCK_SIZE, model.num_kv_heads, model.head_dim)
        weight = next(model.module.parameters())
        self.pool = torch.empty(shape, dtype=weight.dtype, device=weight.device).normal_()
        self.runner = Runner(
            model, self.pool, attention="auto", max_num_seqs=max_num_seqs, token_budget=token_budget
        )
        self.graphs = self.runner._graphs

    def has_graphs(self, batches: Sequence[PackedBatch]) -> bool:
        return self.graphs is not None and all(self.graphs.shape_of(batch) for batch in batches)

    def decode_step(self, num_sequences: int, context: int) -> list[PackedBatch]:
        """KV is whatever lies in the pool."""
        items = [WorkItem(_tokens(number, context, 1), 1) for number in range(num_sequences)]
        return [pack(items, BLOCK_SIZE)]

    def prompt_steps(self, num_tokens: int, chunk: int) -> list[PackedBatch]:
        left = range(num_tokens, 0, -chunk)
        return [pack([WorkItem(_tokens(0, num_tokens, n), min(chunk, n))], BLOCK_SIZE) for n in left]

    def seconds(self, batches: Sequence[PackedBatch], num_runs: int, *, graphs: bool) -> list[float]:
        """For all of the batches, one after the other."""
        self.runner._graphs = self.graphs if graphs else None
        device = self.pool.device.type
        return device_times(lambda: [self.runner.run(batch) for batch in batches], num_runs, device)


def _tokens(number: int, context: int, num_left: int) -> Tokens:
    num_blocks = -(-context // BLOCK_SIZE)
    blocks = list(range(number * num_blocks, (number + 1) * num_blocks))
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    tokens = Tokens("bench", "", [1] * context, [], sampling, 0.0, blocks)
    tokens.num_computed_tokens = context - num_left
    return tokens


def main(argv: Sequence[str]) -> int:
    parser = make_parser("steps", __doc__, devices=("cuda", "cpu"))
    parser.add_argument("--config", type=Path, help="a config.json of another shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024, 2048, 8192])
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt in one step")
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkFailed("--device cuda: no CUDA device is here")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(options.config.read_text() if options.config else json.dumps(LLAMA_8B_CONFIG))
        work = Work.of(config)
        model = load_model(folder, name="bench", dtype=dtype, load_format="dummy", device=device)
    machine = measure_machine(torch.get_num_threads(), options.device, dtype)
    most = max(options.batches)
    num_tokens = max(most * options.context, *options.prompts)
    bench = Bench(model, -(-num_tokens // BLOCK_SIZE) + most, most, options.chunk)
    jobs = [(batch, options.context, bench.decode_step(batch, options.context)) for batch in options.batches]
    jobs += [(0, num_tokens, bench.prompt_steps(num_tokens, options.chunk)) for num_tokens in options.prompts]
    report = Report(options)
    report.more = {
        "device": torch.cuda.get_device_name(device) if options.device == "cuda" else "cpu",
        "attention": bench.runner.attention.name,
        "read_gb_per_s": machine.read_bytes_per_s / 1e9,
        "tflop_per_s": machine.flop_per_s / 1e12,
    }
    for batch, context, steps in jobs:
        floor_s = work.floor_s(Job(batch, context), machine, dtype.itemsize, dtype.itemsize)
        for graphs in (False, True) if bench.has_graphs(steps) else (False,):
            ms = spread(1e3 * each for each in bench.seconds(steps, options.repeat, graphs=graphs))
            report.add_row(
                batch=batch,  # 0: one prompt of `context` tokens
                context=context,
                graphs=graphs,
                ms=ms,
                floor_ms=floor_s * 1e3,
                tokens_per_s=1e3 * (batch or context) / ms.median,
            )
    return report.finish("batch", "context", "graphs", "ms", "floor_ms", "tokens_per_s")
