"""What the overlap benchmark makes of its samples, and that its setups can be compared."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import BenchmarkFailed
from benchmarks.clusters import check_pinned
from benchmarks.overlap import CHUNK_TOKENS, SETUPS, Sample, Setup, rows_of
from benchmarks.report import Report, Spread, table
from flowkv_common.config import NodeSettings, load_settings
from flowkv_common.wire.messages import KVTransferred
from flowkv_common.wire.nodes import starting_chunk_budget
from tests.paced.cluster import variables

EVENT = KVTransferred(
    transfer_id="r.0",
    prefill_node="prefill-0",
    decode_node="decode-0",
    connector="shm",
    num_bytes=24_000_000,
    num_copies=2,
    num_calls=2,
    total_s=0.030,
    exposed_s=0.010,
    hidden_s=0.020,
)


def test_rows_hold_median_and_extremes_of_each_length() -> None:
    samples = [Sample(500, 0.1 * n, 0.1 * n + 0.05, EVENT) for n in (1, 2, 6)] + [Sample(900, 1, 2, EVENT)]
    short, long = rows_of("on", samples)
    assert (short["num_tokens"], short["num_repeats"]) == (500, 3)
    assert short["first_token_ms"] == Spread(200, 100, 600)
    assert short["second_token_ms"] == Spread(250, 150, 650)
    assert (short["num_bytes"], short["num_copies"]) == (24_000_000, 2)
    assert (short["hidden_ms"], short["exposed_ms"]) == (Spread(20, 20, 20), Spread(10, 10, 10))
    assert (long["num_tokens"], long["second_token_ms"]) == (900, Spread(2000, 2000, 2000))


def test_table_and_json_say_what_the_rows_say(tmp_path: Path) -> None:
    rows = rows_of("off", [Sample(500, 1.0, 1.5, EVENT)])
    rows += rows_of("mixed-1", [Sample(500, 1.0, 1.25, None)])
    assert "1,500.0 (1,500.0-1,500.0)" in table(rows)
    assert "1,250.0 (1,250.0-1,250.0)" in table(rows)
    report = Report(Namespace(benchmark="overlap", json=tmp_path / "overlap.json"), connector="shm")
    report.rows += rows
    report.write()
    written = json.loads((tmp_path / "overlap.json").read_text())
    assert [row["second_token_ms"]["median"] for row in written["rows"]] == [1500, 1250]
    assert written["rows"][1]["num_bytes"] is written["rows"][1]["hidden_ms"] is None
    assert {"commit", "host", "load_average"} <= written.keys()


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_all_setups_cut_prompts_into_the_same_chunks(setup: Setup) -> None:
    settings = load_settings(NodeSettings, [], {"FLOWKV_MODEL_PATH": "model", **variables(**setup.settings)})
    role = "prefill" if "prefill" in setup.cores else "mixed"
    assert starting_chunk_budget(role, settings.token_budget, settings.block_size) == CHUNK_TOKENS


def test_overlap_is_all_that_the_two_pairs_differ_in() -> None:
    off, on = SETUPS["off"], SETUPS["on"]
    switch = "overlap_transfer"
    assert (off.settings[switch], on.settings[switch]) == (False, True)
    assert off.settings == {**on.settings, switch: False}
    assert off.cores == on.cores


def test_a_thread_on_a_core_of_another_is_found() -> None:
    cores = os.sched_getaffinity(0)
    check_pinned(os.getpid(), cores)
    with pytest.raises(BenchmarkFailed):
        check_pinned(os.getpid(), {max(cores) + 1})
