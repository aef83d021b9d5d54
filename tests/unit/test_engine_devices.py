from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowkv_engine.engine.gpu.devices import claimed, claimed_index
from flowkv_node.memory import WORKING_BYTES, bytes_left

HOLD = """
import sys
from pathlib import Path
from flowkv_engine.engine.gpu.devices import claimed_index

with claimed_index(["a", "b"], Path(sys.argv[1])) as index:
    print(index, flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def index_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_each_process_gets_a_gpu_of_its_own_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        assert index_of(first) == 0
        with hold(tmp_path) as second:
            assert index_of(second) == 1
            with (
                pytest.raises(ValueError, match="other nodes have all 2 GPUs"),
                claimed_index("ab", tmp_path),
            ):
                pass
            first.kill()
            first.wait(timeout=10)
            with claimed_index(["a", "b"], tmp_path) as index:
                assert index == 0
            second.kill()


def test_the_cpu_is_everybodys(tmp_path: Path) -> None:
    with claimed("cpu", tmp_path) as first, claimed("cpu", tmp_path) as second:
        assert first == second == torch.device("cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "choose one of cpu, cuda, cuda:1"),
        ("meta", "choose one of cpu, cuda"),
        ("cuda:9", "torch sees"),
    ],
)
def test_what_is_no_device_is_said(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), claimed(name, tmp_path):
        pass


def test_a_node_on_a_gpu_takes_its_share_less_what_it_holds() -> None:
    gib = 1 << 30
    assert bytes_left(80 * gib, 79 * gib, 16 * gib, 0.5) == 24 * gib - WORKING_BYTES
    # Others have taken most of it: only what is free counts.
    assert bytes_left(80 * gib, 10 * gib, 16 * gib, 0.9) == 10 * gib - WORKING_BYTES
    assert bytes_left(24 * gib, 23 * gib, 30 * gib, 0.9) < 0
