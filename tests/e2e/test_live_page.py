"""The live page in a browser, beside a real cluster: it shows what the bus says, whatever happens.

`PICTURES=docs/pictures python -m pytest tests/e2e/test_live_page.py` takes those of docs/look-inside.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from flowkv.local_cluster import Cluster
from flowkv_common.cluster_view import ClusterView, until_complete, viewing
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import Accepted, FindFinished, FinishedRequests
from flowkv_common.wire.nodes import SetPrefillCap
from tests.e2e.conftest import StartCluster
from tests.e2e.load import stream_completion
from tests.e2e.observer import Observer, observe

pytestmark = pytest.mark.full

PATIENCE_S = 60.0
NUM_REQUESTS = 200
NUM_OPEN = 8
HOW_TO = (
    "needs a browser: `pip install playwright axe-playwright-python`, and Chromium on PATH (`apt-get install "
    "chromium`)"
)

READ_CARD = """([side, id]) => {
  const cards = [...document.querySelectorAll(`#${side} > li`)];
  const card = cards.find((one) => one.querySelector("b").textContent === id);
  if (!card) return {};
  const labels = [...card.querySelectorAll("[role=img]")].map((one) => one.getAttribute("aria-label"));
  const [batch, pool, budget] = labels;
  return { state: card.querySelector(".top span").textContent, batch, pool, budget };
}"""

Page = Any  # of playwright, which is not among the project's dependencies


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        playwright = importlib.import_module("playwright.async_api")
        importlib.import_module("axe_playwright_python.async_playwright")
    except ImportError:
        pytest.skip(HOW_TO)
    if chromium is None:
        pytest.skip(HOW_TO)
    async with playwright.async_playwright() as started:
        opened = await started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        await opened.close()


class Opened:
    """A page, and what went wrong on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda line: self.errors.extend([line.text] if line.type == "error" else []))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    async def shows(self, expression: str) -> None:
        """Until this JavaScript is true. Raises TimeoutError."""
        async with asyncio.timeout(PATIENCE_S):  # the page lets no script evaluate a text, as waits would
            while not await self.page.evaluate(expression):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def card(self, side: str, node_id: str) -> dict[str, str]:
        """What is written of a node, and what a screen reader reads of its pictures."""
        found: dict[str, str] = await self.page.evaluate(
            READ_CARD,
            [side, node_id],
        )
        return found

    async def serious_findings(self) -> list[str]:
        axe = importlib.import_module("axe_playwright_python.async_playwright").Axe()
        found = (await axe.run(self.page)).response["violations"]
        return [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]

    async def take_picture(self, name: str) -> None:
        if folder := os.environ.get("PICTURES"):
            await self.page.screenshot(path=Path(folder) / f"{name}.png")


@contextlib.asynccontextmanager
async def opened(chromium: Any, url: str, *, width: int = 1280, dark: bool = False) -> AsyncIterator[Opened]:
    scheme = "dark" if dark else "light"
    context = await chromium.new_context(viewport={"width": width, "height": 860}, color_scheme=scheme)
    page = Opened(await context.new_page())
    await page.page.goto(url)
    yield page
    await context.close()


async def test_the_page_shows_what_the_bus_says(start_cluster: StartCluster) -> None:
    settings = {"FLOWKV_LENDING": "false", "FLOWKV_KV_CACHE_BYTES": str(64 << 20)}
    cluster = start_cluster(prefill=2, decode=2, settings=settings)
    async with (
        browser() as chromium,
        observe(cluster.nats_url) as observer,
        viewing(observer.bus) as view,
        httpx.AsyncClient(base_url=cluster.url, timeout=PATIENCE_S) as http,
        opened(chromium, cluster.url) as page,
    ):
        await until_complete(view, PATIENCE_S)
        await page.shows("document.querySelectorAll('#prefill > li, #decode > li').length === 4")
        await check_nodes(page, view)
        await check_a_prompt(page)
        await check_requests(page, http, observer)
        await check_lending(page, observer, view)
        await check_every_size(chromium, cluster.url)
        await check_a_kill(page, cluster)
        assert page.errors == []
        assert page.hosts == {urlsplit(cluster.url).netloc}


