"""The models whose caches are moved, as pool layouts. Knows no model beyond its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from flowkv_common.wire.messages import PoolLayout

_BLOCK_SIZE = 16
# Pieces of a block in a layer-major pool: K and V of each layer lie apart.
_STATES_PER_LAYER = 2


@dataclass(frozen=True)
class Shape:
    """`layout` is that of the block-major pool."""

    title: str
    layout: PoolLayout

    @property
    def pieces_per_block(self) -> int:
        return self.layout.num_layers * _STATES_PER_LAYER

    @property
    def piece_layout(self) -> PoolLayout:
        """A layout whose blocks are the pieces of a layer-major pool: as many bytes, K or V of one layer."""
        return PoolLayout(
            num_layers=1,
            block_size=self.layout.block_size // _STATES_PER_LAYER,
            num_kv_heads=self.layout.num_kv_heads,
            head_dim=self.layout.head_dim,
            dtype=self.layout.dtype,
        )

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.layout.block_size)


SHAPES = {
    "llama": Shape(
        "Llama-3.1-8B, bfloat16",
        PoolLayout(num_layers=32, block_size=_BLOCK_SIZE, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
    ),
    "smollm2": Shape(
        "SmolLM2-135M, float32",
        PoolLayout(num_layers=30, block_size=_BLOCK_SIZE, num_kv_heads=3, head_dim=64, dtype="float32"),
    ),
}
