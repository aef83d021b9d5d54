"""What no engine can beat on this machine: bytes over read bandwidth, operations over a matmul's rate."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine.jobs import Job

_NUM_BYTES = 1 << 30
_MATMUL_SIZE = 2048
_REPEATS = 7
_ITEM_BYTES = 4


@dataclass(frozen=True)
class Machine:
    """`read_bytes_per_s`: summing an array that no cache holds. `flop_per_s`: a large fp32 matmul."""

    read_bytes_per_s: float
    flop_per_s: float


def measure(num_threads: int) -> Machine:
    """The best of several."""
    torch.set_num_threads(num_threads)
    data = torch.ones(_NUM_BYTES // _ITEM_BYTES)
    left, right = torch.ones(2, _MATMUL_SIZE, _MATMUL_SIZE)
    return Machine(_NUM_BYTES / _best_s(data.sum), 2 * _MATMUL_SIZE**3 / _best_s(lambda: left @ right))


def _best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True)
class Work:
    """What a model has to read and compute."""

    layer_weights: int  # of all layers' projections
    head_weights: int
    num_layers: int
    hidden: int  # heads * dim
    kv_per_token: int  # numbers, of all layers

    @classmethod
    def of(cls, folder: Path) -> Work:
        config = json.loads((folder / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        dim = config.get("head_dim") or hidden // heads
        kv_heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
        per_layer = (
            2 * hidden * heads * dim + 2 * hidden * kv_heads * dim + 3 * hidden * config["intermediate_size"]
        )
        return cls(
            layer_weights=layers * per_layer,
            head_weights=hidden * config["vocab_size"],
            num_layers=layers,
            hidden=heads * dim,
            kv_per_token=2 * layers * kv_heads * dim,
        )

    def floor_s(
        self,
        job: Job,
        machine: Machine,
        kv_item_bytes: int = _ITEM_BYTES,
        weight_item_bytes: int = _ITEM_BYTES,
    ) -> float:
        """Seconds of a decode step, or of a whole prompt: the longer of reading and computing."""
        if job.is_decode:
            context = job.context + (job.num_steps + 1) / 2
            num_bytes = weight_item_bytes * (self.layer_weights + self.head_weights)
            num_bytes += kv_item_bytes * job.batch * context * self.kv_per_token
            pairs, rows, sampled = job.batch * context, job.batch, job.batch
        else:
            num_bytes = weight_item_bytes * (self.layer_weights + self.head_weights)
            pairs, rows, sampled = job.context * (job.context + 1) / 2, job.context, 1
        flop = 2 * rows * self.layer_weights + 2 * sampled * self.head_weights
        flop += 4 * pairs * self.num_layers * self.hidden
        return max(num_bytes / machine.read_bytes_per_s, flop / machine.flop_per_s)


if __name__ == "__main__":
    found = measure(int(sys.argv[1]))
    print(json.dumps([found.read_bytes_per_s, found.flop_per_s]))