async def check_nodes(page: Opened, view: ClusterView) -> None:
    for node in view.nodes():
        report = node.report
        assert report is not None
        [side] = node.serves
        card = await page.card(side, node.node_id)
        assert card["state"] == node.state == "ready"
        assert card["batch"] == f"batch: {report.num_running} of {report.max_num_seqs}"
        budget = f"{report.max_prefill_tokens_per_step} of {node.descriptor.token_budget} tokens"
        assert card["budget"] == f"prefill chunk budget: {budget}"
        assert card["pool"].endswith(f"of {report.blocks.total} blocks")
    assert view.leader is not None
    await page.shows(f"document.getElementById('leader').textContent === '{view.leader.id} leads'")


async def check_a_prompt(page: Opened) -> None:
    await page.page.get_by_label("What do you ask?").fill("What is the capital of France?")
    await page.page.get_by_role("button", name="Send").click()
    await page.shows("!document.getElementById('its-line').hidden")
    assert "Paris" in await page.page.inner_text("#answer")
    await page.page.get_by_role("button", name="Where its time went").click()
    await page.shows("document.querySelectorAll('#detail-body tbody tr').length > 4")
    shown = await page.page.inner_text("#detail-body")
    assert "schedule" in shown
    assert "Why this pair" in shown
    assert await page.serious_findings() == []
    await page.take_picture("live-page-request")
    await page.page.keyboard.press("Escape")
    await page.shows("!document.getElementById('detail').open")


async def check_requests(page: Opened, http: httpx.AsyncClient, observer: Observer) -> None:
    """All of them run; the page has the last hundred, as the gateway remembers them."""
    numbers = iter(range(NUM_REQUESTS))

    async def ask() -> None:
        for number in numbers:
            answer = await stream_completion(http, [100 + number] * (5 + number % 40), max_tokens=4)
            assert answer.saw_done

    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_OPEN):
            tasks.create_task(ask())
        await page.shows("document.querySelectorAll('#requests .row').length >= 60")
        await page.take_picture("live-page")
    await page.shows("document.querySelectorAll('#requests .row').length === 100")
    told = await observer.bus.request(
        subjects.FINISHED, FindFinished(last=1), FinishedRequests, timeout_s=PATIENCE_S
    )
    newest = told.requests[0]
    await page.shows(f"document.querySelector('#requests .row').dataset.id === '{newest.request_id}'")
    await page.page.focus("#requests .row")
    await page.page.keyboard.press("ArrowDown")
    await page.page.keyboard.press("ArrowUp")
    await page.page.keyboard.press("Enter")
    await page.shows(f"document.getElementById('detail-title').textContent === '{newest.request_id}'")
    await page.shows("document.querySelectorAll('#detail-body tbody tr').length > 4")
    await page.page.keyboard.press("Escape")


async def check_lending(page: Opened, observer: Observer, view: ClusterView) -> None:
    [node] = [node for node in view.nodes() if node.node_id == "decode-1"]
    budget = node.descriptor.token_budget // 2
    assert node.report is not None
    order = SetPrefillCap(
        node=node.descriptor.node,
        epoch=node.report.epoch,
        max_prefill_tokens_per_step=budget,
        reason="the test says so",
    )
    await observer.bus.request(
        subjects.at(subjects.NODE_CAP, "decode-1"), order, Accepted, timeout_s=PATIENCE_S
    )
    await page.shows("[...document.querySelectorAll('#prefill b')].some((b) => b.textContent === 'decode-1')")
    for side in ("prefill", "decode"):
        card = await page.card(side, "decode-1")
        assert card["state"] == "lent, a decode node"
        assert card["budget"] == f"prefill chunk budget: {budget} of {node.descriptor.token_budget} tokens"


async def check_every_size(chromium: Any, url: str) -> None:
    for name, width, dark in (("", 1280, False), ("-dark", 1280, True), ("-small", 390, False)):
        async with opened(chromium, url, width=width, dark=dark) as page:
            await page.shows("document.querySelectorAll('#requests .row').length === 100")
            await page.shows("document.querySelectorAll('#prefill > li').length === 3")
            assert await page.page.evaluate("document.documentElement.scrollWidth") <= width
            assert await page.serious_findings() == []
            assert page.errors == []
            if name:
                await page.take_picture(f"live-page{name}")


async def check_a_kill(page: Opened, cluster: Cluster) -> None:
    """What is killed is not ready for another second."""
    cluster.processes["prefill-1"].kill()

    state = "[...document.querySelectorAll('#prefill li')].find((li) => li.title.startsWith('prefill-1'))"
    await page.shows(f"!({state})?.querySelector('.top span')?.textContent.match(/ready/)")
