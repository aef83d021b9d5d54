"""What no engine can beat on a machine: bytes over read bandwidth, operations over a matmul's rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.parties import Job
from benchmarks.report import times_s

REPEATS = 7
READ_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Machine:
    """`read_bytes_per_s`: summing an array that no cache holds. `flop_per_s`: a large matmul.

    On CPUs the faster of torch's and numpy's: torch's library multiplies at half the rate on some of AMD's.
    """

    read_bytes_per_s: float
    flop_per_s: float


def measure_machine(num_threads: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """The best of several."""
    torch.set_num_threads(num_threads)
    num_bytes, size = READ_BYTES[device], MATMUL_SIZE[device]
    data = torch.ones(num_bytes // 4, device=device)
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)  # of ones it would be faster
    matmul_s = device_times(lambda: left @ right, REPEATS, device)
    if device == "cpu" and dtype == torch.float32:
        numpy_left, numpy_right = left.numpy(), right.numpy()
        matmul_s += times_s(lambda: numpy_left @ numpy_right, REPEATS)
    return Machine(num_bytes / min(device_times(data.sum, REPEATS, device)), 2 * size**3 / min(matmul_s))


def device_times(work: Callable[[], object], num_runs: int, device: str) -> list[float]:
    """`times_s`, each until the device has done it."""

    def to_its_end() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return times_s(to_its_end, num_runs)


@dataclass(frozen=True)
class Work:
    """What a model has to read and compute."""

    layer_weights: int  # of all layers' projections
    head_weights: int
    num_layers: int
    hidden: int  # heads * dim
    kv_per_token: int  # numbers, of all layers
    # Of a mixture: of all layers' experts with one number, and which share of these a token goes to.
    expert_weights: int = 0
    num_experts: int = 1
    top_k: int = 0

    @classmethod
    def of(cls, config_file: Path) -> Work:
        config = json.loads(config_file.read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        dim = config.get("head_dim") or hidden // heads
        kv_heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
        projections = 2 * hidden * heads * dim + 2 * hidden * kv_heads * dim
        # transformers writes the latter name, whatever it has read.
        num_experts = config.get("num_experts") or config.get("num_local_experts", 1)
        mlp = 3 * hidden * config["moe_intermediate_size" if num_experts > 1 else "intermediate_size"]
        is_dense = num_experts == 1
        return cls(
            layer_weights=layers * (projections + (mlp if is_dense else hidden * num_experts)),
            head_weights=hidden * config["vocab_size"],
            num_layers=layers,
            hidden=heads * dim,
            kv_per_token=2 * layers * kv_heads * dim,
            expert_weights=0 if is_dense else layers * mlp,
            num_experts=num_experts,
            top_k=config.get("num_experts_per_tok", 0),
        )

    @property
    def num_weights(self) -> int:
        return self.layer_weights + self.head_weights + self.num_experts * self.expert_weights

    def floor_s(
        self, job: Job, machine: Machine, kv_item_bytes: int = 4, weight_item_bytes: float = 4
    ) -> float:
        """Seconds of a decode step, or of a whole prompt: the longer of reading and computing.

        Of experts, those that tokens go to which choose at random.
        """
        missed = (1 - self.top_k / self.num_experts) ** (job.batch if job.is_decode else job.context)
        read = self.num_weights - missed * self.num_experts * self.expert_weights
        num_bytes = weight_item_bytes * read
        if job.is_decode:
            context = job.context + (job.num_steps + 1) / 2
            num_bytes += kv_item_bytes * job.batch * context * self.kv_per_token
            pairs, rows, sampled = job.batch * context, job.batch, job.batch
        else:
            pairs, rows, sampled = job.context * (job.context + 1) / 2, job.context, 1
        flop = 2.0 * rows * (self.layer_weights + self.top_k * self.expert_weights)
        flop += 2 * sampled * self.head_weights
        flop += 4 * pairs * self.num_layers * self.hidden
        return max(num_bytes / machine.read_bytes_per_s, flop / machine.flop_per_s)
