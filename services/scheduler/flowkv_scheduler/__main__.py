"""`python -m flowkv_scheduler`: runs until SIGTERM or SIGINT; ends with 1 when NATS is out of reach."""

from __future__ import annotations

import asyncio
import sys

from flowkv_common.aio import freeze_objects, stop_on_signals
from flowkv_common.config import SchedulerSettings, load_settings
from flowkv_common.telemetry import reason_in_one_line, setup_logs
from flowkv_scheduler.app import serve


async def run(settings: SchedulerSettings) -> None:
    await serve(settings, stop_on_signals())


def main() -> None:
    settings = load_settings(SchedulerSettings, sys.argv[1:])
    setup_logs("scheduler")
    freeze_objects()
    with reason_in_one_line("scheduler"):
        asyncio.run(run(settings))


if __name__ == "__main__":
    main()
