"""FlowKV's engine: packing, the forward pass and sampling, in a loop; no bus, no services."""

from __future__ import annotations

import os
import time

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as nodes do

import torch

from benchmarks.parties import Job, Prompts, serve
from flowkv_common.wire.messages import SamplingParams
from flowkv_engine.engine.batch import Sequence, WorkItem, pack
from flowkv_engine.engine.model import load_model
from flowkv_engine.engine.runner import Runner
from flowkv_engine.kv.pool import KVPool, layer_views

_BLOCK_SIZE = 16
_CHUNK_TOKENS = 512
_SAMPLING = SamplingParams(max_tokens=4096, temperature=0.0, ignore_eos=True)


class FlowKV:
    """The blocks of sequence n begin at `n * blocks per sequence`: one run each."""

    def __init__(self, model_path: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        model = load_model(model_path, name=None, dtype="float32", load_format="auto")
        layout = model.layout(_BLOCK_SIZE, "float32")
        self._pool = KVPool(layout, num_blocks=16 * 2304 // _BLOCK_SIZE)
        self._runner = Runner(model, layer_views(self._pool.tensor, layout), attention="auto")
        self._sequences: list[Sequence] = []

    def compute_prompts(self, job: Job, prompts: Prompts) -> None:
        self._sequences = _sequences(job, prompts)
        for sequence in self._sequences:
            self._prefill(sequence)

    def decode_s(self, job: Job, prompts: Prompts) -> float:
        for sequence in self._sequences:
            del sequence.output_ids[1:]
            sequence.num_computed_tokens = job.context
        return sum(self._step(self._sequences) for _ in range(job.num_steps))

    def prefill_s(self, job: Job, prompts: Prompts) -> float:
        [sequence] = _sequences(job, prompts)
        return self._prefill(sequence)

    def _prefill(self, sequence: Sequence) -> float:
        seconds = 0.0
        while not sequence.output_ids:
            seconds += self._step([sequence])
        return seconds

    def _step(self, sequences: list[Sequence]) -> float:
        began = time.perf_counter()
        items = [WorkItem(sequence, min(_CHUNK_TOKENS, sequence.num_new_tokens)) for sequence in sequences]
        result = self._runner.run(pack(items, _BLOCK_SIZE))
        for item, token in zip(items, result.sampled, strict=True):
            item.sequence.num_computed_tokens += item.num_tokens
            if token is not None:
                item.sequence.output_ids.append(token.token_id)
        return time.perf_counter() - began


def _sequences(job: Job, prompts: Prompts) -> list[Sequence]:
    per_sequence = -(-(job.context + job.num_steps + 1) // _BLOCK_SIZE)
    return [
        Sequence(
            transfer_id=str(number),
            gateway_id="",
            prompt_ids=prompt,
            output_ids=[],
            sampling=_SAMPLING,
            deadline=float("inf"),
            block_table=list(range(number * per_sequence, (number + 1) * per_sequence)),
        )
        for number, prompt in enumerate(prompts)
    ]


if __name__ == "__main__":
    serve(FlowKV)
