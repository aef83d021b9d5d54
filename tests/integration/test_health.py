"""The health command against a real service's HTTP side."""

from __future__ import annotations

import asyncio
import sys

import pytest
from local_cluster import free_port
from prometheus_client import CollectorRegistry

from flowkv_common.metrics import serve_http, service_app


async def run_health(*arguments: str) -> tuple[int | None, str]:
    command = [sys.executable, "-m", "flowkv_common.health", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(20):
        said, _ = await process.communicate()
    return process.returncode, said.decode().strip()


@pytest.mark.parametrize(("reason", "expected"), [(None, (0, "well")), ("no link", (1, "503: no link"))])
async def test_health_is_what_the_service_says(reason: str | None, expected: tuple[int, str]) -> None:
    async with serve_http(service_app(CollectorRegistry(), lambda: reason), "127.0.0.1", 0) as port:
        assert await run_health(str(port)) == expected
        assert await run_health(str(port), "/health/live") == (0, "well")


async def test_nobody_there_is_not_well() -> None:
    code, said = await run_health(str(free_port()))
    assert code == 1
    assert "refused" in said
