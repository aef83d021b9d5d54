from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import rms_norm, silu

from flowkv_common.engine.kernels_cpu import rotate_and_write
from flowkv_common.engine.kernels_linear import gate, gated_linear, linear
from flowkv_common.engine.kernels_linear import rms_norm as few_rms_norm

K = 48
NUM_ROWS = (1, 2, 3, 4, 6, 9)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def torch_of(array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("num_cols", [1, 5, 96, 101])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("adds", [False, True])
def test_linear_equals_torch(num_rows: int, num_cols: int, adds: bool) -> None:
    x, w, bias, out = random(num_rows, K), random(num_cols, K), random(num_cols), random(num_rows, num_cols)
    expected = torch.nn.functional.linear(torch_of(x), torch_of(w), torch_of(bias))
    expected = expected + torch_of(out) if adds else expected
    linear(x, w, bias, out, adds)
    torch.testing.assert_close(torch_of(out), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_a_row_has_the_same_bits_alone_and_in_company(num_rows: int) -> None:
    x, w = random(num_rows, K), random(77, K)
    nothing = np.empty(0, np.float32)
    out = np.empty((num_rows, 77), np.float32)
    linear(x, w, nothing, out, False)
    for row in range(num_rows):
        alone = np.empty((1, 77), np.float32)
        linear(x[row : row + 1], w, nothing, alone, False)
        assert np.array_equal(alone[0], out[row])


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_gated_linear_equals_torch(num_rows: int) -> None:
    """Gates from far below to far above zero: neither side may overflow."""
    x, w, bias = random(num_rows, K, scale=5), random(2 * 112, K, seed=1), random(2 * 112, seed=2)
    scratch, out = np.empty((num_rows, 224), np.float32), np.empty((num_rows, 112), np.float32)
    both = torch.nn.functional.linear(torch_of(x), torch_of(w), torch_of(bias))
    expected = silu(both[:, :112]) * both[:, 112:]
    gated_linear(x, w, bias, scratch, out)
    torch.testing.assert_close(torch_of(out), expected, atol=1e-3, rtol=1e-5)
    inplace = both.numpy().copy()
    gate(inplace)
    torch.testing.assert_close(torch_of(inplace[:, :112]), expected, atol=1e-6, rtol=1e-5)


def test_silu_at_the_ends() -> None:
    gates = np.array([-1e30, -200, -88, -1e-30, 0, 1e-30, 88, 1e30] * 2, np.float32)
    both = np.concatenate([gates, np.ones(16, np.float32)])[None]
    gate(both)
    torch.testing.assert_close(torch_of(both[0, :16]), silu(torch_of(gates)), atol=1e-30, rtol=1e-6)


def test_nan_comes_out_as_nan() -> None:
    both = np.ones((1, 32), np.float32)
    both[0, 3] = np.nan
    gate(both)
    assert np.isnan(both[0, :16]).nonzero()[0].tolist() == [3]


def test_rms_norm_equals_torch() -> None:
    x, weight = random(5, K), random(K)
    out = np.empty_like(x)
    few_rms_norm(x, weight, np.float32(1e-5), out)
    expected = rms_norm(torch_of(x), (K,), torch_of(weight), 1e-5)
    torch.testing.assert_close(torch_of(out), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotates_and_writes_as_torch_does(dtype: torch.dtype, has_norm: bool) -> None:
    heads, kv_heads, dim, num_rows = 4, 2, 16, 3
    pool = torch.zeros(4, 2, 2, 8, kv_heads, dim, dtype=dtype)
    slots, positions = np.array([9, 3, 30]), np.array([5, 0, 7])
    states, norm = random(num_rows, heads + 2 * kv_heads, dim), random(heads + kv_heads, dim, seed=1)
    cos, sin = random(10, dim, seed=2), random(10, dim, seed=3)
    query = np.empty((num_rows, heads, dim), np.float32)

    turned, value = torch_of(states)[:, : heads + kv_heads], torch_of(states)[:, heads + kv_heads :]
    if has_norm:
        turned = rms_norm(turned, (dim,), eps=1e-6) * torch_of(norm)
    halves = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), dim=-1)
    turned = turned * torch_of(cos)[positions, None] + halves * torch_of(sin)[positions, None]

    array = pool.view(torch.uint16).numpy() if dtype == torch.bfloat16 else pool.numpy()
    norms = norm if has_norm else norm[:0]
    rotate_and_write(
        array, 1, slots, states, positions, cos, sin, norms, np.float32(1e-6), np.float32(0.5), query
    )
    torch.testing.assert_close(torch_of(query), turned[:, :heads] * 0.5, atol=1e-6, rtol=1e-5)
    stored = pool[slots // 8, 1, :, slots % 8]  # [T, 2, kv heads, dim]
    tolerance = {"atol": 1e-6, "rtol": 1e-5 if dtype == torch.float32 else 2**-8}
    torch.testing.assert_close(stored[:, 0], turned[:, heads:].to(dtype), **tolerance)
    torch.testing.assert_close(stored[:, 1], value.to(dtype), atol=0, rtol=0)
    assert pool.count_nonzero() == stored.count_nonzero()
