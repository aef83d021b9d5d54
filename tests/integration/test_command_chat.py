"""`flowkv chat` with a gateway whose nodes are played: what it shows, keeps and sends."""

from __future__ import annotations

import asyncio
from argparse import Namespace

import pytest

from flowkv.chat import Chat
from flowkv_common.errors import NotFound
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import MODEL, serving
from tests.played_cluster import run

Captured = pytest.CaptureFixture[str]


async def test_one_question(tokenizer: Tokenizer, capsys: Captured) -> None:
    async with serving(tokenizer, text="hello there") as gateway:
        at = ("--url", f"http://127.0.0.1:{gateway.port}")
        assert await run("chat", "Which?", *at) == 0
        assert capsys.readouterr().out == "hello there\n"
        with pytest.raises(NotFound, match="404"):
            await run("chat", "Which?", *at, "--model", "no-such-model")


async def test_a_conversation(
    tokenizer: Tokenizer, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowkv.terminal.CONNECT_TIMEOUT_S", 0.1)
    nowhere = "nats://127.0.0.1:1"
    options = Namespace(system="", key="", nats=nowhere, temperature=0.0, max_tokens=9)
    async with serving(tokenizer, text="hello there") as gateway:
        chat = Chat(f"http://127.0.0.1:{gateway.port}", MODEL, options)
        for line in ("/stats", "/system Be brief.", "One?", "Two?", "/stats", "/nonsense"):
            await asyncio.to_thread(chat.say, line)
        roles = [message["role"] for message in chat.messages]
        assert roles == ["system", "user", "assistant", "user", "assistant"]
        assert chat.messages[2]["content"] == "hello there"
        limits = [request.sampling.max_tokens for request in gateway.dispatch.asked]
        assert limits == [9, 9]
        chat.say("/clear")
        assert chat.messages == [{"role": "system", "content": "Be brief."}]
    said = capsys.readouterr().out
    for part in ("nothing has been answered yet", "TTFT", "where it ran can't be told", "no /nonsense"):
        assert part in said
