"""What the overlap benchmark makes of its samples, and that its setups can be compared."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from benchmarks.command import Report
from benchmarks.overlap.measure import Sample
from benchmarks.overlap.report import Spread, rows_of, table
from benchmarks.overlap.setups import CHUNK_TOKENS, SETUPS, NotPinned, check_pinned
from flowkv_common.config import NodeSettings, load_settings
from flowkv_common.wire.messages import KVTransferred
from flowkv_common.wire.nodes import starting_chunk_budget

BY_NAME = {setup.name: setup for setup in SETUPS}
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
    short, long = rows_of(BY_NAME["on"], samples)
    assert (short.num_tokens, short.num_repeats) == (500, 3)
    assert short.first_token_ms == Spread(200, 100, 600)
    assert short.second_token_ms == Spread(250, 150, 650)
    assert short.moved is not None
    assert (short.moved.hidden_ms, short.moved.exposed_ms) == (Spread(20, 20, 20), Spread(10, 10, 10))
    assert (long.num_tokens, long.second_token_ms) == (900, Spread(2000, 2000, 2000))


def test_table_and_json_say_what_the_rows_say(tmp_path: Path) -> None:
    rows = rows_of(BY_NAME["off"], [Sample(500, 1.0, 1.5, EVENT)])
    rows += rows_of(BY_NAME["mixed-1"], [Sample(500, 1.0, 1.25, None)])
    assert "1500 (1500-1500)" in table(rows)
    assert "1250 (1250-1250)" in table(rows)
    assert "24, 2, 20.0 + 10.0" in table(rows)
    report = Report("overlap", {"connector": "shm"})
    report.rows += rows
    report.write(tmp_path / "overlap.json")
    written = json.loads((tmp_path / "overlap.json").read_text())
    assert [row["second_token_ms"]["median"] for row in written["rows"]] == [1500, 1250]
    assert written["rows"][1]["moved"] is None
    assert {"commit", "host", "load_average"} <= written.keys()


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_all_setups_cut_prompts_into_the_same_chunks(setup) -> None:
    environ = {"FLOWKV_MODEL_PATH": "model", "FLOWKV_TOKEN_BUDGET": str(CHUNK_TOKENS), **setup.settings}
    settings = load_settings(NodeSettings, [], environ)
    role = "prefill" if setup.hands_over else "mixed"
    assert starting_chunk_budget(role, settings.token_budget, settings.block_size) == CHUNK_TOKENS


def test_overlap_is_all_that_the_two_pairs_differ_in() -> None:
    off, on = BY_NAME["off"], BY_NAME["on"]
    switch = "FLOWKV_OVERLAP_TRANSFER"
    assert (off.settings[switch], on.settings[switch]) == ("false", "true")
    assert off.settings == {**on.settings, switch: "false"}
    assert dataclasses.replace(off, name="", title="", settings={}) == dataclasses.replace(
        on, name="", title="", settings={}
    )


def test_a_thread_on_a_core_of_another_is_found() -> None:
    cores = os.sched_getaffinity(0)
    check_pinned(os.getpid(), cores)
    with pytest.raises(NotPinned):
        check_pinned(os.getpid(), {max(cores) + 1})
