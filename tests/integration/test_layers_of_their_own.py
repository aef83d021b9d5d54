"""Models whose layers keep KV of their own sizes, over each connector: tokens are those of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowkv_common.bus.connection import Bus
from tests.drive import load_tiny
from tests.every_model import tiny_config
from tests.integration.test_several_models import Weights, bus, check_topology
from tests.nats_server import NatsServer
from tests.tiny_models import save_random

__all__ = ["bus"]  # a fixture

KINDS: dict[str, dict[str, Any]] = {"gemma4_text": {"num_kv_shared_layers": 2}, "deepseek_v3": {}}


@pytest.mark.full
@pytest.mark.parametrize("connectors", ["shm", "tcp"])
@pytest.mark.parametrize("model_type", KINDS)
async def test_answers_of_a_pair_of_nodes(
    nats_server: NatsServer, bus: Bus, tmp_path: Path, model_type: str, connectors: str
) -> None:
    folder = tmp_path / "m"
    save_random(tiny_config(model_type, **KINDS[model_type]), folder)
    weights = Weights(folder, load_tiny(folder), folder)
    await check_topology(nats_server, bus, weights, "1P1D", connectors=connectors)
