"""Decode over the block-major pool in Triton: one query per sequence and head, its context in parts.

How the pool lies in memory is said in `kernels_triton.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowkv_common.engine.kernels_triton import attend_all


@triton.jit
def _part_len(context_len, num_parts: tl.constexpr, least_part_len: tl.constexpr, tile_len: tl.constexpr):
    """Parts are of equal length, whole tiles, and depend on the sequence's own length alone."""
    return tl.cdiv(tl.maximum(tl.cdiv(context_len, num_parts), least_part_len), tile_len) * tile_len


@triton.jit(do_not_specialize=["stride_table"])
def attend_part(
    pool,
    query,  # [T, num_heads, head_dim]
    result,  # the same shape, contiguous: of a context of one part
    parts,  # [N, num_heads, num_parts, head_dim], fp32: what each part of the context gives
    log_sums,  # [N, num_heads, num_parts], fp32: log2 of its sum of exponentials
    rows,  # [N]: each item's row of `query`
    tables,  # [N, stride_table]
    context_lens,  # [N]; 0: no item, an empty place of the batch
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
    num_parts: tl.constexpr,
    least_part_len: tl.constexpr,
    group_size: tl.constexpr,
    padded_group: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile_len: tl.constexpr,
):
    """A sequence's queries of one KV head against one part of its context. Grid (N, num_kv_heads, num_parts).

    A short context has fewer parts: of the others nothing is written.
    """
    item, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) * group_size
    context_len = tl.load(context_lens + item)
    part_len = _part_len(context_len, num_parts, least_part_len, tile_len)
    begin = part * part_len
    if begin >= context_len:
        return
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
    peaks, sums, out = attend_all(
        queries,
        last_seen,
        pool,
        tables + item * stride_table,
        begin,
        end,
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
    out = out / sums[:, None]
    if part_len >= context_len:
        to = result + row * result_stride_token + heads[:, None] * result_stride_head + dims[None, :]
        tl.store(to, out.to(result.dtype.element_ty), mask=mask)
    else:
        place = (item * num_heads + heads) * num_parts + part
        tl.store(parts + place[:, None] * head_dim + dims[None, :], out, mask=mask)
        tl.store(log_sums + place, peaks + tl.log2(sums), mask=is_member)


@triton.jit
def join_parts(
    parts,
    log_sums,
    result,  # [T, num_heads, head_dim]
    rows,  # [N]
    context_lens,  # [N]
    result_stride_token,
    result_stride_head,
    num_parts: tl.constexpr,
    least_part_len: tl.constexpr,
    tile_len: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """The parts of a context, if it has several, each weighed by its share of the softmax.

    Grid (N, num_heads).
    """
    item, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + item).to(tl.int64)
    numbers = tl.arange(0, num_parts)
    dims = tl.arange(0, padded_dim)
    is_dim = dims < head_dim
    place = (item * tl.num_programs(1) + head) * num_parts + numbers
    context_len = tl.load(context_lens + item)
    part_len = _part_len(context_len, num_parts, least_part_len, tile_len)
    if part_len >= context_len:
        return
    is_part = numbers * part_len < context_len
    log_sum = tl.load(log_sums + place, mask=is_part, other=-float("inf"))
    shares = tl.exp2(log_sum - tl.max(log_sum, 0))
    mask = is_part[:, None] & is_dim[None, :]
    of_parts = tl.load(parts + place[:, None] * head_dim + dims[None, :], mask=mask, other=0.0)
    out = tl.sum(of_parts * shares[:, None], 0) / tl.sum(shares, 0)
    to = result + row * result_stride_token + head * result_stride_head + dims
    tl.store(to, out.to(result.dtype.element_ty), mask=is_dim)
