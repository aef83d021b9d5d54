"""Quantized models on nodes: greedy tokens are those of `transformers` on the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from flowkv_common.bus.connection import Bus
from tests.drive import load_tiny
from tests.integration.test_several_models import Weights, bus, check_topology
from tests.nats_server import NatsServer
from tests.quantized_models import FORMATS, Format, make_quantized_model

__all__ = ["bus"]  # a fixture


@pytest.mark.full  # it compiles; by default test_several_models.py has one of the formats
@pytest.mark.parametrize("topology", ["1P1D", "mixed"])
@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
async def test_answers_are_those_of_the_dequantized_weights(
    nats_server: NatsServer, bus: Bus, tmp_path: Path, form: Format, topology: Literal["1P1D", "mixed"]
) -> None:
    folder = tmp_path / "m"
    floats = make_quantized_model(folder, form, hidden_size=128, intermediate_size=256, head_dim=32)
    weights = Weights(folder, load_tiny(folder), floats)
    await check_topology(nats_server, bus, weights, topology)
