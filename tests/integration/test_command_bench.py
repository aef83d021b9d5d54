"""`flowkv bench` against a gateway whose nodes are played: open and closed, with ids and with texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
