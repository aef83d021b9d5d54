"""Clusters whose nodes guess tokens answer as one that does not, also when a node dies on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import StartCluster
from tests.e2e.load import Streamed, stream_completion
from tests.e2e.test_identity import tiny_with_tokenizer

TOKENS = 96
# Few words, so that text repeats: some guesses are right, some wrong.
WORDS = [300, 301, 302]
KINDS: list[dict[str, Any]] = [
    {"seed": seed, "temperature": seed % 3 / 2, "allowed_token_ids": WORDS} for seed in range(9)
]


@pytest.mark.full
async def test_seeded_answers_are_the_same_wherever_they_run(
    start_cluster: StartCluster, tmp_path: Path, model_path: Path
) -> None:
    model = tiny_with_tokenizer(tmp_path, "llama", model_path)
    plain = start_cluster(model=model, mixed=1, settings={"FLOWKV_SPECULATION": "off"})
    mixed = start_cluster(model=model, mixed=1)
    split = start_cluster(model=model, prefill=1, decode=2)
    expected = await answers(plain.url)
    assert len({tuple(each) for each in expected}) > 3
    for _ in range(2):
        assert await answers(mixed.url) == expected
        assert await answers(split.url) == expected
    under_way = asyncio.Event()

    def look(stream: Streamed) -> None:
        if len(stream.token_ids) >= TOKENS // 3:
            under_way.set()

    asked = asyncio.create_task(answers(split.url, look))
    async with asyncio.timeout(60):
        await under_way.wait()
    split.processes["decode-0"].kill()
    assert await asked == expected


async def answers(url: str, on_chunk: Callable[[Streamed], None] = lambda _: None) -> list[list[int]]:
    """All at once."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        streams = await asyncio.gather(
            *(
                stream_completion(http, [7, 8, 9, 10], max_tokens=TOKENS, on_chunk=on_chunk, **kind)
                for kind in KINDS
            )
        )
    assert [stream.error for stream in streams] == [None] * len(KINDS)
    return [stream.token_ids for stream in streams]
