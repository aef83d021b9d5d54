from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flowkv_engine.engine.cpu.forward import give_back

NUM_BYTES = 8 << 20


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the mapping that holds the tensor, as the kernel counts them."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            start, stop = (int(each, 16) for each in name.split("-"))
            inside = start <= address < stop
        elif inside and name == "Rss:":
            return 1024 * int(values[0])
    raise AssertionError("no mapping holds the tensor")


def test_pages_of_a_file_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    numbers = torch.arange(NUM_BYTES // 4, dtype=torch.float32)
    save_file({"weight": numbers}, tmp_path / "model.safetensors")
    weight = load_file(tmp_path / "model.safetensors")["weight"]
    assert torch.equal(weight, numbers)
    assert resident_bytes(weight) >= NUM_BYTES
    give_back([weight])
    assert resident_bytes(weight) < NUM_BYTES // 8
    assert torch.equal(weight, numbers)


def test_memory_without_a_file_keeps_what_it_holds() -> None:
    numbers = torch.arange(NUM_BYTES // 4, dtype=torch.float32)
    give_back([numbers, numbers[:3], numbers[:0]])
    assert torch.equal(numbers, torch.arange(NUM_BYTES // 4, dtype=torch.float32))
