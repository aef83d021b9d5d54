"""Attention over latents (MLA) in Triton: one KV head for all, which is its own values."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from flowkv_engine.engine.gpu.e4m3 import widened
from flowkv_engine.engine.gpu.kernels import first_seen, length_of_split

# Latents are wide, 512 and 64 numbers: few heads and tokens at a time fit into registers and shared memory.
NUM_ROWS = 16  # heads of one query, the least that matrix units take
NUM_STAGES = 1


def tile_len(item_bytes: int) -> int:
    """Tokens at a time."""
    return 32 if item_bytes <= 2 else 16


@triton.jit(do_not_specialize=["stride_table"])
def attend_latents(
    pool,  # at its layer: a block holds [block_size, head_dim]
    query,  # [T, num_heads, head_dim]
    result,  # the same shape, contiguous: of a context of one split
    splits,  # [T, num_heads, num_splits, head_dim], fp32: what each split of the context gives
    log_sums,  # [T, num_heads, num_splits], fp32: log2 of its sum of exponentials
    tables,  # [N, stride_table], blocks of each item
    items,  # [T]: whose query it is
    context_lens,  # [T]: what it sees, up to itself
    scale,  # with log2(e) in it
    stride_table,
    stride_block,
    query_stride_token,
    query_stride_head,
    window: tl.constexpr,
    chunk: tl.constexpr,
    num_splits: tl.constexpr,
    min_split_len: tl.constexpr,
    num_heads: tl.constexpr,
    num_rows: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    main_dim: tl.constexpr,  # the largest power of 2 in `head_dim`
    tile_len: tl.constexpr,
    rest_dim: tl.constexpr,  # a power of 2 that the rest fits into
):
    """`num_rows` heads of one query against one split of what it sees. Grid (T, tiles of heads, num_splits).

    Products are in two parts: a power of 2 over the whole of 576 would be 1,024.
    """
    token, tile, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens + token)
    since = first_seen(context_len - 1, window, chunk)
    length = length_of_split(context_len - since, num_splits, min_split_len)
    begin = since + split * length
    if begin >= context_len:
        return
    end = tl.minimum(begin + length, context_len)

    heads = tile * num_rows + tl.arange(0, num_rows)
    is_head = (heads < num_heads)[:, None]
    main = tl.arange(0, main_dim)[None, :]
    rest = main_dim + tl.arange(0, rest_dim)[None, :]
    is_rest = rest < head_dim
    at = query + token * query_stride_token + heads[:, None] * query_stride_head
    main_query = tl.load(at + main, mask=is_head, other=0.0)
    rest_query = tl.load(at + rest, mask=is_head & is_rest, other=0.0)
    table = tables + tl.load(items + token).to(tl.int64) * stride_table
    row_max = tl.full([num_rows], -float("inf"), tl.float32)
    sums = tl.zeros([num_rows], tl.float32)
    main_out = tl.zeros([num_rows, main_dim], tl.float32)
    rest_out = tl.zeros([num_rows, rest_dim], tl.float32)
    for first in range(begin, end, tile_len):
        positions = first + tl.arange(0, tile_len)
        is_here = positions < end
        blocks = tl.load(table + positions // block_size, mask=is_here, other=0).to(tl.int64)
        row = pool + (blocks * stride_block + (positions % block_size) * head_dim)[:, None]
        main_key = widened(tl.load(row + main, mask=is_here[:, None], other=0), query.dtype.element_ty)
        is_number = is_here[:, None] & is_rest
        rest_key = widened(tl.load(row + rest, mask=is_number, other=0), query.dtype.element_ty)
        scores = tl.dot(main_query, tl.trans(main_key), input_precision="ieee")
        scores += tl.dot(rest_query, tl.trans(rest_key), input_precision="ieee")
        scores = tl.where(is_here[None, :], scores * scale, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        sums = sums * rescale + tl.sum(weights, 1)
        weights = weights.to(query.dtype.element_ty)
        main_out = main_out * rescale[:, None] + tl.dot(weights, main_key, input_precision="ieee")
        rest_out = rest_out * rescale[:, None] + tl.dot(weights, rest_key, input_precision="ieee")
        row_max = new_max
    main_out = main_out / sums[:, None]
    rest_out = rest_out / sums[:, None]
    if length >= context_len - since:
        to = result + (token * num_heads + heads[:, None]) * head_dim
        tl.store(to + main, main_out.to(result.dtype.element_ty), mask=is_head)
        tl.store(to + rest, rest_out.to(result.dtype.element_ty), mask=is_head & is_rest)
    else:
        place = (token * num_heads + heads) * num_splits + split
        tl.store(splits + place[:, None] * head_dim + main, main_out, mask=is_head)
        tl.store(splits + place[:, None] * head_dim + rest, rest_out, mask=is_head & is_rest)
        tl.store(log_sums + place, row_max + tl.log2(sums), mask=heads < num_heads)
