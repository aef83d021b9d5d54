"""`python -m flowkv_gateway`: serve HTTP until SIGTERM, then let open answers end."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from flowkv_common.aio import freeze_objects, running, stop_on_signals
from flowkv_common.config import GatewaySettings, listed, load_settings
from flowkv_common.telemetry import process_registry, reason_in_one_line, serve_http, setup_logs
from flowkv_gateway.app import Api
from flowkv_gateway.dispatch import open_dispatch
from flowkv_gateway.http import ApiConnection, TlsContext
from flowkv_gateway.live import LivePage, is_wanted
from flowkv_gateway.models import Model, Models

log = logging.getLogger(__name__)


async def serve(settings: GatewaySettings) -> None:
    """Open the bus, serve the API on it, drain when told to stop. Raises Unavailable as `connect`."""
    stop = stop_on_signals()
    own = [
        await asyncio.to_thread(Model.load, Path(folder), settings, is_first=number == 0)
        for number, folder in enumerate(listed(settings.model_path))
    ]
    tls = TlsContext(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
    freeze_objects()
    async with (
        Models(own) as models,
        open_dispatch(settings, [model.nodes for model in own], stop.set) as dispatch,
    ):
        live = LivePage(dispatch.view_cluster, dispatch.finished, stop) if is_wanted(settings) else None
        api = Api(settings, models, dispatch, process_registry(), stop, live, dispatch.tracing)
        async with (
            running(models.follow(dispatch.cluster, settings), *([live.run()] if live else [])),
            serve_http(
                api.app,
                settings.host,
                settings.port,
                connection=ApiConnection,
                keep_alive_s=settings.keep_alive_s,
                drain_timeout_s=settings.drain_timeout_s,
                tls=tls,
            ) as port,
        ):
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            dispatch.url = f"{'https' if tls else 'http'}://{host}:{port}"
            log.info("serving %s", dispatch.url)
            await stop.wait()
            log.info("stopping: not ready from now on, closed in %g s", settings.shutdown_delay_s)
            await asyncio.sleep(settings.shutdown_delay_s)
            log.info("draining for up to %g s", settings.drain_timeout_s)


def main() -> None:
    setup_logs("gateway")
    with reason_in_one_line("gateway"):
        asyncio.run(serve(load_settings(GatewaySettings, sys.argv[1:])))


if __name__ == "__main__":
    main()
