"""Requests of a trace, lengths without text: from Mooncake's JSON lines, Azure's CSV, or made up."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from datetime import datetime
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

# Mooncake's trace names each 512 tokens of a prompt by one id.
TOKENS_PER_HASH_ID = 512


class TraceError(Exception):
    """The file is no trace in a known format."""


class Request(NamedTuple):
    """Equal `hash_ids` in front mean equal prefixes of 512 tokens each; empty where the trace has none.

    `arrival_s` counts from the first request.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    arrival_s: float = 0.0

    def block_hashes(self, block_size: int) -> list[str]:
        """One hash for each full block of the prompt that `hash_ids` name."""
        num_blocks = min(self.num_prompt_tokens, len(self.hash_ids) * TOKENS_PER_HASH_ID) // block_size
        num_ids = -(-num_blocks * block_size // TOKENS_PER_HASH_ID)
        hashes = [name for key in self.hash_ids[:num_ids] for name in hashes_of_id(key, block_size)]
        return hashes[:num_blocks]


def hashes_of_id(hash_id: int, block_size: int) -> list[str]:
    """One hash for each block of the 512 tokens that an id names, of 32 hex digits as on the wire."""
    return [f"{hash_id:08x}{place:08x}" * 2 for place in range(TOKENS_PER_HASH_ID // block_size)]


def load(path: Path) -> list[Request]:
    """Reads a trace, told by its suffix. Raises `TraceError` if it is none, `OSError` if it can't be read."""
    readers = {".jsonl": _read_mooncake, ".csv": _read_azure}
    if path.suffix not in readers:
        raise TraceError(f"{path}: neither .jsonl (Mooncake) nor .csv (Azure)")
    with path.open(newline="") as lines:
        try:
            requests = list(readers[path.suffix](lines))
        except (KeyError, ValueError, TypeError) as error:
            raise TraceError(f"{path}: {error!r}") from error
    if not requests:
        raise TraceError(f"{path}: no requests")
    return requests


def synthetic(num_requests: int, seed: int = 0) -> list[Request]:
    """Log-normal prompts (median about 1,000 tokens) and outputs (150), every second one behind one of 64
    prefixes of 512 to 2,048 tokens, one request per second by a Poisson process: the shape of a chat service,
    for where no trace is at hand."""
    draw, arrivals = random.Random(seed), random.Random(seed + 1)
    prefixes = [tuple(64 * i + j for j in range(draw.randint(1, 4))) for i in range(64)]
    requests = []
    arrival_s = 0.0
    for number in range(num_requests):
        num_prompt = min(16_000, max(1, round(draw.lognormvariate(6.9, 0.9))))
        num_output = min(1_000, max(1, round(draw.lognormvariate(5.0, 0.8))))
        num_ids = -(-num_prompt // TOKENS_PER_HASH_ID)
        prefix = draw.choice(prefixes)[: num_ids - 1] if draw.random() < 0.5 else ()
        own = (64 * (64 + number) + i for i in range(num_ids - len(prefix)))
        requests.append(Request(num_prompt, num_output, (*prefix, *own), arrival_s))
        arrival_s += arrivals.expovariate(1.0)
    return requests


def repeated(requests: list[Request], num_requests: int) -> Iterator[Request]:
    """The trace from its beginning, again and again, `num_requests` in all."""
    return islice(cycle(requests), num_requests)


def _read_mooncake(lines: Iterator[str]) -> Iterator[Request]:
    for record in map(json.loads, lines):
        yield Request(
            record["input_length"],
            max(1, record["output_length"]),
            tuple(record["hash_ids"]),
            record["timestamp"] / 1e3,
        )


def _read_azure(lines: Iterator[str]) -> Iterator[Request]:
    began: datetime | None = None
    for row in csv.DictReader(lines):
        at = datetime.fromisoformat(row["TIMESTAMP"])
        began = began or at
        yield Request(
            int(row["ContextTokens"]),
            max(1, int(row["GeneratedTokens"])),
            arrival_s=(at - began).total_seconds(),
        )
