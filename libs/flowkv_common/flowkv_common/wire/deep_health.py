"""The answer of the gateway's `GET /health/deep`."""

from __future__ import annotations

import msgspec


class TriedPair(msgspec.Struct, frozen=True):
    """`ms`: until the second token, or until it failed."""

    prefill: str
    decode: str
    ok: bool
    ms: float
    error: str | None = None


class DeepHealth(msgspec.Struct, frozen=True):
    """`num_pairs`: of ready nodes; those tried are in `pairs`. `age_s`: since they were."""

    ok: bool
    why_not: str | None
    age_s: float
    num_pairs: int
    pairs: list[TriedPair]
