"""`python -m flowkv_scheduler`: runs until SIGTERM or SIGINT; ends with 1 when NATS is out of reach."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from flowkv_common import logs
from flowkv_common.config import SchedulerSettings, load
from flowkv_common.errors import Unavailable
from flowkv_scheduler.app import serve


async def main() -> int:
    settings = load(SchedulerSettings, sys.argv[1:])
    logs.setup("scheduler")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await serve(settings, stop)
    except Unavailable as error:
        logging.getLogger(__name__).error("scheduler ended: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
