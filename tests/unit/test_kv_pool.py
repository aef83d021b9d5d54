"""One tensor, one stretch of bytes, one file descriptor."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from flowkv_common.wire.messages import PoolLayout, Run
from flowkv_engine.kv.pool import KVPool


def layout_of(dtype: str) -> PoolLayout:
    return PoolLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_block_of_all_layers_is_one_stretch_of_bytes(dtype: str) -> None:
    with KVPool(layout_of(dtype), num_blocks=5) as pool:
        assert pool.tensor.shape == (5, 3, 2, 4, 2, 8)
        assert pool.tensor.dtype == getattr(torch, dtype)
        assert len(pool.buffer) == pool.num_bytes == 5 * pool.layout.block_bytes
        pool.tensor[2:4] = 1.5
        block = pool.tensor[2].contiguous().view(torch.uint8).numpy().tobytes()
        assert bytes(pool.bytes_of(Run(2, 2))) == block + block
        assert not any(pool.bytes_of(Run(0, 2)))
        assert not any(pool.bytes_of(Run(4, 1)))


def test_another_mapping_of_the_descriptor_sees_the_same_bytes() -> None:
    with KVPool(layout_of("float32"), num_blocks=2) as pool:
        with mmap.mmap(pool.fd, pool.num_bytes, prot=mmap.PROT_READ) as other:
            pool.tensor[1] = 7.0
            assert other[pool.layout.block_bytes :] == bytes(pool.bytes_of(Run(1, 1)))


def test_nobody_can_shrink_it_under_a_peer() -> None:
    with KVPool(layout_of("float32"), num_blocks=2) as pool:
        with pytest.raises(PermissionError):
            os.ftruncate(pool.fd, 0)


def test_close_gives_the_memory_back_and_is_idempotent() -> None:
    pool = KVPool(layout_of("float32"), num_blocks=2)
    view = pool.tensor[0]
    pool.close()
    pool.close()
    assert float(view.sum()) == 0.0  # a view that somebody still holds stays readable
