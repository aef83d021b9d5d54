"""Schedulers as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator

from tests.nats_server import NatsServer

Process = asyncio.subprocess.Process


@contextlib.asynccontextmanager
async def scheduler_process(
    server: NatsServer, *command: str, stderr: int = asyncio.subprocess.DEVNULL
) -> AsyncIterator[Process]:
    """One, killed at the end if it still runs. `command`: what to start instead of the product's."""
    arguments = (*command, server.url) if command else ("-m", "flowkv_scheduler", "--nats-url", server.url)
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=stderr)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        async with asyncio.timeout(5):
            await process.communicate()


async def metrics_url(process: Process) -> str:
    """From the log line that tells it; `process` was started with `stderr=PIPE`."""
    assert process.stderr is not None
    async with asyncio.timeout(20):
        async for line in process.stderr:
            if found := re.search(rb"http://[\d.]+:\d+/metrics", line):
                return found[0].decode()
    raise AssertionError("the scheduler ended before it was ready")
