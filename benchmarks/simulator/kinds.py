"""Kinds of nodes: what a step costs, how much KV fits, how fast it leaves; and the targets that follow.

`smollm2-cpu` stands for a measured engine. The GPU kinds are derived from published peaks by the stated
efficiencies: they have the right proportions, and are no measurement of anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.simulator.batch import Limits, step_s
from flowkv.bench.traces import Request, Targets
from flowkv_common.wire.messages import PoolLayout
from flowkv_common.wire.nodes import StepFit, num_attended

# Llama-3.1-8B, bf16 (its config.json): 8.03e9 parameters, of which the 0.53e9 of the embedding only look up.
WEIGHT_BYTES = 2 * 8.03e9
TOKEN_FLOPS = 2 * 7.5e9
# Scores and values of one pair, in each of 32 layers with 32 heads of 128.
PAIR_FLOPS = 4 * 32 * 32 * 128
# Blocks of 64 tokens, to keep the lists of hashes short.
LLAMA_LAYOUT = PoolLayout(num_layers=32, block_size=64, num_kv_heads=8, head_dim=128, dtype="bfloat16")
# What of the peaks an engine gets: dense layers of long chunks, attention, and reading weights and KV.
COMPUTE_EFFICIENCY = 0.5
ATTENTION_EFFICIENCY = 0.3
BANDWIDTH_EFFICIENCY = 0.75
NETWORK_EFFICIENCY = 0.8
# Of the memory; what weights leave of it is KV.
MEMORY_IN_USE = 0.9
# Launches and Python per step, sampling and bookkeeping per sequence.
STEP_OVERHEAD_S = 0.002
SEQUENCE_OVERHEAD_S = 10e-6

# The default targets are multiples of what an idle node gives.
TTFT_FACTOR = 3.0
TTFT_EXTRA_S = 0.25
TPOT_FACTOR = 2.0
TTFT_QUANTILE = 0.9


class NodeKind(msgspec.Struct, frozen=True, kw_only=True):
    """A model on a device. `link_bytes_per_s` is what leaves a node, `link_latency_s` is per handoff."""

    name: str
    fit: StepFit
    layout: PoolLayout
    num_blocks: int
    token_budget: int
    max_num_seqs: int
    max_model_len: int
    connector: str
    link_bytes_per_s: float
    link_latency_s: float = 0.002

    @property
    def limits(self) -> Limits:
        return Limits(self.layout.block_size, self.token_budget, self.max_num_seqs)

    @property
    def token_bytes(self) -> float:
        return self.layout.block_bytes / self.layout.block_size


class Device(NamedTuple):
    """Published peaks: dense bf16 tensor FLOP/s, bytes/s of memory, bytes of memory, bytes/s of network."""

    flops: float
    bandwidth: float
    memory: float
    network: float


DEVICES = {
    # NVIDIA A100 80GB SXM data sheet: 312 TFLOPS, 2,039 GB/s; in hosts with 200 Gbit/s per GPU.
    "a100": Device(312e12, 2.039e12, 80e9, 25e9),
    # NVIDIA H100 SXM data sheet: 989 TFLOPS without sparsity, 3.35 TB/s; 400 Gbit/s per GPU.
    "h100": Device(989e12, 3.35e12, 80e9, 50e9),
    # NVIDIA L40S data sheet: 362 TFLOPS without sparsity, 864 GB/s, 48 GB; 100 Gbit/s.
    "l40s": Device(362e12, 0.864e12, 48e9, 12.5e9),
    # NVIDIA A10G as in AWS g5: 70 TFLOPS dense, 600 GB/s, 24 GB; 25 Gbit/s.
    "a10g": Device(70e12, 0.6e12, 24e9, 3.125e9),
}


def derived(name: str, device: Device) -> NodeKind:
    """Llama-3.1-8B on the device.

    Times for reading weights and for computing are added, where a GPU overlaps them: steps of few prompt
    tokens come out too long by at most the time of their computing.
    """
    flops, bandwidth = device.flops, device.bandwidth * BANDWIDTH_EFFICIENCY
    token_s = TOKEN_FLOPS / (flops * COMPUTE_EFFICIENCY)
    kv_bytes = device.memory * MEMORY_IN_USE - WEIGHT_BYTES
    return NodeKind(
        name=name,
        fit=StepFit(
            base_s=WEIGHT_BYTES / bandwidth + STEP_OVERHEAD_S,
            prefill_token_s=token_s,
            attended_token_s=PAIR_FLOPS / (flops * ATTENTION_EFFICIENCY),
            sequence_s=token_s + SEQUENCE_OVERHEAD_S,
            context_token_s=LLAMA_LAYOUT.block_bytes / LLAMA_LAYOUT.block_size / bandwidth,
        ),
        layout=LLAMA_LAYOUT,
        num_blocks=int(kv_bytes / LLAMA_LAYOUT.block_bytes),
        token_budget=4096,
        max_num_seqs=256,
        max_model_len=131_072,
        connector="nccl",
        link_bytes_per_s=device.network * NETWORK_EFFICIENCY,
    )


# SmolLM2-135M, fp32, one core of two: about 27 ms for one sequence of 512 tokens, 82 ms for 16, 1,000 prompt
# tokens/s. 1 GiB of KV; the link is a copy through shared memory.
SMOLLM2_CPU = NodeKind(
    name="smollm2-cpu",
    fit=StepFit(
        base_s=0.0235, prefill_token_s=0.0008, attended_token_s=5e-7, sequence_s=0.0026, context_token_s=2e-6
    ),
    layout=PoolLayout(num_layers=30, block_size=16, num_kv_heads=3, head_dim=64, dtype="float32"),
    num_blocks=1456,
    token_budget=512,
    max_num_seqs=64,
    max_model_len=8192,
    connector="shm",
    link_bytes_per_s=1e9,
)
KINDS = {"smollm2-cpu": SMOLLM2_CPU, **{name: derived(name, device) for name, device in DEVICES.items()}}


def slowest_that_holds(num_tokens: int) -> NodeKind:
    """Of the derived kinds with room in their KV for so many tokens, the one with the longest steps.

    Raises ValueError when none has room.
    """
    kinds = [KINDS[name] for name in DEVICES]
    roomy = [kind for kind in kinds if kind.num_blocks * kind.layout.block_size >= num_tokens]
    return max(roomy, key=lambda kind: kind.fit.base_s)


def with_fit(kind: NodeKind, file: Path) -> NodeKind:
    """The kind with the fit in a JSON file: a `StepFit`, or a load report with one under `step`.

    Raises OSError or msgspec.ValidationError.
    """
    found = json.loads(file.read_text())
    return msgspec.structs.replace(kind, fit=msgspec.convert(found.get("step", found), StepFit))


def default_targets(kind: NodeKind, requests: Sequence[Request], tpot_factor: float = TPOT_FACTOR) -> Targets:
    """TTFT: 3 x that of the p90 prompt on an idle node, and 0.25 s. TPOT: `tpot_factor` x a step of one
    mean sequence.
    """
    prompts = sorted(request.num_prompt_tokens for request in requests)
    long_prompt = prompts[min(len(prompts) - 1, int(TTFT_QUANTILE * len(prompts)))]
    mean_context = sum(r.num_prompt_tokens + r.num_output_tokens / 2 for r in requests) / len(requests)
    return Targets(
        TTFT_FACTOR * unloaded_prefill_s(kind, long_prompt) + TTFT_EXTRA_S,
        tpot_factor * step_s(kind.fit, 0, 0, 1, round(mean_context)),
    )


def targets_of(kind: NodeKind, requests: Sequence[Request], options: argparse.Namespace) -> Targets:
    """The targets that `--ttft` and `--tpot` ask for, or the default ones."""
    targets = default_targets(kind, requests)
    return Targets(options.ttft or targets.ttft_s, options.tpot or targets.tpot_s)


def unloaded_prefill_s(kind: NodeKind, num_tokens: int) -> float:
    """Seconds of a prompt alone on a node, nothing of it cached."""
    num_steps = -(-num_tokens // kind.token_budget)
    whole = step_s(kind.fit, num_tokens, num_attended(num_tokens), 0, 0)
    return whole + (num_steps - 1) * kind.fit.base_s
