"""Models with weights in fewer bits on nodes: greedy tokens are those of `transformers` on their floats."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from flowkv_common.bus.connection import Bus
from flowkv_engine.engine.stored import FORMS, Form
from tests.drive import load_tiny
from tests.integration.test_several_models import Weights, bus, check_topology
from tests.nats_server import NatsServer
from tests.stored_models import make_stored_model

__all__ = ["bus"]  # a fixture


@pytest.mark.full  # kernels compile; by default the default model, of Q4_1 and Q8_0, is served
@pytest.mark.parametrize("topology", ["1P1D", "mixed"])
@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
async def test_answers_are_those_of_the_floats(
    nats_server: NatsServer, bus: Bus, tmp_path: Path, form: Form, topology: Literal["1P1D", "mixed"]
) -> None:
    folder = make_stored_model(tmp_path / "m", [form])
    weights = Weights(folder, load_tiny(folder), folder)
    await check_topology(nats_server, bus, weights, topology)
