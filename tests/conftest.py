"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nats_server import NatsServer


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    """A NATS server of the test's own (19 ms)."""
    with NatsServer() as server:
        yield server
