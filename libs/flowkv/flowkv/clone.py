"""Commands whose code is in a clone of the repository only: they measure, simulate and decide again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from flowkv_common.errors import CannotStart

ROOT = Path(__file__).resolve().parents[3]


def plan(argv: list[str]) -> int:
    return _benchmark("plan", argv)


def record(argv: list[str]) -> int:
    return _benchmark("record", argv)


def replay(argv: list[str]) -> int:
    return _benchmark("replay", argv)


def _benchmark(name: str, argv: list[str]) -> int:
    """`python -m benchmarks NAME`. Raises CannotStart outside of a clone."""
    if not (ROOT / "benchmarks" / "__main__.py").exists():
        raise CannotStart(
            f"flowkv {name} needs a clone of the repository: it is not in the installed package"
        )
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    status: int = importlib.import_module("benchmarks.__main__").main([name, *argv])
    return status
