from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import grammar
from benchmarks.engine import row_of
from benchmarks.floor import Machine, Work
from benchmarks.parties import Job
from benchmarks.report import Spread, table
from tests.gateway_support import write_tokenizer
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
MACHINE = Machine(read_bytes_per_s=1e9, flop_per_s=1e12)
WORK = Work(layer_weights=100, head_weights=20, num_layers=2, hidden=8, kv_per_token=16)


def test_an_engine_needs_only_the_standard_library_of_us() -> None:
    """Each runs in an environment of its own."""
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import benchmarks.parties"
    subprocess.run([sys.executable, "-I", "-S", "-c", command], check=True)


def test_work_counts_the_weights_of_a_model(tmp_path: Path) -> None:
    config = {
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 10,
        "vocab_size": 7,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    per_layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 10
    assert Work.of(tmp_path / "config.json") == Work(
        3 * per_layer, 56, num_layers=3, hidden=8, kv_per_token=2 * 3 * 2 * 2
    )


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_work_counts_the_experts_of_a_mixture(tmp_path: Path, name: str) -> None:
    config = {
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 10,
        "vocab_size": 7,
        name: 32,
        "num_experts_per_tok": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    work = Work.of(tmp_path / "config.json")
    assert (work.num_experts, work.top_k, work.expert_weights) == (32, 4, 3 * 3 * 8 * 10)


def test_of_a_mixture_a_step_reads_the_experts_that_its_tokens_go_to() -> None:
    work = dataclasses.replace(WORK, expert_weights=10, num_experts=4, top_k=1)
    assert work.num_weights == 160
    one, two = (Job(batch=batch, context=0, num_steps=0) for batch in (1, 2))
    for job, num_experts in ((one, 1.0), (two, 4 - 4 * 0.75**2)):
        kv = 4 * job.batch * 0.5 * 16
        assert work.floor_s(job, MACHINE) == pytest.approx((4 * (120 + num_experts * 10) + kv) / 1e9)


def test_a_decode_step_reads_weights_once_and_every_context() -> None:
    job = Job(batch=2, context=10, num_steps=1)
    assert WORK.floor_s(job, MACHINE) == pytest.approx(4 * (120 + 2 * 11 * 16) / 1e9)
    assert WORK.floor_s(job, MACHINE, kv_item_bytes=2) == pytest.approx((4 * 120 + 2 * 2 * 11 * 16) / 1e9)


def test_a_prompt_is_bound_by_its_operations() -> None:
    job = Job(batch=0, context=10)
    slow = Machine(read_bytes_per_s=1e12, flop_per_s=1e6)
    assert WORK.floor_s(job, slow) == pytest.approx((2 * 10 * 100 + 2 * 20 + 4 * 55 * 2 * 8) / 1e6)


def test_rates_and_ratios_are_medians_over_rounds() -> None:
    job = Job(batch=2, context=10, num_steps=5)
    row = row_of(job, "other", seconds=[2.0, 1.0, 4.0], ours=[1.0, 1.0, 1.0], floor_s=0.1)
    assert (row["tokens_per_s"], row["num_repeats"]) == (Spread(5.0, 2.5, 10.0), 3)
    assert row["of_floor"] == 5 * 0.1 / 2.0
    assert row["flowkv_is_times"] == Spread(2.0, 1.0, 4.0)
    assert "2 (1-4)" in table([row])


def test_the_gpu_benchmark_runs_wherever_the_engine_does(tmp_path: Path) -> None:
    folder, path = make_tiny_model(tmp_path / "m"), tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks", "steps", "--json", str(path), "--device", "cpu"]
    command += ["--config", str(folder / "config.json"), "--dtype", "float32", "--repeat", "1"]
    command += ["--batches", "1", "3", "--context", "20", "--prompts", "40", "--chunk", "16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert (found["device"], found["attention"]) == ("cpu", "cpu")
    assert [(row["batch"], row["context"], row["graphs"]) for row in found["rows"]] == [
        (1, 20, False),
        (3, 20, False),
        (0, 40, False),
    ]
    assert all(row["ms"]["median"] > row["floor_ms"] > 0 for row in found["rows"])


@pytest.mark.full  # kernels compile
def test_the_benchmark_of_grammars_times_both_kinds_of_steps(tmp_path: Path) -> None:
    folder, path = write_tokenizer(make_tiny_model(tmp_path / "m", eos_token_id=0)), tmp_path / "grammar.json"
    options = [
        "--batches",
        "2",
        "--context",
        "9",
        "--steps",
        "3",
        "--model",
        str(folder),
        "--json",
        str(path),
    ]
    assert grammar.main(options) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["temperature"]) for row in rows] == [(2, 0.0), (2, 1.0)]
    assert all(row["free_ms"]["median"] > 0 < row["times"] for row in rows)


def test_jobs_cross_the_pipe_and_prompts_differ_by_seed() -> None:
    job = Job(batch=3, context=4, num_steps=2)
    asked = json.loads(job.line(seed=1))
    assert asked.pop("prompts") == job.prompts(1) == job.prompts(2)  # decode goes on from known prompts
    assert Job(**asked) == job
    prompt = Job(batch=0, context=4)
    assert prompt.prompts(1) == prompt.prompts(1)
    assert prompt.prompts(1) != prompt.prompts(2)
    assert [len(each) for each in prompt.prompts(0)] == [4]
