"""Single engine steps on a device, with graphs and without, beside what the device cannot beat.

Llama-3.1-8B's shape, random weights. Steps of decode, and whole prompts in chunks. The floor: bytes over the
measured read bandwidth, or operations over the measured rate of a large matmul.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
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
from flowkv_engine.engine.model import load_model
from flowkv_engine.engine.runner import Runner
from flowkv_engine.kv.pool import layer_views


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
        model = load_model(folder, name="bench", dtype=options.dtype, load_format="dummy", device=device)
    machine = measure_machine(torch.get_num_threads(), options.device, dtype)
    most = max(options.batches)
    num_tokens = max(most * options.context, *options.prompts)
    layout = model.layout(BLOCK_SIZE, options.dtype)
    numbers = layout.block_bytes // dtype.itemsize
    shape = (-(-num_tokens // BLOCK_SIZE) + most, numbers)
    pool = torch.empty(shape, dtype=dtype, device=device).normal_()
    runner = Runner(
        model, layer_views(pool, layout), attention="auto", max_num_seqs=most, token_budget=options.chunk
    )
    graphs = runner._graphs
    jobs = [(batch, options.context, [decode_step(batch, options.context)]) for batch in options.batches]
    jobs += [(0, num_tokens, prompt_steps(num_tokens, options.chunk)) for num_tokens in options.prompts]
    report = Report(options)
    report.more = {
        "device": torch.cuda.get_device_name(device) if options.device == "cuda" else "cpu",
        "attention": runner.attention.name,
        "read_gb_per_s": machine.read_bytes_per_s / 1e9,
        "tflop_per_s": machine.flop_per_s / 1e12,
    }
    for batch, context, steps in jobs:
        floor_s = work.floor_s(Job(batch, context), machine, dtype.itemsize, dtype.itemsize)
        has_graphs = graphs is not None and all(graphs.shape_of(step) for step in steps)
        for with_graphs in (False, True) if has_graphs else (False,):
            runner._graphs = graphs if with_graphs else None
            run_all = partial(run_steps, runner, steps)
            ms = spread(1e3 * each for each in device_times(run_all, options.repeat, options.device))
            report.add_row(
                batch=batch,  # 0: one prompt of `context` tokens
                context=context,
                graphs=with_graphs,
                ms=ms,
                floor_ms=floor_s * 1e3,
                tokens_per_s=1e3 * (batch or context) / ms.median,
            )
    return report.finish("batch", "context", "graphs", "ms", "floor_ms", "tokens_per_s")


def decode_step(num_sequences: int, context: int) -> PackedBatch:
    """KV is whatever lies in the pool."""
    return pack([WorkItem(tokens(number, context, 1), 1) for number in range(num_sequences)], BLOCK_SIZE)


def prompt_steps(num_tokens: int, chunk: int) -> list[PackedBatch]:
    left = range(num_tokens, 0, -chunk)
    return [pack([WorkItem(tokens(0, num_tokens, n), min(chunk, n))], BLOCK_SIZE) for n in left]


def tokens(number: int, context: int, num_left: int) -> Tokens:
    """A sequence of which all but `num_left` tokens are computed, in blocks that no other `number` has."""
    num_blocks = -(-context // BLOCK_SIZE)
    blocks = list(range(number * num_blocks, (number + 1) * num_blocks))
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    sequence = Tokens("bench", "", [1] * context, [], sampling, 0.0, blocks)
    sequence.num_computed_tokens = context - num_left
    return sequence


def run_steps(runner: Runner, steps: Sequence[PackedBatch]) -> None:
    for step in steps:
        runner.run(step)
