"""Hosts that are killed or cut off while they work cost no request and no token."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import BenchmarkFailed
from benchmarks.hosts import Hosts
from benchmarks.many_hosts import run

pytestmark = pytest.mark.full


def test_hosts_that_are_killed_and_cut_off(model_path: Path) -> None:
    try:
        with Hosts(1):
            pass
    except BenchmarkFailed as error:
        pytest.skip(str(error))
    asked, troubles, num_held = run(str(model_path), num_hosts=2, seconds=60.0, rate_per_s=3.0, seed=1)
    assert {trouble.blow for trouble in troubles} == {"host killed", "link cut"}
    assert [one.outcome.error for one in asked if one.outcome.error] == []
    assert sum(one.num_wrong_tokens for one in asked) == 0
    assert any(one.num_attempts > 1 for one in asked), "or nothing was under way when a host was struck"
    assert num_held == 0
