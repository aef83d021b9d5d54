"""What `flowkv top` draws of a real cluster that has work.

`PICTURES=docs/pictures python -m pytest tests/e2e/test_top.py` takes the picture of docs/getting-started.md.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
from pathlib import Path

import httpx
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME

from flowkv.local_cluster import Cluster
from flowkv.top import screen
from flowkv_common.aio import running
from flowkv_common.bus.connection import connect
from flowkv_common.cluster_view import until_complete, viewing
from tests.waiting import until

WIDTH, HEIGHT = 160, 26
NUM_ENDED = 12
TIMEOUT_S = 60.0
# rich asks another host for these. A reader's own do, too.
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


async def test_top_shows_what_runs_and_what_has_run(cluster: Cluster) -> None:
    num_asked = 0

    async def keep_asking(http: httpx.AsyncClient) -> None:
        nonlocal num_asked
        while True:
            num_asked += 1
            body = {"prompt": f"{num_asked} " + "tell a story. " * (num_asked % 5 * 10 + 1), "max_tokens": 24}
            assert (await http.post("/v1/completions", json=body)).status_code == 200

    async with (
        connect(cluster.nats_url, name="test") as bus,
        viewing(bus) as view,
        httpx.AsyncClient(base_url=cluster.url, timeout=TIMEOUT_S) as http,
    ):
        await until_complete(view, TIMEOUT_S)
        async with running(*(keep_asking(http) for _ in range(4))):

            def decodes() -> bool:
                return any(node.report and node.report.num_running for node in view.nodes())

            await until(lambda: len(view.finished) >= NUM_ENDED and decodes(), TIMEOUT_S)
            paper = Console(width=WIDTH, record=True, file=io.StringIO(), highlight=False)
            paper.print(screen(view, HEIGHT))
        ended = [one.request_id for one in view.finished]
    text = paper.export_text(clear=False)
    assert re.search(r"^ *prefill-0 +prefill +ready", text, re.M)
    assert re.search(r"^ *decode-0 +decode +ready +[1-4]/64", text, re.M)
    assert re.search(r"[1-9]\d* tokens/s, [1-4] decoding", text)
    shown = re.findall(r"^ *(cmpl-\w{10,})", text, re.M)
    assert len(shown) >= 5
    assert all(any(one.startswith(start) for one in ended) for start in shown)
    if folder := os.environ.get("PICTURES"):
        picture = FONTS.sub("", paper.export_svg(title="flowkv top", theme=SVG_EXPORT_THEME))
        await asyncio.to_thread((Path(folder) / "top.svg").write_text, picture)
