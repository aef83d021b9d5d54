"""Nodes whose KV is in floats of 8 bits: the tokens of an engine alone with such a pool, on every path."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Literal

import pytest
import torch

from flowkv_common.bus.connection import Bus
from flowkv_engine.engine.runner import Runner
from tests.drive import generate, load_tiny, make_pool, make_sequence
from tests.integration.test_several_models import GREEDY, Weights, ask, bus, gateway, until_ready
from tests.live_nodes import live_node
from tests.nats_server import NatsServer
from tests.tiny_models import make_tiny_model

__all__ = ["bus"]  # a fixture


@pytest.mark.full  # kernels compile
@pytest.mark.parametrize("topology", ["1P1D", "mixed"])
async def test_answers_are_those_of_one_engine(
    nats_server: NatsServer, bus: Bus, tmp_path: Path, topology: Literal["1P1D", "mixed"]
) -> None:
    folder = make_tiny_model(tmp_path / "m", seed=3)
    model = load_tiny(folder)
    prompts = [[30 + number] * (9 + 20 * number) for number in range(6)]
    alone = Runner(model, make_pool(model, 16, torch.float8_e4m3fn), attention="cpu")
    expected = []
    for prompt_ids in prompts:
        sequence = make_sequence(prompt_ids, list(range(16)))
        generate(alone, [sequence], GREEDY.max_tokens)
        expected.append(sequence.output_ids)
    roles = {"prefill": 0, "decode": 1} if topology == "1P1D" else {"mixed": 0}
    async with contextlib.AsyncExitStack() as nodes:
        for role, peers in roles.items():
            node = live_node(
                nats_server,
                bus,
                model,
                f"{role}-x",
                role=role,
                peers=peers,
                attention="cpu",
                kv_dtype="float8_e4m3fn",
            )
            await nodes.enter_async_context(node)
        weights = Weights(folder, model, folder)
        dispatch = await nodes.enter_async_context(gateway(nats_server, weights))
        await until_ready(dispatch, bus)
        assert await asyncio.gather(*(ask(dispatch, prompt_ids) for prompt_ids in prompts)) == expected
