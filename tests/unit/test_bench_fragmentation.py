"""The fragmentation benchmark in a pool small enough to follow by hand, and the traces it reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import BenchmarkFailed, traffic
from benchmarks.fragmentation import COLUMNS, Replay, main
from flowkv.bench import traces
from flowkv.bench.traces import Request
from flowkv_common.errors import CannotStart


def replayed(requests: list[Request], *, num_blocks: int, level: float, has_cache: bool, room: int) -> Replay:
    replay = Replay(num_blocks, 16, level, has_cache, room)
    replay.run(requests)
    for side in (replay.prefill, replay.told, replay.alone):
        side.pool.check_integrity()
    return replay


def test_a_fresh_pool_gives_one_copy_each() -> None:
    replay = replayed([Request(40, 1)] * 4, num_blocks=20, level=0.75, has_cache=False, room=2)
    assert {name: dict(counts) for name, counts in replay.copies.items()} == dict.fromkeys(
        replay.copies, {1: 4}
    )


def test_a_request_over_the_level_is_left_out_and_told() -> None:
    replay = replayed([Request(40, 1), Request(400, 1)], num_blocks=20, level=0.75, has_cache=False, room=0)
    assert (replay.copies["aligned"].total(), replay.num_left_out) == (1, 1)


def test_sequences_grow_token_by_token_beside_each_other() -> None:
    # Two of one block, 33 tokens to come: both grow twice, and end before the third is let in.
    requests = [Request(15, 33), Request(15, 33), Request(160, 1)]
    replay = replayed(requests, num_blocks=12, level=1.0, has_cache=False, room=3)
    assert (replay.alone.num_grown, replay.alone.num_moved) == (4, 0)
    assert replay.copies["decode alone"] == Counter({1: 3})
    assert replay.copies["free list"] == Counter({1: 2, 7: 1})  # 1, 3, 5, 0, 2, 4, then 6 ... 10


@pytest.mark.parametrize(
    ("has_cache", "means", "hits"),
    [
        (False, [1.12, 1.3267, 1.4467, 1.4633, 1.38, 29.0433], (0, 0, 0, 0)),
        (True, [1.5467, 1.7433, 2.2633, 2.2067, 1.88, 25.1933], (98, 87, 1511, 1521)),
    ],
)
def test_a_replay_gives_exactly_these_figures(
    has_cache: bool, means: list[float], hits: tuple[int, ...]
) -> None:
    requests = traffic.synthetic(300, seed=1)
    replay = replayed(requests, num_blocks=4_000, level=0.9, has_cache=has_cache, room=8)
    assert list(replay.figures()["mean_copies"].values()) == means
    assert tuple(replay.num_hit_blocks.values()) == hits


def test_equal_hash_ids_are_equal_blocks() -> None:
    one, other = Request(1_000, 1, (7, 8)), Request(600, 1, (7, 9))
    ours, theirs = one.block_hashes(16), other.block_hashes(16)
    assert (len(ours), len(theirs)) == (62, 37)
    assert ours[:32] == theirs[:32]
    assert not set(ours[32:]) & set(theirs[32:])


def test_reads_both_formats(tmp_path: Path) -> None:
    mooncake, azure = tmp_path / "m.jsonl", tmp_path / "a.csv"
    mooncake.write_text('{"timestamp": 27500, "input_length": 700, "output_length": 5, "hash_ids": [0, 4]}\n')
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,91,0\n"
    )
    assert traces.read_trace(mooncake) == [Request(700, 5, (0, 4), 27.5)]
    assert traces.read_trace(azure) == [Request(374, 44), Request(91, 1, (), 1.5)]
    azure.write_text("TIMESTAMP,Tokens\n2023-11-16 18:15:46,1\n")
    with pytest.raises(CannotStart, match="ContextTokens"):
        traces.read_trace(azure)


def test_writes_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert main(["--json", str(file), "--requests", "20", "--blocks", "3000", "--cache", "off"]) == 0
    report = json.loads(file.read_text())
    assert [row["level"] for row in report["rows"]] == [0.6, 0.75, 0.9]
    header, *lines, _ = capsys.readouterr().out.splitlines()
    assert all(name in header for name in COLUMNS)
    assert [line.split()[:5] for line in lines] == [
        [f"{level}%", "off", "1.00", "/", "1"] for level in (60, 75, 90)
    ]
    with pytest.raises(CannotStart, match="none.csv"):
        main(["--json", str(file), "--trace", str(tmp_path / "none.csv")])


def test_a_pool_that_is_outgrown_is_told(tmp_path: Path) -> None:
    trace = tmp_path / "a.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,20,900\n")
    with pytest.raises(BenchmarkFailed, match="outgrow a pool of 30 blocks"):
        main(["--json", str(tmp_path / "out.json"), "--trace", str(trace), "--blocks", "30"])
