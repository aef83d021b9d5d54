"""`flowkv bench` against a gateway whose nodes are played: open and closed, with ids and with texts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flowkv_common.telemetry import serve_http
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import serving
from tests.played_cluster import run

SHORT = ("--prompt-tokens", "5", "--max-tokens", "4", "--spread", "0")


@pytest.mark.parametrize(
    "load",
    [
        ("--chat", "--clients", "2", "--requests", "6"),
        ("--chat", "--rate", "200", "--seconds", "0.03", "--seed", "5"),
    ],
)
async def test_all_answers_are_counted(
    load: tuple[str, ...], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, picture = tmp_path / "r.json", tmp_path / "r.html"
    files = ("--json", str(report), "--html", str(picture))
    async with serving(tokenizer, text="hello there") as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        assert await run("bench", "--url", url, *SHORT, *load, *files) == 0
        num_asked = len(gateway.dispatch.asked)
    found = json.loads(report.read_text())
    assert found["figures"]["num_complete"] == len(found["requests"]) == num_asked > 1
    assert found["conditions"]["model"]
    assert "key" not in found["conditions"]
    assert "<svg" in picture.read_text()
    shown = capsys.readouterr().out
    assert f"{num_asked} of {num_asked} requests complete" in shown
    assert "TTFT" in shown


async def test_refused_requests_fail_the_run(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its vocabulary is smaller than the ids that stand for text elsewhere."""
    async with serving(tokenizer) as gateway:
        url = f"http://127.0.0.1:{gateway.port}"
        assert await run("bench", "--url", url, *SHORT, "--clients", "1", "--requests", "1") == 1
    assert "0 of 1 requests complete" in capsys.readouterr().out


@contextlib.asynccontextmanager
async def strict_server() -> AsyncIterator[str]:
    """Takes OpenAI's fields alone, and refuses others in FastAPI's words; its URL."""

    async def answer(request: Request) -> Response:
        body = await request.json()
        if unknown := body.keys() - {
            "model",
            "messages",
            "max_tokens",
            "temperature",
            "stream",
            "stream_options",
        }:
            return JSONResponse({"detail": f"Unexpected fields: {sorted(unknown)}"}, 422)
        delta = {"choices": [{"delta": {"content": "hi"}, "finish_reason": "length"}]}
        return Response(f"data: {json.dumps(delta)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
    async with serve_http(app, "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


async def test_a_server_that_knows_only_openais_fields(capsys: pytest.CaptureFixture[str]) -> None:
    async with strict_server() as url:
        asked = ("--url", url, "--model", "m", "--chat", *SHORT, "--clients", "1", "--requests", "2")
        assert await run("bench", *asked) == 1
        shown = capsys.readouterr().out
        assert "Unexpected fields: ['ignore_eos', 'return_token_ids']" in shown
        assert "--plain" in shown
        assert await run("bench", *asked, "--plain") == 0
    assert "2 of 2 requests complete" in capsys.readouterr().out
