"""Tokens as a pure function of those before them. A digest of a prefix stands in for its KV cache.

The digest of a sequence's tokens 0..p is the sum of `terms` modulo 2**64. So it can go on from any position
where it is known, as attention goes on from the KV cache, and is wrong where that was moved wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1
_OF_TOKEN = 0x9E3779B97F4A7C15
_OF_POSITION = 0xD1B54A32D192ED03
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def terms(token_ids: NDArray[np.int64], position_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """What each token adds to the digest at its position: [T]."""
    tokens = (token_ids + 1).astype(np.uint64) * np.uint64(_OF_TOKEN)
    return mix(tokens + (position_ids + 1).astype(np.uint64) * np.uint64(_OF_POSITION))


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatters the values over 64 bits, one by one (the last part of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    return values ^ (values >> np.uint64(31))


def paced_tokens(prompt_ids: Sequence[int], num_tokens: int, words: Sequence[int]) -> list[int]:
    """The output that every paced node gives for a prompt, in plain integers: what tests compare with."""
    digest = 0
    for position, token_id in enumerate(prompt_ids):
        digest = (digest + _term(token_id, position)) & _MASK
    output: list[int] = []
    while len(output) < num_tokens:
        token_id = words[_mixed(digest) % len(words)]
        digest = (digest + _term(token_id, len(prompt_ids) + len(output))) & _MASK
        output.append(token_id)
    return output


def _term(token_id: int, position: int) -> int:
    return _mixed(((token_id + 1) * _OF_TOKEN + (position + 1) * _OF_POSITION) & _MASK)


def _mixed(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)
