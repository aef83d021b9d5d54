"""`python -m benchmarks`: one list of all benchmarks, and one way to fail."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS, main

NAMES = [name for group in BENCHMARKS.values() for name in group]


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_a_module_whose_help_says_how_to_run_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importlib.import_module(f"benchmarks.{name.replace('-', '_')}").__doc__
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m benchmarks {name} " in capsys.readouterr().out


def test_without_a_name_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in NAMES)


def test_an_unknown_name_gets_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    assert "unknown benchmark 'nonsense': choose one of bad-days, burst" in capsys.readouterr().err


def test_a_benchmark_that_fails_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl: no such file" in capsys.readouterr().err
