"""Fixtures that all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.nats_server import NatsServer

if TYPE_CHECKING:
    from tests.engineless import Pair, Side

# A busy host may take longer than 200 ms, the default, for any example.
settings.register_profile("flowkv", deadline=None)
settings.load_profile("flowkv")


# Triton looks once, when it is imported, whether it shall run its kernels on the CPU. Other conftests may
# import it before pytest has parsed its options.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu":
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    """A NATS server of the test's own (19 ms)."""
    with NatsServer() as server:
        yield server


@pytest.fixture
async def pair(nats_server: NatsServer) -> AsyncIterator[Pair]:
    """A prefill and a decode node without engines."""
    from tests.engineless import engineless_pair  # only who asks for it waits for torch

    async with engineless_pair(nats_server) as pair:
        yield pair


@pytest.fixture
def side(pair: Pair) -> Side:
    """Its decode node."""
    return pair.d


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model, prepared as `make up` does it."""
    command = [sys.executable, "-m", "flowkv_engine.engine.fetch"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return Path(done.stdout.strip().splitlines()[-1])
