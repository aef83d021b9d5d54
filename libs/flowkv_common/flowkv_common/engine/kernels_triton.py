"""Attention over the block-major pool in Triton: prompts with a prefix, and decode with its context split.

The pool is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`. A kernel gets it already at its
layer, so token `n` of a sequence lies at `table[n // block_size] * stride_block + side * stride_side +
n % block_size * stride_token + head * stride_head`. No kernel needs blocks that follow each other.

Sums are in fp32 and, for one sequence, always in one order: the context is cut into the same parts whatever
the batch is. Nothing is compiled anew for another width of the block tables. The interpreter of Triton
(`TRITON_INTERPRET=1`) runs all of this on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit
def _attend(
    queries,  # [rows, padded_dim]
    last_seen,  # [rows]: the last position that each row may attend to
    pool,
    table,
    begin,  # position of the first key
    end,  # no key at or behind this position
    head,
    scale,  # with log2(e) in it
    stride_block,
    stride_side,
    stride_token,
    stride_head,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_len: tl.constexpr,
):
    """The online softmax over the keys from `begin` to `end`, `tile_len` at a time.

    Returns the rows' greatest scores, as exponents of 2, their sums of exponentials and what they give, not
    yet divided by these: [rows], [rows], [rows, padded_dim], all fp32.
    """
    peaks = tl.full([queries.shape[0]], -float("inf"), tl.float32)
    sums = tl.zeros([queries.shape[0]], tl.float32)
    out = tl.zeros([queries.shape[0], padded_dim], tl.float32)
    dims = tl.arange(0, padded_dim)
    for first in range(begin, end, tile_len):
        positions = first + tl.arange(0, tile_len)
        is_here = positions < end
        mask = is_here[:, None] & (dims < head_dim)[None, :]
        blocks = tl.load(table + positions // block_size, mask=is_here, other=0).to(tl.int64)
        at = pool + blocks * stride_block + (positions % block_size) * stride_token + head * stride_head
        keys = tl.load(at[:, None] + dims[None, :], mask=mask, other=0.0).to(queries.dtype)
        values = tl.load(at[:, None] + stride_side + dims[None, :], mask=mask, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale  # [rows, tile_len]
        sees = is_here[None, :] & (positions[None, :] <= last_seen[:, None])
        scores = tl.where(sees, scores, -float("inf"))
        new_peaks = tl.maximum(peaks, tl.max(scores, 1))
        # A row that has seen nothing yet has a peak of -inf: what it is scaled by must not be NaN.
        pivots = tl.where(new_peaks == -float("inf"), 0.0, new_peaks)
        weights = tl.exp2(scores - pivots[:, None])
        fade = tl.exp2(peaks - pivots)
        sums = sums * fade + tl.sum(weights, 1)
        out = out * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peaks = new_peaks
    return peaks, sums, out


@triton.jit(do_not_specialize=["stride_table"])
def attend_prompts(
    pool,
    query,  # [T, num_heads, head_dim]
    result,  # the same shape, contiguous
    tables,  # [N, stride_table], blocks of each item
    context_lens,  # [N]
    query_starts,  # [N + 1]
    tile_items,  # [tiles]: which item a tile of queries is of
    tile_firsts,  # [tiles]: its first query, counted from the item's first
    scale,
    stride_table,
    query_stride_token,
    query_stride_head,
    result_stride_token,
    result_stride_head,
    stride_block,
    stride_side,
    stride_token,
    stride_head,
    group_size: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    num_rows: tl.constexpr,
    tile_len: tl.constexpr,
):
    """`num_rows` queries of one item and head against all that they may see. Grid (tiles, num_heads)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    item = tl.load(tile_items + tile).to(tl.int64)
    start = tl.load(query_starts + item)
    num_queries = tl.load(query_starts + item + 1) - start
    num_before = tl.load(context_lens + item) - num_queries
    rows = tl.load(tile_firsts + tile) + tl.arange(0, num_rows)
    dims = tl.arange(0, padded_dim)
    mask = (rows < num_queries)[:, None] & (dims < head_dim)[None, :]
    tokens = (start + rows).to(tl.int64)
    at = query + tokens[:, None] * query_stride_token + head * query_stride_head + dims[None, :]
    queries = tl.load(at, mask=mask, other=0.0)
    last_seen = num_before + rows
    end = tl.minimum(num_before + num_queries, tl.max(last_seen, 0) + 1)
    _, sums, out = _attend(
        queries,
        last_seen,
        pool,
        tables + item * stride_table,
        0,
        end,
        head // group_size,
        scale,
        stride_block,
        stride_side,
        stride_token,
        stride_head,
        block_size,
        head_dim,
        padded_dim,
        tile_len,
    )
    out = out / sums[:, None]
    to = result + tokens[:, None] * result_stride_token + head * result_stride_head + dims[None, :]
    tl.store(to, out.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_table"])
def attend_part(
    pool,
    query,  # [T, num_heads, head_dim]
    parts,  # [N, num_heads, num_parts, head_dim], fp32: what each part of the context gives
    log_sums,  # [N, num_heads, num_parts], fp32: log2 of its sum of exponentials, -inf for an empty part
    rows,  # [N]: each item's row of `query`
    tables,  # [N, stride_table]
    context_lens,  # [N]; 0: no item, an empty place of the batch
    scale,
    stride_table,
    query_stride_token,
    query_stride_head,
    stride_block,
    stride_side,
    stride_token,
    stride_head,
    num_parts: tl.constexpr,
    group_size: tl.constexpr,
    padded_group: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_len: tl.constexpr,
):
    """A sequence's queries of one KV head against one part of its context. Grid (N, num_kv_heads, num_parts).

    Parts are of equal length, whole tiles, and depend on the sequence's own length alone.
    """
    item, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) * group_size
    context_len = tl.load(context_lens + item)
    part_len = tl.cdiv(tl.cdiv(context_len, num_parts), tile_len) * tile_len
    begin = part * part_len
    end = tl.minimum(begin + part_len, context_len)

    members = tl.arange(0, padded_group)
    dims = tl.arange(0, padded_dim)
    is_member = members < group_size
    mask = is_member[:, None] & (dims < head_dim)[None, :]
    heads = kv_head * group_size + members
    row = tl.load(rows + item).to(tl.int64)
    at = query + row * query_stride_token + heads[:, None] * query_stride_head + dims[None, :]
    queries = tl.load(at, mask=mask, other=0.0)
    last_seen = tl.zeros([padded_group], tl.int32) + context_len
    peaks, sums, out = _attend(
        queries,
        last_seen,
        pool,
        tables + item * stride_table,
        begin,
        end,
        kv_head,
        scale,
        stride_block,
        stride_side,
        stride_token,
        stride_head,
        block_size,
        head_dim,
        padded_dim,
        tile_len,
    )
    place = (item * num_heads + heads) * num_parts + part
    is_empty = sums == 0.0
    out = tl.where(is_empty[:, None], 0.0, out / tl.where(is_empty, 1.0, sums)[:, None])
    log_sum = tl.where(is_empty, -float("inf"), peaks + tl.log2(tl.where(is_empty, 1.0, sums)))
    tl.store(parts + place[:, None] * head_dim + dims[None, :], out, mask=mask)
    tl.store(log_sums + place, log_sum, mask=is_member)


@triton.jit
def join_parts(
    parts,
    log_sums,
    result,  # [T, num_heads, head_dim]
    rows,  # [N]
    result_stride_token,
    result_stride_head,
    num_parts: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """The parts of a context, each weighed by its share of the softmax. Grid (N, num_heads)."""
    item, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + item).to(tl.int64)
    numbers = tl.arange(0, num_parts)
    dims = tl.arange(0, padded_dim)
    is_dim = dims < head_dim
    place = (item * tl.num_programs(1) + head) * num_parts + numbers
    log_sum = tl.load(log_sums + place)
    peak = tl.max(log_sum, 0)
    shares = tl.exp2(log_sum - tl.where(peak == -float("inf"), 0.0, peak))
    total = tl.sum(shares, 0)
    of_parts = tl.load(parts + place[:, None] * head_dim + dims[None, :], mask=is_dim[None, :], other=0.0)
    out = tl.sum(of_parts * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    to = result + row * result_stride_token + head * result_stride_head + dims
    tl.store(to, out.to(result.dtype.element_ty), mask=is_dim)
