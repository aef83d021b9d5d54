"""What several messages have in common: parts of them, never sent alone."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all that travels inside a message."""


class Run(NamedTuple):
    """A stretch of consecutive blocks on one side: `start, start + 1, ... start + length - 1`."""

    start: int
    length: int


class PoolLayout(Part, frozen=True):
    """Shape of one block: `[num_layers, 2, block_size, num_kv_heads, head_dim]` of `dtype`.

    Two pools can exchange blocks only when their layouts are equal.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        item = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim * item

    def blocks_for_prompt(self, num_tokens: int) -> int:
        """Blocks that a prompt of so many tokens needs, on either side: it has its next token's place too."""
        return num_tokens // self.block_size + 1


class NodeRef(Part, frozen=True):
    """A node in one of its lives: a restarted process keeps its `node_id`, never its `incarnation`."""

    node_id: str
    incarnation: str


class ModelFiles(Part, frozen=True):
    """Digests of a model folder's files, by which a gateway tells which nodes serve its own model.

    Empty where there is no such file, or where it is not used: random weights.
    """

    tokenizer: str = ""  # tokenizer.json
    config: str = ""  # config.json
    weights: str = ""  # all files with weights


class ModelCard(Part, frozen=True):
    """What a gateway must know of the model. `fingerprint` names weights and dtype; it seeds block hashes."""

    name: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    files: ModelFiles = ModelFiles()


class TokenIds(Part, frozen=True):
    """Token ids in little room: how many, and in base64 each as 4 bytes, the lowest first.

    Raises ValueError where the two don't agree.
    """

    count: int
    packed: bytes = b""

    @classmethod
    def of(cls, token_ids: Sequence[int]) -> TokenIds:
        """`token_ids`: each from 0 to 2**32 - 1."""
        return cls(count=len(token_ids), packed=_little_endian(array("I", token_ids)).tobytes())

    def __post_init__(self) -> None:
        if len(self.packed) != 4 * self.count:
            raise ValueError(f"{len(self.packed)} bytes are not {self.count} token ids of 4 bytes")

    def __len__(self) -> int:
        return self.count

    def unpack(self) -> list[int]:
        token_ids = array("I")
        token_ids.frombytes(self.packed)
        return _little_endian(token_ids).tolist()


def _little_endian(token_ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids


class SamplingParams(Part, frozen=True):
    """How tokens are chosen. The text is a function of these and the prompt, whichever node samples."""

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []  # end the text as EOS does, also where EOS is ignored
    num_logprobs: int | None = None  # None: none; 0: of the chosen token; k: and of the k best


class TokenLogprob(Part, frozen=True):
    """Log probability of a chosen token, and of the best ones as `(token id, log probability)`."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Candidate(Part, frozen=True):
    """A node that the scheduler weighed: predicted seconds until it could serve, smaller is better."""

    node_id: str
    predicted_s: float
    reason: str
