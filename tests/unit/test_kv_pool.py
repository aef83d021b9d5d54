"""One tensor, one stretch of bytes, one file descriptor."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import msgspec
import pytest
import torch

from flowkv_common.wire.messages import LayerKV, PoolLayout, Run
from flowkv_engine.kv.pool import KVPool, layer_views


def layout_of(dtype: str) -> PoolLayout:
    return PoolLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_block_of_all_layers_is_one_stretch_of_bytes(dtype: str) -> None:
    with KVPool(layout_of(dtype), num_blocks=5) as pool:
        assert pool.tensor.shape == (5, 3 * 2 * 4 * 2 * 8)
        assert pool.tensor.dtype == getattr(torch, dtype)
        assert len(pool.buffer) == pool.num_bytes == 5 * pool.layout.block_bytes
        pool.tensor[2:4] = 1.5
        block = pool.tensor[2].contiguous().view(torch.uint8).numpy().tobytes()
        assert bytes(pool.bytes_of(Run(2, 2))) == block + block
        assert not any(pool.bytes_of(Run(0, 2)))
        assert not any(pool.bytes_of(Run(4, 1)))


def test_layers_of_their_own_sizes_follow_each_other_in_a_block() -> None:
    layers = [LayerKV(2, 8), LayerKV(1, 16), LayerKV(1, 24, num_sides=1)]
    layout = PoolLayout.of(layers, block_size=4, dtype="bfloat16")
    assert layout.block_bytes == 4 * 2 * (2 * 2 * 8 + 2 * 16 + 24)
    with KVPool(layout, num_blocks=3) as pool:
        views = layer_views(pool.tensor, layout)
        assert [view.shape for view in views] == [(3, 2, 4, 2, 8), (3, 2, 4, 1, 16), (3, 1, 4, 1, 24)]
        for number, view in enumerate(views, 1):
            view[1] = number
        assert not any(pool.bytes_of(Run(0, 1)))
        assert not any(pool.bytes_of(Run(2, 1)))
        assert pool.tensor[1].tolist() == [1] * 128 + [2] * 128 + [3] * 96


def test_plain_layers_are_as_they_were_on_the_wire() -> None:
    """So that nodes of an older version exchange blocks with those of this one."""
    layout = PoolLayout.of([LayerKV(2, 8)] * 3, block_size=4, dtype="float32")
    assert layout == layout_of("float32")
    written = "PoolLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=8, dtype='float32')"
    assert repr(layout) == written
    latents = PoolLayout.of([LayerKV(1, 24, 1)] * 3, block_size=4, dtype="float32")
    assert repr(latents) != repr(msgspec.structs.replace(latents, layers=()))
    assert msgspec.json.decode(msgspec.json.encode(latents), type=PoolLayout) == latents
    with pytest.raises(ValueError, match="2 layers are described, of 3"):
        msgspec.structs.replace(latents, layers=latents.layers[:2])


def test_bytes_of_a_token_are_as_the_pages_tell() -> None:
    def num_bytes(layers: list[LayerKV], num_tokens: int = 1) -> int:
        return PoolLayout.of(layers, block_size=1, dtype="bfloat16").block_bytes * num_tokens

    transfer, models = (
        (Path(__file__).parents[2] / "docs" / name).read_text() for name in ("kv-transfer.md", "models.md")
    )
    deepseek_v3, llama_70b = [LayerKV(1, 512 + 64, 1)] * 61, [LayerKV(8, 128)] * 80
    told = (
        f"DeepSeek-V3 has {num_bytes(deepseek_v3):,} bytes a token, Llama-3.1-70B {num_bytes(llama_70b):,}."
    )
    assert told in transfer
    gemma_3_27b = LayerKV(16, 128)  # 10 of 62 layers see all, the others 1,024 tokens
    kept = num_bytes([gemma_3_27b] * 62, 32768)
    read = num_bytes([gemma_3_27b] * 10, 32768) + num_bytes([gemma_3_27b] * 52, 1024)
    assert f"Gemma 3 27B's {kept / 1e9:.1f} GB for 32,768 tokens" in models
    assert f"no layer reads {(kept - read) / 1e9:.1f} again" in models


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
