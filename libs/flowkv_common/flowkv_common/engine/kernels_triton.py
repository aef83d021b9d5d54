"""Attention over the block-major pool in Triton: the softmax over a run of keys, and prompts with a prefix.

The pool is `[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]`. A kernel gets it already at its
layer, so token `n` of a sequence lies at `table[n // block_size] * stride_block + side * stride_side +
n % block_size * stride_token + head * stride_head`. No kernel needs blocks that follow each other.

Sums are in fp32. Nothing is compiled anew for another width of the block tables. The interpreter of Triton
(`TRITON_INTERPRET=1`) runs all of this on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend(
    peaks,  # [rows], of the keys before: the greatest scores, as exponents of 2
    sums,  # [rows]: sums of exponentials
    out,  # [rows, padded_dim]: what they give, not yet divided by `sums`; all three fp32
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
    is_masked: tl.constexpr,
):
    """The online softmax goes on over the keys from `begin` to `end`, `tile_len` at a time.

    Without a mask all rows see all of these keys, which are whole tiles. Returns `peaks`, `sums` and `out`.
    """
    dims = tl.arange(0, padded_dim)
    for first in range(begin, end, tile_len):
        positions = first + tl.arange(0, tile_len)
        is_here = positions < end
        if is_masked:
            blocks = tl.load(table + positions // block_size, mask=is_here, other=0).to(tl.int64)
        else:
            blocks = tl.load(table + positions // block_size).to(tl.int64)
        at = pool + blocks * stride_block + (positions % block_size) * stride_token + head * stride_head
        at = at[:, None] + dims[None, :]
        if is_masked or head_dim < padded_dim:
            mask = is_here[:, None] & (dims < head_dim)[None, :]
            keys = tl.load(at, mask=mask, other=0.0)
            values = tl.load(at + stride_side, mask=mask, other=0.0)
        else:
            keys = tl.load(at)
            values = tl.load(at + stride_side)
        scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee") * scale
        if is_masked:
            sees = is_here[None, :] & (positions[None, :] <= last_seen[:, None])
            scores = tl.where(sees, scores, -float("inf"))  # [rows, tile_len]
        new_peaks = tl.maximum(peaks, tl.max(scores, 1))
        # A row that has seen nothing yet has a peak of -inf: what it is scaled by must not be NaN.
        pivots = tl.where(new_peaks == -float("inf"), 0.0, new_peaks)
        weights = tl.exp2(scores - pivots[:, None])
        fade = tl.exp2(peaks - pivots)
        sums = sums * fade + tl.sum(weights, 1)
        values = values.to(queries.dtype)
        out = out * fade[:, None] + tl.dot(weights.to(queries.dtype), values, input_precision="ieee")
        peaks = new_peaks
    return peaks, sums, out


@triton.jit
def attend_all(
    queries,
    last_seen,
    pool,
    table,
    begin,
    seen_by_all,  # the first position that not all rows see
    end,
    head,
    scale,
    stride_block,
    stride_side,
    stride_token,
    stride_head,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_len: tl.constexpr,
):
    """The keys from `begin` to `end`: whole tiles that all rows see without a mask, the others with one.

    Returns the rows' peaks, sums and what they give, as `_attend` does.
    """
    peaks = tl.full([queries.shape[0]], -float("inf"), tl.float32)
    sums = tl.zeros([queries.shape[0]], tl.float32)
    out = tl.zeros([queries.shape[0], padded_dim], tl.float32)
    edge = begin + tl.maximum(seen_by_all - begin, 0) // tile_len * tile_len
    for is_masked in tl.static_range(2):
        peaks, sums, out = _attend(
            peaks,
            sums,
            out,
            queries,
            last_seen,
            pool,
            table,
            edge if is_masked else begin,
            end if is_masked else edge,
            head,
            scale,
            stride_block,
            stride_side,
            stride_token,
            stride_head,
            block_size,
            head_dim,
            padded_dim,
            tile_len,
            is_masked,
        )
    return peaks, sums, out


@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["tile_items", "tile_firsts"])
def attend_prompts(
    pool,
    query,  # [T, num_heads, head_dim]
    result,  # the same shape, contiguous
    tables,  # [N, stride_table], blocks of each item
    context_lens,  # [N]
    query_starts,  # [N + 1]
    tile_items,  # [tiles]: which item a tile of queries is of; -1: none
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
    if item < 0:
        return
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
    _, sums, out = attend_all(
        queries,
        last_seen,
        pool,
        tables + item * stride_table,
        0,
        num_before + tl.load(tile_firsts + tile) + 1,
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
