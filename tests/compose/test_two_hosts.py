"""Two projects that share nothing but NATS and the ports for KV: what two hosts are to each other.

Each has several nodes of its role, on one network.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.compose.composed import Composed, docker
from tests.e2e.load import run_all
from tests.e2e.observer import observe
from tests.e2e.test_identity import TOKENS, check_all

pytestmark = pytest.mark.compose

FILES = ("compose.yaml", "compose.hosts.yaml", "tests/compose/override.yaml")


@pytest.fixture
def address() -> Iterator[str]:
    """An address of this machine that both projects reach, and through which they reach nothing else."""
    name = docker("network", "create", "flowkv-between").strip()
    yield docker("network", "inspect", name, "--format", "{{(index .IPAM.Config 0).Gateway}}").strip()
    docker("network", "rm", name)


async def test_prompts_here_answers_there(images: None, model_path: Path, address: str) -> None:
    here = Composed("flowkv-here", FILES, ADVERTISE_HOST=address)
    there = Composed("flowkv-there", FILES, ADVERTISE_HOST=address, NATS_HOST=address)
    with here, there:
        here.compose("up", "--detach", "--scale", "decode=0")
        there.compose("run", "--rm", "model")
        writing = ["run", "--rm", "-T", "--no-deps", "--entrypoint", "tee", "keys", "/keys/node/nats_url"]
        there.compose(*writing, stdin=here.nats_url_of("node"))
        there.compose("up", "--detach", "--wait", "--no-deps", "--scale", "decode=2", "decode")
        here.up(decode=0, prefill=2)
        prompts = [list(range(100 + n, 160 + 40 * n)) for n in range(6)]
        async with observe(here.nats_url) as observer:
            transfers = await observer.events("flowkv.v1.event.kv_transferred.>")
            async with httpx.AsyncClient(base_url=here.url, timeout=120) as http:
                done = await run_all(http, prompts, TOKENS)
            await observer.wait_idle()
        check_all(model_path, done)
        assert {event["connector"] for _, event in transfers.events} == {"tcp"}
        assert "by tcp, not by shm" in here.logs("prefill")
