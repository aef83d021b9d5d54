"""Models by their sizes alone, for what needs no weights."""

from __future__ import annotations

from dataclasses import dataclass

from flowkv_common.wire.messages import PoolLayout

BLOCK_SIZE = 16
# Pieces of a block in a layer-major pool: K and V of each layer lie apart.
STATES_PER_LAYER = 2
LLAMA_8B_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Shape:
    """`layout` is that of the block-major pool."""

    title: str
    layout: PoolLayout

    @property
    def pieces_per_block(self) -> int:
        return self.layout.num_layers * STATES_PER_LAYER

    @property
    def piece_layout(self) -> PoolLayout:
        """A layout whose blocks are the pieces of a layer-major pool: as many bytes, K or V of one layer."""
        return PoolLayout(
            num_layers=1,
            block_size=self.layout.block_size // STATES_PER_LAYER,
            num_kv_heads=self.layout.num_kv_heads,
            head_dim=self.layout.head_dim,
            dtype=self.layout.dtype,
        )

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.layout.block_size)


SHAPES = {
    "llama": Shape(
        "Llama-3.1-8B, bfloat16",
        PoolLayout(num_layers=32, block_size=BLOCK_SIZE, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
    ),
    "smollm2": Shape(
        "SmolLM2-135M, float32",
        PoolLayout(num_layers=30, block_size=BLOCK_SIZE, num_kv_heads=3, head_dim=64, dtype="float32"),
    ),
}


def require_gpu() -> str:
    """The name of the first CUDA device. Raises SystemExit, with the reason, where there is none."""
    try:
        import cupy
    except ImportError as error:
        raise SystemExit(f"--device cuda needs CuPy, flowkv[gpu]: {error}") from error
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise SystemExit(f"--device cuda needs a CUDA device: {error}") from error
    return str(properties["name"].decode())
