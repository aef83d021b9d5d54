"""Decode steps of sequences that keep to a JSON schema, beside steps of free ones: what a grammar costs.

The two take turns, so that a busy host costs both the same.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.report import Report, make_parser, spread, time_s
from benchmarks.shapes import BLOCK_SIZE
from flowkv_common.wire.messages import Grammar, SamplingParams
from flowkv_engine.engine.batch import Sequence as Tokens
from flowkv_engine.engine.batch import WorkItem, pack
from flowkv_engine.engine.model import load_model
from flowkv_engine.engine.runner import Runner
from flowkv_engine.kv.pool import layer_views

NUM_WARM = 8  # steps that don't count: a grammar is compiled in the first ones, and its states are new
# Long enough for all steps: a list and a text, the two that answers mostly are.
SCHEMA = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 8},
        "text": {"type": "string", "minLength": 10_000},
    },
    "required": ["tags", "text"],
    "additionalProperties": False,
}


def main(argv: Sequence[str]) -> int:
    parser = make_parser("grammar", __doc__, model=True, devices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    model = load_model(options.model, name=None, dtype=options.dtype, load_format="auto", device=device)
    most, num_steps = max(options.batches), NUM_WARM + options.steps
    blocks_each = -(-(options.context + num_steps + 1) // BLOCK_SIZE)
    layout = model.layout(BLOCK_SIZE, "auto")
    shape = (2 * most * blocks_each, layout.block_bytes // model.dtype.itemsize)
    pool = torch.zeros(shape, dtype=model.dtype, device=device)
    runner = Runner(model, layer_views(pool, layout), attention="auto", max_num_seqs=most)
    grammar = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
    report = Report(options)

    def tokens(place: int, grammar: Grammar | None) -> Tokens:
        sampling = SamplingParams(
            max_tokens=num_steps + 2, seed=place, temperature=temperature, grammar=grammar
        )
        blocks = list(range(place * blocks_each, (place + 1) * blocks_each))
        return Tokens("bench", "", [place + 5] * options.context, [], sampling, 0.0, blocks)

    for batch in options.batches:
        for temperature in (0.0, 1.0):
            free = [tokens(place, None) for place in range(batch)]
            bound = [tokens(most + place, grammar) for place in range(batch)]
            pairs = measure(runner, free, bound, num_steps)[NUM_WARM:]
            report.add_row(
                batch=batch,
                temperature=temperature,
                free_ms=spread(1e3 * one for one, _ in pairs),
                bound_ms=spread(1e3 * one for _, one in pairs),
                times=round(statistics.median(bound / free for free, bound in pairs), 3),
            )
    return report.finish("batch", "temperature", "free_ms", "bound_ms", "times")


def measure(
    runner: Runner, free: Sequence[Tokens], bound: Sequence[Tokens], num_steps: int
) -> list[tuple[float, float]]:
    """Seconds of each step of the free ones, and of that of the bound ones after it."""
    for sequence in (*free, *bound):
        step(runner, [sequence])
    return [
        (time_s(partial(step, runner, free)), time_s(partial(step, runner, bound))) for _ in range(num_steps)
    ]


def step(runner: Runner, sequences: Sequence[Tokens]) -> None:
    """One token more for each."""
    result = runner.run(pack([WorkItem(one, one.num_new_tokens) for one in sequences], BLOCK_SIZE))
    for sequence, sampled in zip(sequences, result.sampled, strict=True):
        assert sampled is not None
        assert sampled.error is None, sampled.error
        sequence.num_computed_tokens = sequence.num_tokens
        sequence.output_ids.append(sampled.token_id)
