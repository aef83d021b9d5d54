"""Fixtures that tests on one server share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flowkv_common.bus.connection import Bus, connect
from flowkv_engine.engine.model import LoadedModel
from flowkv_gateway.tokenizer import Tokenizer
from tests.drive import load_tiny
from tests.gateway_support import write_tokenizer
from tests.nats_server import NatsServer
from tests.tiny_models import make_tiny_model


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """The test's own connection."""
    async with connect(nats_server.url, name="test") as mine:
        yield mine


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, in place of the default one."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(model_path: Path) -> LoadedModel:
    """It, loaded once for all tests."""
    return load_tiny(model_path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A gateway's, of a few hundred tokens."""
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
