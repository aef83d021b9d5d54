"""What `flowkv up` shows follows from the logs of its processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flowkv.processes import Process
from flowkv.progress import MAX_LINES_PER_LOOK, Log, NodeProgress, StartProgress, request_line, request_lines

ENDED = {
    "message": "request ended",
    "status": 200,
    "finish_reason": "length",
    "num_prompt_tokens": 37,
    "num_cached_tokens": 32,
    "num_output_tokens": 9,
    "ttft_s": 0.5,
    "total_s": 2.5,
    "prefill_node": "prefill-0",
    "decode_node": "decode-0",
}


def process(path: Path, name: str = "prefill-0") -> Process:
    """One that has ended: only its log matters."""
    started = Process.start(name, ["true"], os.environ, path / f"{name}.log")
    started.wait(10)
    return started


def write(process: Process, *lines: dict[str, object]) -> None:
    with process.log_path.open("a") as log:
        log.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_node_comes_further_with_each_thing_it_says() -> None:
    node = NodeProgress(num_peers=2)
    seen = [(str(node), node.share)]
    for message in (
        "loading /model (auto)",
        "loaded m: 1.0 M parameters",
        "connected to NATS at 127.0.0.1:1",
        "prefill-0 is ready: 9 blocks",
        "linked to decode-0 by shm",
        "KV goes to decode-1 by tcp, not by shm: not tried",
    ):
        node.hear(message)
        seen.append((str(node), node.share))
    names = ["imports", "weights", "kernels", "joins", "links 0/2", "links 1/2", "serves"]
    assert [name for name, _ in seen] == names
    shares = [share for _, share in seen]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0


def test_a_single_node_has_nobody_to_link_to() -> None:
    node = NodeProgress(num_peers=0)
    node.hear("mixed-0 is ready: 9 blocks")
    assert node.is_whole


def test_what_a_former_life_has_written_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "prefill-0.log").write_text('{"message":"prefill-0 is ready: 9 blocks"}\n')
    told: list[str] = []
    prefill = process(tmp_path)
    with StartProgress({"prefill-0": prefill}, ["prefill-0"], told.append, live=False) as progress:
        progress.look()
        assert told == []
        write(prefill, {"message": "prefill-0 is ready: 9 blocks"})
        progress.look()
        progress.look()
    assert told == ["prefill-0 serves"]


def test_bars_end_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefill = process(tmp_path)
    with StartProgress({"prefill-0": prefill}, ["prefill-0"], print, live=True):
        write(prefill, {"message": "prefill-0 is ready: 9 blocks"})
    assert "serves" in capsys.readouterr().err


def test_a_line_per_request_and_no_more_than_a_screen(tmp_path: Path) -> None:
    gateway = process(tmp_path, "gateway")
    log = Log(gateway)
    write(gateway, {"message": "stopping"}, ENDED)
    with gateway.log_path.open("a") as half:
        half.write('{"message": "request')  # the rest is still to be written
    assert len(list(request_lines(log))) == 1
    with gateway.log_path.open("a") as half:
        half.write(' ended"}\nno JSON\n')
    assert len(list(request_lines(log))) == 1
    write(gateway, *[ENDED] * (MAX_LINES_PER_LOOK + 7))
    assert list(request_lines(log))[-1].strip() == "and 7 more requests"
    log.close()


def test_a_line_says_how_long_and_where() -> None:
    line = request_line(ENDED)
    for said in (
        "200 length",
        "37 (32 cached) + 9 tokens",
        "TTFT 0.500 s",
        "4 tokens/s",
        "prefill-0 > decode-0",
    ):
        assert said in line
    refused = {"status": 429, "error": "Full", "reason": "would wait for 60 s", "num_prompt_tokens": 3}
    assert "429" in request_line(refused)
    assert "would wait for 60 s" in request_line(refused)
