"""`python -m flowkv_scheduler`: runs until SIGTERM or SIGINT; ends with 1 when NATS is out of reach."""

from __future__ import annotations

import asyncio
import signal
import sys

from flowkv_common import logs
from flowkv_common.config import SchedulerSettings, load
from flowkv_common.ending import reason_in_one_line
from flowkv_scheduler.app import serve


async def main() -> None:
    settings = load(SchedulerSettings, sys.argv[1:])
    logs.setup("scheduler")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with reason_in_one_line("scheduler"):
        await serve(settings, stop)


if __name__ == "__main__":
    asyncio.run(main())
