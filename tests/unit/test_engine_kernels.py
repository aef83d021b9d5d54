from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import rms_norm, silu
from transformers.activations import ACT2FN

from flowkv_engine.engine.cpu.attention import _numbers_of, rotate_and_write
from flowkv_engine.engine.cpu.experts import route, sort_by_expert
from flowkv_engine.engine.cpu.linear import gated_linear, linear, pack
from flowkv_engine.engine.cpu.linear import rms_norm as compiled_rms_norm
from flowkv_engine.engine.cpu.simd import LANES, TILE_PANELS, gate_row, softmax_row
from flowkv_engine.engine.experts import Activation, Router
from flowkv_engine.engine.flat import ACTIVATIONS, SILU

K = 48
NUM_ROWS = (0, 1, 2, 3, 4, 7, 8, 21, 70, 271, 530)
NOTHING = np.empty(0, np.float32)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def torch_of(array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(array.copy())


def float32s(activation: Activation) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, activation))


@numba.njit
def gate(gates, ups, activation):  # type: ignore[no-untyped-def]
    gate_row(gates, ups, gates.shape[0] // LANES, activation)


@numba.njit
def softmax(row, least_max):  # type: ignore[no-untyped-def]
    return softmax_row(row, row.shape[0] // LANES, least_max)


def test_softmax_finds_the_maximum_wherever_it_is() -> None:
    for num_vectors in range(1, 10):
        scores = random(num_vectors * LANES)
        for place in range(len(scores)):
            row = scores.copy()
            row[place] = 5.0
            expected = np.exp(row - np.float32(5))
            maximum, total = softmax(row, np.float32(-1e30))
            assert maximum == 5.0
            np.testing.assert_allclose(row, expected, rtol=5e-7, atol=0)
            assert total == pytest.approx(expected.sum(), rel=1e-6)


def test_softmax_keeps_a_higher_maximum_and_hides_what_is_far_below() -> None:
    row = random(3 * LANES)
    row[7] = -1e30
    expected = np.exp(row - np.float32(9))
    maximum, total = softmax(row, np.float32(9))
    assert (maximum, row[7]) == (9.0, 0.0)
    assert total == pytest.approx(expected.sum(), rel=1e-6)


def test_exp_is_near_over_its_whole_range_and_0_below() -> None:
    far = np.linspace(-100, 0, 1 << 16, dtype=np.float32)
    row = far.copy()
    softmax(row, np.float32(0))
    is_normal = far > -87.3
    np.testing.assert_allclose(row[is_normal], np.exp(far[is_normal].astype(np.float64)), rtol=4e-7, atol=0)
    assert not row[far < -88.1].any()
    assert row[-1] == 1


def test_softmax_of_nan_is_nan_there() -> None:
    for place in range(5 * LANES):
        row = random(5 * LANES)
        row[place] = np.nan
        maximum, total = softmax(row, np.float32(-1e30))
        assert np.isnan(row).nonzero()[0].tolist() == [place]
        assert np.isfinite(maximum)
        assert np.isnan(total)


def test_a_panel_holds_columns_side_by_side() -> None:
    first, second = random(LANES, K), random(5, K, seed=1)
    panels = pack(first, second)
    assert panels.shape == (2, K, LANES)
    assert np.array_equal(panels[0].T, first)
    assert np.array_equal(panels[1].T[:5], second)
    assert not panels[1].T[5:].any()


@pytest.mark.parametrize("num_panels", [1, TILE_PANELS, 2 * TILE_PANELS + 2])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("adds", [False, True])
def test_linear_equals_torch(num_rows: int, num_panels: int, adds: bool) -> None:
    num_cols = num_panels * LANES
    x, w, bias, out = random(num_rows, K), random(num_cols, K), random(num_cols), random(num_rows, num_cols)
    expected = torch.nn.functional.linear(torch_of(x), torch_of(w), torch_of(bias))
    expected = expected + torch_of(out) if adds else expected
    linear(x, pack(w), bias, out, adds)
    torch.testing.assert_close(torch_of(out), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_a_row_has_the_same_bits_alone_and_in_company(num_rows: int) -> None:
    num_cols = 5 * LANES
    x, panels, weight = random(num_rows, K), pack(random(num_cols, K)), random(K)
    normed, out = np.empty_like(x), np.empty((num_rows, num_cols), np.float32)
    compiled_rms_norm(x, weight, np.float32(1e-5), normed, False)
    linear(normed, panels, NOTHING, out, False)
    for row in range(num_rows):
        normed_alone, alone = np.empty((1, K), np.float32), np.empty((1, num_cols), np.float32)
        compiled_rms_norm(x[row : row + 1], weight, np.float32(1e-5), normed_alone, False)
        linear(normed_alone, panels, NOTHING, alone, False)
        assert np.array_equal(alone[0], out[row])


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_gated_linear_equals_torch(num_rows: int) -> None:
    """Gates from far below to far above zero: neither side may overflow."""
    num_cols = 7 * LANES
    x = random(num_rows, K, scale=5)
    (gates, gate_bias), (ups, up_bias) = ((random(num_cols, K, seed=n), random(num_cols)) for n in (1, 2))
    scratch, out = np.empty((num_rows, num_cols), np.float32), np.empty((num_rows, num_cols), np.float32)
    gate, up = (
        torch.nn.functional.linear(torch_of(x), torch_of(w), torch_of(bias))
        for w, bias in ((gates, gate_bias), (ups, up_bias))
    )
    gated_linear(x, pack(gates), gate_bias, pack(ups), up_bias, float32s(SILU), scratch, out)
    torch.testing.assert_close(torch_of(out), silu(gate) * up, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers_from_end_to_end(name: str) -> None:
    """Neither side overflows, and what is near 0 keeps its digits."""
    ends = [-1e30, -200, -88, -1e-30, 0, 1e-30, 88, 1e30]
    gates = np.array([*ends, *np.linspace(-9, 9, 4 * LANES - len(ends))], np.float32)
    ups, got = random(len(gates)), gates.copy()
    gate(got, ups, float32s(ACTIVATIONS[name]))
    expected = ACT2FN[name](torch_of(gates)) * torch_of(ups)
    # Where gelu is almost 0, torch subtracts two numbers of about 1.
    torch.testing.assert_close(torch_of(got), expected, atol=2e-6 if "gelu" in name else 1e-30, rtol=2e-6)
    of_tensors = ACTIVATIONS[name](torch_of(gates), torch_of(ups))
    torch.testing.assert_close(torch_of(got), of_tensors, atol=1e-30, rtol=1e-5)


def test_nan_comes_out_as_nan() -> None:
    gates = np.ones(16, np.float32)
    gates[3] = np.nan
    gate(gates, np.ones(16, np.float32), float32s(SILU))
    assert np.isnan(gates).nonzero()[0].tolist() == [3]


@pytest.mark.parametrize("num_rows", [5, 40])
def test_rms_norm_equals_torch(num_rows: int) -> None:
    x, weight, out = random(num_rows, K), random(K), random(num_rows, K, seed=1)
    expected = rms_norm(torch_of(x), (K,), torch_of(weight), 1e-5)
    for adds in (True, False):
        wanted = torch_of(out) + expected if adds else expected
        compiled_rms_norm(x, weight, np.float32(1e-5), out, adds)
        torch.testing.assert_close(torch_of(out), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("is_sigmoid", [False, True])
@pytest.mark.parametrize(("num_groups", "num_kept_groups"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("num_rows", [3, 40])
def test_routes_as_torch_does(num_rows: int, is_sigmoid: bool, num_groups: int, num_kept_groups: int) -> None:
    num_experts, top_k = 12, 3
    correction = random(num_experts, seed=1) if is_sigmoid else NOTHING
    router = Router(
        weight=torch.eye(num_experts),  # states are the logits
        bias=None,
        top_k=top_k,
        is_sigmoid=is_sigmoid,
        correction=torch_of(correction) if is_sigmoid else None,
        num_groups=num_groups,
        num_kept_groups=num_kept_groups,
        normalizes=is_sigmoid,
        scale=1.5,
    )
    logits = random(num_rows, LANES * 2)
    expected = router(torch_of(logits)[:, :num_experts])
    ids, weights = np.empty((num_rows, top_k), np.int64), np.empty((num_rows, top_k), np.float32)
    groups = num_groups, num_kept_groups
    route(logits, num_experts, is_sigmoid, correction, *groups, is_sigmoid, 1.5, ids, weights)
    assert ids.tolist() == expected[0].tolist()
    torch.testing.assert_close(torch_of(weights), expected[1], atol=1e-6, rtol=1e-6)


def test_sorted_by_expert_each_pair_of_row_and_expert_has_a_place() -> None:
    """Blocks cover the places of their experts, also of one with many rows and of one with none."""
    ids = np.stack([np.arange(600) % 2, np.full(600, 3)], axis=1)
    rows, places, blocks = sort_by_expert(ids, 5)
    assert sorted(places.flat) == list(range(1200))
    assert np.array_equal(rows[places], np.repeat(np.arange(600), 2).reshape(600, 2))
    of_places = np.empty(1200, np.int64)
    of_places[places] = ids
    covered: list[int] = []
    for expert, first, last in blocks.tolist():
        assert set(of_places[first:last]) == {expert}
        covered += range(first, last)
    assert covered == list(range(1200))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float8_e4m3fn, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("pairs", [8, 5, 0])
def test_rotates_and_writes_as_torch_does(
    dtype: torch.dtype, has_norm: bool, is_interleaved: bool, pairs: int
) -> None:
    heads, kv_heads, dim, num_rows = 4, 2, 16, 3
    pool = torch.zeros(4, 2, 2, 8, kv_heads, dim, dtype=dtype)
    slots, positions = np.array([9, 3, 30]), np.array([5, 0, 7])
    states, norm = random(num_rows, heads + 2 * kv_heads, dim), random(heads + kv_heads, dim, seed=1)
    cos, sin = random(10, pairs, seed=2), random(10, pairs, seed=3)
    query = np.empty((num_rows, heads, dim), np.float32)

    rotated, value = torch_of(states)[:, : heads + kv_heads], torch_of(states)[:, heads + kv_heads :]
    if has_norm:
        rotated = rms_norm(rotated, (dim,), eps=1e-6) * torch_of(norm)
    rotated = rotated.clone()
    for pair in range(pairs):  # a complex number each
        first, second = (2 * pair, 2 * pair + 1) if is_interleaved else (pair, pair + pairs)
        number = torch.complex(rotated[..., first], rotated[..., second])
        number = number * torch.complex(torch_of(cos), torch_of(sin))[positions, pair, None]
        rotated[..., first], rotated[..., second] = number.real, number.imag

    layer = _numbers_of(pool[:, 1])
    norms, rotary = norm if has_norm else norm[:0], (cos, sin, is_interleaved)
    rotate_and_write(*layer, slots, states, positions, rotary, norms, False, np.float32(1e-6), query)
    torch.testing.assert_close(torch_of(query), rotated[:, :heads], atol=1e-6, rtol=1e-5)
    stored = pool[slots // 8, 1, :, slots % 8]  # [T, 2, kv heads, dim]
    off = max(1e-5, torch.finfo(dtype).eps)
    keys = rotated[:, heads:].to(dtype).float()
    torch.testing.assert_close(stored[:, 0].float(), keys, atol=max(1e-6, off / 64), rtol=off)
    assert torch.equal(stored[:, 1], value.to(dtype))
    assert pool.float().count_nonzero() == stored.float().count_nonzero()
