"""The Triton kernels of the GPU path: attention over the pool, and what lies between two matmuls of a layer.

A kernel gets the pool at its layer, of which a block holds `[2, block_size, num_kv_heads, head_dim]`: the key
of token `n` of a sequence lies in block `table[n // block_size]`, blocks lie `stride_block` apart, and the
value lies a side of a block behind its key. No kernel needs blocks that follow each other. A pool of e4m3 is
given as its codes (`e4m3.py`).

Sums are in fp32. Nothing is compiled anew for another width of the block tables. The interpreter of Triton
(`TRITON_INTERPRET=1`) runs all of this on the CPU.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from flowkv_engine.engine.gpu.e4m3 import narrowed, widened

TILE_LEN = tl.constexpr(64)  # keys per step of the online softmax
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def first_seen(position, window: tl.constexpr, chunk: tl.constexpr):
    """As `Span.first_seen`."""
    if chunk:
        return position - position % chunk
    elif window:
        return tl.maximum(position - window + 1, 0)
    else:
        return position * 0


@triton.jit
def _attend(
    queries,  # [rows, padded_dim]
    positions_of_rows,  # [rows]: the last position that each row may attend to
    row_max,  # [rows]: of the sinks, as exponents of 2, -inf without
    pool,
    table,
    begin,  # position of the first key
    seen_by_all,  # the first position that not all rows see
    end,  # no key at or behind this position
    kv_head,
    scale,  # with log2(e) in it
    softcap,  # with log2(e) in it
    stride_block,
    window: tl.constexpr,
    chunk: tl.constexpr,
    has_softcap: tl.constexpr,
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """The online softmax over the keys from `begin` to `end`, `TILE_LEN` at a time.

    Whole tiles that all rows see go without a mask, the others with one. Returns the rows' maxima, as
    exponents of 2, their sums of exponentials, and the weighed values, not yet divided by the sums; all fp32.
    """
    sums = tl.where(row_max == -float("inf"), 0.0, 1.0)
    out = tl.zeros([queries.shape[0], padded_dim], tl.float32)
    dims = tl.arange(0, padded_dim)
    edge = begin + tl.maximum(seen_by_all - begin, 0) // TILE_LEN * TILE_LEN
    if window or chunk:  # short: all with a mask
        edge = begin
    for is_masked in tl.static_range(2):
        for first in range(edge if is_masked else begin, end if is_masked else edge, TILE_LEN):
            positions = first + tl.arange(0, TILE_LEN)
            is_here = positions < end
            if is_masked:
                blocks = tl.load(table + positions // block_size, mask=is_here, other=0).to(tl.int64)
            else:
                blocks = tl.load(table + positions // block_size).to(tl.int64)
            rows = (positions % block_size) * num_kv_heads + kv_head
            at = (pool + blocks * stride_block + rows * head_dim)[:, None] + dims[None, :]
            side: tl.constexpr = block_size * num_kv_heads * head_dim
            if is_masked or head_dim < padded_dim:
                mask = is_here[:, None] & (dims < head_dim)[None, :]
                keys = tl.load(at, mask=mask, other=0.0)
                values = tl.load(at + side, mask=mask, other=0.0)
            else:
                keys = tl.load(at)
                values = tl.load(at + side)
            scores = tl.dot(queries, tl.trans(widened(keys, queries.dtype)), input_precision="ieee") * scale
            if has_softcap:  # softcap * tanh(scores / softcap)
                scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / softcap)) + 1))
            if is_masked:
                sees = is_here[None, :] & (positions[None, :] <= positions_of_rows[:, None])
                if window or chunk:
                    since = first_seen(positions_of_rows, window, chunk)
                    sees = sees & (positions[None, :] >= since[:, None])
                scores = tl.where(sees, scores, -float("inf"))  # [rows, TILE_LEN]
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            # A row that has seen nothing yet has a maximum of -inf: its factor must not be NaN.
            pivots = tl.where(new_max == -float("inf"), 0.0, new_max)
            weights = tl.exp2(scores - pivots[:, None])
            rescale = tl.exp2(row_max - pivots)
            sums = sums * rescale + tl.sum(weights, 1)
            values = widened(values, queries.dtype)
            out = out * rescale[:, None] + tl.dot(weights.to(queries.dtype), values, input_precision="ieee")
            row_max = new_max
    return row_max, sums, out


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
    sinks,  # [num_heads], if it has some
    scale,
    softcap,
    stride_table,
    stride_block,
    query_stride_token,
    query_stride_head,
    window: tl.constexpr,
    chunk: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    group_size: tl.constexpr,
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    num_rows: tl.constexpr,
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
    first = num_before + tl.load(tile_firsts + tile)
    row_max = tl.full([num_rows], -float("inf"), tl.float32)
    if has_sinks:
        row_max = tl.zeros([num_rows], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
    _, sums, out = _attend(
        queries,
        num_before + tl.minimum(rows, num_queries - 1),  # every row sees something
        row_max,
        pool,
        tables + item * stride_table,
        first_seen(first, window, chunk) // TILE_LEN * TILE_LEN,  # tiles are the same in any chunks
        first + 1,
        tl.minimum(num_before + num_queries, first + num_rows),
        head // group_size,
        scale,
        softcap,
        stride_block,
        window,
        chunk,
        has_softcap,
        block_size,
        num_kv_heads,
        head_dim,
        padded_dim,
    )
    out = out / sums[:, None]
    to = result + (tokens[:, None] * num_kv_heads * group_size + head) * head_dim + dims[None, :]
    tl.store(to, out.to(result.dtype.element_ty), mask=mask)


@triton.jit
def length_of_split(num_seen, num_splits: tl.constexpr, min_split_len: tl.constexpr):
    """Splits are of equal length, whole tiles, and depend on what the sequence sees of itself alone."""
    return tl.cdiv(tl.maximum(tl.cdiv(num_seen, num_splits), min_split_len), TILE_LEN) * TILE_LEN


@triton.jit(do_not_specialize=["stride_table"])
def attend_splits(
    pool,
    query,  # [T, num_heads, head_dim]
    result,  # the same shape, contiguous: of a context of one split
    splits,  # [N, num_heads, num_splits, head_dim], fp32: what each split of the context gives
    log_sums,  # [N, num_heads, num_splits], fp32: log2 of its sum of exponentials
    query_starts,  # [N]: each item's row of `query`
    tables,  # [N, stride_table]
    context_lens,  # [N]; 0: no item, an empty place of the batch
    sinks,  # [num_heads], if it has some
    scale,
    softcap,
    stride_table,
    stride_block,
    query_stride_token,
    query_stride_head,
    window: tl.constexpr,
    chunk: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    num_splits: tl.constexpr,
    min_split_len: tl.constexpr,
    group_size: tl.constexpr,
    padded_group: tl.constexpr,
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """A sequence's queries of one KV head against one split of what they see of its context.

    Grid (N, num_kv_heads, num_splits). What is short has fewer splits: of the others nothing is written. The
    first one counts the sinks.
    """
    item, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens + item)
    since = first_seen(tl.maximum(context_len - 1, 0), window, chunk)
    split_len = length_of_split(context_len - since, num_splits, min_split_len)
    begin = since + split * split_len
    if begin >= context_len:
        return
    end = tl.minimum(begin + split_len, context_len)

    members = tl.arange(0, padded_group)
    dims = tl.arange(0, padded_dim)
    is_member = members < group_size
    mask = is_member[:, None] & (dims < head_dim)[None, :]
    heads = kv_head * group_size + members
    row = tl.load(query_starts + item).to(tl.int64)
    at = query + row * query_stride_token + heads[:, None] * query_stride_head + dims[None, :]
    queries = tl.load(at, mask=mask, other=0.0)
    row_max = tl.full([padded_group], -float("inf"), tl.float32)
    if has_sinks and split == 0:
        row_max = tl.load(sinks + heads, mask=is_member, other=-float("inf")).to(tl.float32) * LOG2_E
    row_max, sums, out = _attend(
        queries,
        tl.zeros([padded_group], tl.int32) + context_len - 1,
        row_max,
        pool,
        tables + item * stride_table,
        begin,
        end,
        end,
        kv_head,
        scale,
        softcap,
        stride_block,
        window,
        chunk,
        has_softcap,
        block_size,
        num_kv_heads,
        head_dim,
        padded_dim,
    )
    out = out / sums[:, None]
    num_heads: tl.constexpr = num_kv_heads * group_size
    if split_len >= context_len - since:
        to = result + (row * num_heads + heads[:, None]) * head_dim + dims[None, :]
        tl.store(to, out.to(result.dtype.element_ty), mask=mask)
    else:
        place = (item * num_heads + heads) * num_splits + split
        tl.store(splits + place[:, None] * head_dim + dims[None, :], out, mask=mask)
        tl.store(log_sums + place, row_max + tl.log2(sums), mask=is_member)


@triton.jit
def merge_splits(
    splits,  # as `attend_splits` writes them
    log_sums,
    result,  # [T, num_heads, head_dim], contiguous
    query_starts,  # [N]
    context_lens,  # [N]
    window: tl.constexpr,
    chunk: tl.constexpr,
    num_splits: tl.constexpr,
    min_split_len: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """The splits of a context, if it has several, each weighed by its share of the softmax.

    Grid (N, num_heads).
    """
    item, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads = tl.num_programs(1)
    row = tl.load(query_starts + item).to(tl.int64)
    numbers = tl.arange(0, num_splits)
    dims = tl.arange(0, padded_dim)
    is_dim = dims < head_dim
    place = (item * num_heads + head) * num_splits + numbers
    context_len = tl.load(context_lens + item)
    num_seen = context_len - first_seen(tl.maximum(context_len - 1, 0), window, chunk)
    split_len = length_of_split(num_seen, num_splits, min_split_len)
    if split_len >= num_seen:
        return
    is_split = numbers * split_len < num_seen
    log_sum = tl.load(log_sums + place, mask=is_split, other=-float("inf"))
    shares = tl.exp2(log_sum - tl.max(log_sum, 0))
    mask = is_split[:, None] & is_dim[None, :]
    of_splits = tl.load(splits + place[:, None] * head_dim + dims[None, :], mask=mask, other=0.0)
    out = tl.sum(of_splits * shares[:, None], 0) / tl.sum(shares, 0)
    to = result + (row * num_heads + head) * head_dim + dims
    tl.store(to, out.to(result.dtype.element_ty), mask=is_dim)


@triton.jit
def rotate_and_write(
    qkv,  # [T, num_heads + 2 * num_kv_heads, head_dim]
    query,  # [T, num_heads, head_dim]: the rotated queries
    pool,
    slots,  # [T], block * block_size + offset; below 0: written nowhere
    positions,  # [T]
    cos,  # [max positions, num_pairs], as `sin` (see `Rotary`)
    sin,
    norm,  # [num_heads + num_kv_heads, head_dim], of queries and keys, if `has_norm`
    eps,
    stride_block,
    has_norm: tl.constexpr,
    num_pairs: tl.constexpr,
    is_interleaved: tl.constexpr,
    group_size: tl.constexpr,
    padded_rows: tl.constexpr,  # a power of 2 over `group_size`
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
):
    """One KV head of a token: its queries and key are rotated by position, key and value stored.

    Grid (T, num_kv_heads).
    """
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_heads: tl.constexpr = num_kv_heads * group_size
    half: tl.constexpr = head_dim // 2
    members = tl.arange(0, padded_rows)  # the group's queries, then the key
    dims = tl.arange(0, padded_dim // 2)
    is_pair = dims < num_pairs
    # Where the first and second numbers of pairs are, then those of the halves of the rest.
    first_dims = tl.where(is_pair, dims * 2 if is_interleaved else dims, dims + num_pairs)
    second_dims = tl.where(is_pair, dims * 2 + 1 if is_interleaved else dims + num_pairs, dims + half)
    is_query, is_key = members < group_size, members == group_size
    is_dim = dims < half
    mask = (is_query | is_key)[:, None] & is_dim[None, :]
    heads = tl.where(is_query, kv_head * group_size + members, num_heads + kv_head)
    states = qkv + token * (num_heads + 2 * num_kv_heads) * head_dim
    at_first = heads[:, None] * head_dim + first_dims[None, :]
    at_second = heads[:, None] * head_dim + second_dims[None, :]
    first = tl.load(states + at_first, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(states + at_second, mask=mask, other=0.0).to(tl.float32)
    if has_norm:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        shrink = tl.rsqrt(squares / head_dim + eps)[:, None]
        first *= shrink * tl.load(norm + at_first, mask=mask, other=0.0).to(tl.float32)
        second *= shrink * tl.load(norm + at_second, mask=mask, other=0.0).to(tl.float32)
    angle = tl.load(positions + token) * num_pairs + dims
    cosine = tl.load(cos + angle, mask=is_pair, other=1.0).to(tl.float32)[None, :]
    sine = tl.load(sin + angle, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    rotated_first = first * cosine - second * sine
    rotated_second = second * cosine + first * sine

    rotated = query + token * num_heads * head_dim
    mask = is_query[:, None] & is_dim[None, :]
    tl.store(rotated + at_first, rotated_first.to(query.dtype.element_ty), mask=mask)
    tl.store(rotated + at_second, rotated_second.to(query.dtype.element_ty), mask=mask)

    slot = tl.load(slots + token)
    if slot >= 0:
        row = (slot % block_size) * num_kv_heads + kv_head
        to = pool + (slot // block_size) * stride_block + row * head_dim
        mask = is_key[:, None] & is_dim[None, :]
        shape: tl.constexpr = (padded_rows, padded_dim // 2)
        keys = to + tl.broadcast_to(first_dims[None, :], shape)
        tl.store(keys, narrowed(rotated_first, pool.dtype.element_ty), mask=mask)
        keys = to + tl.broadcast_to(second_dims[None, :], shape)
        tl.store(keys, narrowed(rotated_second, pool.dtype.element_ty), mask=mask)
        value = states + (num_heads + num_kv_heads + kv_head) * head_dim + dims
        value_first = tl.load(value, mask=is_dim)
        value_second = tl.load(value + half, mask=is_dim)
        values = to + block_size * num_kv_heads * head_dim + dims
        tl.store(values, narrowed(value_first, pool.dtype.element_ty), mask=is_dim)
        tl.store(values + half, narrowed(value_second, pool.dtype.element_ty), mask=is_dim)


@triton.jit
def write_kv(
    pool,
    key,  # [T, num_kv_heads, head_dim] of the pool's dtype, the last dimension contiguous, as `value`
    value,
    slots,  # [T], block * block_size + offset; below 0: written nowhere
    stride_block,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    block_size: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    has_values: tl.constexpr,
):
    """Stores the keys and values of one token and head. Grid (T, num_kv_heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    if slot >= 0:
        dims = tl.arange(0, padded_dim)
        is_dim = dims < head_dim
        row = (slot % block_size) * num_kv_heads + head
        at = pool + (slot // block_size) * stride_block + row * head_dim + dims
        k = tl.load(key + token * key_stride_token + head * key_stride_head + dims, mask=is_dim)
        tl.store(at, k, mask=is_dim)
        if has_values:
            v = tl.load(value + token * value_stride_token + head * value_stride_head + dims, mask=is_dim)
            tl.store(at + block_size * num_kv_heads * head_dim, v, mask=is_dim)


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
    result,  # [T, num_dims]: the activation of the first half and the second
    slope,  # the numbers of the `Activation`
    cubic,
    limit,
    shift,
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
    gates = tl.minimum(gates, limit)
    square = tl.minimum(gates * gates, 1e30)  # finite, so that 0 times it is 0
    ups = tl.maximum(tl.minimum(ups, limit), -limit) + shift
    gated = gates * tl.sigmoid(gates * (slope + cubic * square)) * ups
    tl.store(result + row * num_dims + dims, gated.to(result.dtype.element_ty), mask=is_dim)


@triton.jit
def _per_number(of_groups, tile_cols: tl.constexpr, num_groups: tl.constexpr, length: tl.constexpr):
    """[tile_cols, num_groups] -> [tile_cols, length]: each group's for its numbers."""
    shape: tl.constexpr = (tile_cols, num_groups, length // num_groups)
    return tl.reshape(tl.broadcast_to(of_groups[:, :, None], shape), (tile_cols, length))


@triton.jit(do_not_specialize=["num_rows"])
def multiply_groups(
    states,  # [num_rows, length]
    codes,  # [num_cols, length], of 4 bits as `GroupedWeight` says
    scales,  # [num_cols, length / group]
    shifts,  # the same shape: offsets, or zeros
    bias,  # [num_cols]
    result,  # [num_rows, num_cols]
    num_rows,
    num_cols,
    length: tl.constexpr,
    bits: tl.constexpr,
    group: tl.constexpr,
    zero: tl.constexpr,
    has_zeros: tl.constexpr,
    has_offsets: tl.constexpr,
    is_e4m3: tl.constexpr,
    has_bias: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
    tile_len: tl.constexpr,  # numbers of a row of the weight per step, whole groups
):
    """`states` times the transpose of a weight, which becomes numbers of their type in registers.

    Grid (num_cols / tile_cols, num_rows / tile_rows), both rounded up.
    """
    rows = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    cols = (tl.program_id(0) * tile_cols + tl.arange(0, tile_cols)).to(tl.int64)
    is_row, is_col = (rows < num_rows)[:, None], (cols < num_cols)[:, None]
    num_groups: tl.constexpr = tile_len // group
    num_parts: tl.constexpr = 8 // bits  # numbers in a byte
    tile_bytes: tl.constexpr = tile_len // num_parts
    sums = tl.zeros([tile_rows, tile_cols], tl.float32)
    for first in range(0, length, tile_len):
        groups = first // group + tl.arange(0, num_groups)
        here = is_col & (groups < length // group)[None, :]
        at = cols[:, None] * (length // group) + groups[None, :]
        factor = tl.load(scales + at, mask=here, other=0.0).to(tl.float32)
        factor = _per_number(factor, tile_cols, num_groups, tile_bytes)
        if has_zeros or has_offsets:
            shift = tl.load(shifts + at, mask=here, other=0.0).to(tl.float32)
            shift = _per_number(shift, tile_cols, num_groups, tile_bytes)
        places = first // num_parts + tl.arange(0, tile_bytes)
        is_place = (places < length // num_parts)[None, :]
        at = codes + cols[:, None] * (length // num_parts) + places[None, :]
        packed = tl.load(at, mask=is_col & is_place, other=0)
        for part in tl.static_range(num_parts):
            if bits == 4:
                numbers = ((packed >> (4 * part)) & 15).to(tl.float32)
                steps = places // 16 * 32 + places % 16 + 16 * part
            else:
                numbers = widened(packed, tl.float32) if is_e4m3 else packed.to(tl.float32)
                steps = places
            if has_zeros:
                numbers -= shift
            elif zero:
                numbers -= zero
            numbers *= factor
            if has_offsets:
                numbers += shift
            at = states + rows.to(tl.int64)[:, None] * length + steps[None, :]
            inputs = tl.load(at, mask=is_row & is_place, other=0.0)
            sums += tl.dot(inputs, tl.trans(numbers.to(inputs.dtype)), input_precision="ieee")
    if has_bias:
        sums += tl.load(bias + cols, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
    to = result + rows.to(tl.int64)[:, None] * num_cols + cols[None, :]
    tl.store(to, sums.to(result.dtype.element_ty), mask=is_row & (cols < num_cols)[None, :])
