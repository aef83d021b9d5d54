"""KV in floats of 8 bits: the same numbers in every backend, so the same tokens on every path."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from flowkv_engine.engine import attention
from flowkv_engine.engine.batch import Sequence
from flowkv_engine.engine.cpu.attention import _stored, _widened
from flowkv_engine.engine.gpu import e4m3
from flowkv_engine.engine.runner import Runner
from tests.drive import BLOCK_SIZE, generate, load_tiny, make_pool, make_sequence
from tests.tiny_models import make_tiny_model

CODES = torch.arange(256, dtype=torch.uint8)
FLOATS = CODES.view(torch.float8_e4m3fn).float()
PROMPT = [token * 7 % 512 for token in range(45)]


def numbers() -> torch.Tensor:
    """All floats of 8 bits, halves between two, their neighbours, and what none is as large as."""
    exact = FLOATS[FLOATS.isfinite()].sort().values
    ties = (exact[1:] + exact[:-1]) / 2
    above, below = (torch.nextafter(ties, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    ends = torch.tensor([464.0, 465.0, 480.0, -1e30, torch.inf, -torch.inf, torch.nan, 1e-40])
    return torch.cat([exact, ties, above, below, ends])


@triton.jit
def _cast(source, target, length, narrows: tl.constexpr, size: tl.constexpr):
    places = tl.arange(0, size)
    numbers = tl.load(source + places, mask=places < length)
    dtype: tl.constexpr = target.dtype.element_ty
    cast = e4m3.narrowed(numbers, dtype) if narrows else e4m3.widened(numbers, dtype)
    tl.store(target + places, cast, mask=places < length)


def test_triton_gives_the_bits_of_torch() -> None:
    given = numbers()
    codes = torch.empty(len(given), dtype=torch.uint8)
    _cast[(1,)](given, codes, len(given), narrows=True, size=2048)
    assert torch.equal(codes, attention.narrowed(given, torch.float8_e4m3fn).view(torch.uint8))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        floats = torch.empty(256, dtype=dtype)
        _cast[(1,)](CODES, floats, 256, narrows=False, size=256)
        torch.testing.assert_close(floats.float(), FLOATS, atol=0, rtol=0, equal_nan=True)


@numba.njit
def _narrow(numbers, codes):
    for place in range(len(numbers)):
        codes[place] = _stored(numbers[place], codes[place])


@numba.njit
def _widen(codes, floats):
    for place in range(len(codes)):
        floats[place] = _widened(codes[place])


@pytest.mark.full  # compiles
def test_compiled_code_gives_the_bits_of_torch() -> None:
    given = numbers()
    codes, floats = np.empty(len(given), np.uint8), np.empty(256, np.float32)
    _narrow(given.numpy(), codes)
    assert np.array_equal(codes, attention.narrowed(given, torch.float8_e4m3fn).view(torch.uint8).numpy())
    _widen(CODES.numpy(), floats)
    assert np.array_equal(floats, FLOATS.numpy(), equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=pytest.mark.full)])
def test_a_prompt_in_chunks_and_handed_over_has_the_tokens_of_one_node(tmp_path: Path, backend: str) -> None:
    """A block moves as bytes, a quarter of float32's: the receiver goes on with the same numbers."""
    model = load_tiny(make_tiny_model(tmp_path / "m", seed=3))
    layout = model.layout(BLOCK_SIZE, "float8_e4m3fn")
    assert 4 * layout.block_bytes == model.layout(BLOCK_SIZE, "float32").block_bytes
    pools = [make_pool(model, 16, torch.float8_e4m3fn) for _ in range(3)]
    alone, prefill, decode = (Runner(model, pool, attention=backend) for pool in pools)

    def run(runner: Runner, blocks: list[int], num_outputs: int, chunk: int) -> Sequence:
        sequence = make_sequence(PROMPT, blocks)
        generate(runner, [sequence], num_outputs, chunk)
        return sequence

    expected = run(alone, list(range(8)), 10, 512).output_ids
    moved = run(prefill, [9, 4, 11, 2, 0, 7, 6, 5], 1, 13)
    to = [3, 8, 1, 0, 15, 12, 2, 6]
    for source, target in zip(moved.block_table, to, strict=True):
        for layer, copy in zip(pools[1], pools[2], strict=True):
            copy[target].view(torch.uint8).copy_(layer[source].view(torch.uint8))
    moved.block_table = to
    generate(decode, [moved], 10)
    assert moved.output_ids == expected
