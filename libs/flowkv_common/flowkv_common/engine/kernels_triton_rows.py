"""What a layer does between its matmuls, in Triton: a kernel for each pass over the rows instead of five.

Sums and products are in fp32, and rounded once, to the dtype of the rows. All rows are contiguous, but those
that `write_kv` gets.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_and_norm(
    hidden,  # [T, num_dims]
    delta,  # [T, num_dims], added to `hidden` in place
    weight,  # [num_dims]
    result,  # [T, num_dims]: the RMS norm of the sum
    eps,
    num_dims: tl.constexpr,
    padded_dims: tl.constexpr,
    adds: tl.constexpr,  # without: `hidden` is only read, `delta` is not used
):
    """Grid (T,)."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, padded_dims)
    is_dim = dims < num_dims
    at = row * num_dims + dims
    states = tl.load(hidden + at, mask=is_dim, other=0.0)
    if adds:
        states += tl.load(delta + at, mask=is_dim, other=0.0)
        tl.store(hidden + at, states, mask=is_dim)
    states = states.to(tl.float32)
    states *= tl.rsqrt(tl.sum(states * states, 0) / num_dims + eps)
    states *= tl.load(weight + dims, mask=is_dim, other=0.0).to(tl.float32)
    tl.store(result + at, states.to(result.dtype.element_ty), mask=is_dim)


@triton.jit
def gate(
    gate_up,  # [T, 2 * num_dims]
    result,  # [T, num_dims]: silu of the first half, times the second
    num_dims: tl.constexpr,
    tile_len: tl.constexpr,
):
    """Grid (T, num_dims / tile_len, rounded up)."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * tile_len + tl.arange(0, tile_len)
    is_dim = dims < num_dims
    at = gate_up + row * 2 * num_dims + dims
    gates = tl.load(at, mask=is_dim, other=0.0).to(tl.float32)
    ups = tl.load(at + num_dims, mask=is_dim, other=0.0).to(tl.float32)
    gated = gates * tl.sigmoid(gates) * ups
    tl.store(result + row * num_dims + dims, gated.to(result.dtype.element_ty), mask=is_dim)


@triton.jit
def rotate_and_write(
    qkv,  # [T, num_heads + 2 * num_kv_heads, head_dim]
    query,  # [T, num_heads, head_dim]: the turned queries
    pool,  # at the layer, see kernels_triton.py
    slots,  # [T], block * block_size + offset; below 0: written nowhere
    positions,  # [T]
    cos,  # [max positions, head_dim], as `sin`
    sin,
    norm,  # [num_heads + num_kv_heads, head_dim], of queries and keys, if `has_norm`
    eps,
    stride_block,
    stride_side,
    stride_token,
    stride_head,
    has_norm: tl.constexpr,
    group_size: tl.constexpr,
    padded_rows: tl.constexpr,  # a power of 2 over `group_size`
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_half: tl.constexpr,
):
    """One KV head of a token: its queries and key are turned by position, key and value stored.

    Grid (T, num_kv_heads).
    """
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    num_heads = num_kv_heads * group_size
    half: tl.constexpr = head_dim // 2
    members = tl.arange(0, padded_rows)  # the group's queries, then the key
    dims = tl.arange(0, padded_half)
    is_query, is_key = members < group_size, members == group_size
    is_dim = dims < half
    mask = (is_query | is_key)[:, None] & is_dim[None, :]
    heads = tl.where(is_query, kv_head * group_size + members, num_heads + kv_head)
    states = qkv + token * (num_heads + 2 * num_kv_heads) * head_dim
    at = heads[:, None] * head_dim + dims[None, :]
    first = tl.load(states + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(states + at + half, mask=mask, other=0.0).to(tl.float32)
    if has_norm:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        shrink = tl.rsqrt(squares / head_dim + eps)[:, None]
        first *= shrink * tl.load(norm + at, mask=mask, other=0.0).to(tl.float32)
        second *= shrink * tl.load(norm + at + half, mask=mask, other=0.0).to(tl.float32)
    turn = tl.load(positions + token) * head_dim + dims
    cos_first, cos_second, sin_first, sin_second = (
        tl.load(cos + turn, mask=is_dim, other=0.0).to(tl.float32)[None, :],
        tl.load(cos + turn + half, mask=is_dim, other=0.0).to(tl.float32)[None, :],
        tl.load(sin + turn, mask=is_dim, other=0.0).to(tl.float32)[None, :],
        tl.load(sin + turn + half, mask=is_dim, other=0.0).to(tl.float32)[None, :],
    )
    turned_first = first * cos_first - second * sin_first
    turned_second = second * cos_second + first * sin_second

    turned = query + token * num_heads * head_dim + at
    mask = is_query[:, None] & is_dim[None, :]
    tl.store(turned, turned_first.to(query.dtype.element_ty), mask=mask)
    tl.store(turned + half, turned_second.to(query.dtype.element_ty), mask=mask)

    slot = tl.load(slots + token)
    if slot >= 0:
        to = pool + (slot // block_size) * stride_block + (slot % block_size) * stride_token
        to += kv_head * stride_head
        keys = to + tl.broadcast_to(dims[None, :], (padded_rows, padded_half))
        mask = is_key[:, None] & is_dim[None, :]
        tl.store(keys, turned_first.to(pool.dtype.element_ty), mask=mask)
        tl.store(keys + half, turned_second.to(pool.dtype.element_ty), mask=mask)
        value = states + (num_heads + num_kv_heads + kv_head) * head_dim + dims
        value_first = tl.load(value, mask=is_dim)
        value_second = tl.load(value + half, mask=is_dim)
        tl.store(to + stride_side + dims, value_first.to(pool.dtype.element_ty), mask=is_dim)
        tl.store(to + stride_side + half + dims, value_second.to(pool.dtype.element_ty), mask=is_dim)


@triton.jit
def write_kv(
    pool,
    key,  # [T, num_kv_heads, head_dim] of the pool's dtype, the last dimension contiguous, as `value`
    value,
    slots,  # [T], block * block_size + offset; below 0: written nowhere
    stride_block,
    stride_side,
    stride_token,
    stride_head,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """Stores the keys and values of one token and head. Grid (T, num_kv_heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot >= 0:
        dims = tl.arange(0, padded_dim)
        is_dim = dims < head_dim
        at = (
            pool
            + (slot // block_size) * stride_block
            + (slot % block_size) * stride_token
            + head * stride_head
        )
        k = tl.load(key + token * key_stride_token + head * key_stride_head + dims, mask=is_dim)
        v = tl.load(value + token * value_stride_token + head * value_stride_head + dims, mask=is_dim)
        tl.store(at + dims, k, mask=is_dim)
        tl.store(at + stride_side + dims, v, mask=is_dim)
