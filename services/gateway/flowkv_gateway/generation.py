"""What the HTTP side asks for and what it gets back. Knows neither HTTP nor NATS."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from flowkv_common.wire.parts import ModelCard, SamplingParams, TokenLogprob


@dataclass
class Record:
    """What has become of a generation so far. Written by who makes the answer, read by who asked for it.

    `queue_s` of the `ttft_s` seconds to the first token were waits: for a pair of nodes, and at the nodes.
    """

    num_attempts: int = 0
    prefill_node: str = ""  # of the last attempt
    decode_node: str = ""
    ttft_s: float | None = None
    queue_s: float = 0.0


@dataclass(frozen=True)
class Generation:
    """One prompt to continue once. `deadline_s` counts from the call of `generate`."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    deadline_s: float
    priority: int = 0
    fingerprint: str = field(kw_only=True)  # of the model, on all attempts
    record: Record = field(default_factory=Record, compare=False)


class Piece(NamedTuple):
    """The next tokens of an answer, in order and without gaps; `finish_reason` is set in the last piece.

    `logprobs` is empty or has one entry per token.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None
    num_cached_tokens: int


class Load(NamedTuple):
    """Open requests, by whether a node works at them now, and the share of KV blocks in use.

    The requests are this generator's own: so the sum over gateways counts each once. The blocks are those of
    all nodes of the model.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # 0 to 1


class Generator(Protocol):
    """Makes answers. The HTTP side knows nothing of nodes, attempts or waiting."""

    def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        """The answer in pieces. Raises FlowKVError; closing the iterator cancels the request."""
        ...

    def model(self) -> ModelCard | None:
        """The model of new requests; None until a node that serves the gateway's model has joined."""
        ...

    def load(self) -> Load: ...

    def why_not_ready(self) -> str | None:
        """What is missing for a request sent now to be served; None if nothing is."""
        ...
