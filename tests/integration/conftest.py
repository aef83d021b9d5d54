"""Fixtures that tests on one server share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from flowkv_common.bus.connection import Bus, connect
from flowkv_engine.engine.model import LoadedModel
from flowkv_gateway.tokenizer import Tokenizer
from tests.drive import load_tiny
from tests.gateway_support import (
    CALL,
    CARD,
    THINKS,
    Gateway,
    serving,
    tokenizer_with,
    write_tokenizer,
)
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


@pytest.fixture(scope="session")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One whose chats think before they answer."""
    return tokenizer_with(tmp_path_factory.mktemp("thinking"), THINKS)


@pytest.fixture
async def gateway(thinking: Tokenizer) -> AsyncIterator[Gateway]:
    """Its model thinks, says something and calls a function."""
    async with serving(thinking, text=f"I ask.</think>\n\nWell.\n{CALL}") as gateway:
        gateway.dispatch.card = msgspec.structs.replace(CARD, max_model_len=4000)
        yield gateway
