"""A rollout of this version over an older one, under load: old and new nodes serve requests together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flowkv.local_cluster import free_port
from flowkv.processes import Process
from flowkv_common.wire import subjects
from tests.e2e.load import Streamed, stream_completion, wait_healthy
from tests.e2e.observer import observe
from tests.e2e.prompts import make_prompts
from tests.e2e.test_identity import TOKENS, check_all, tiny_with_tokenizer
from tests.nats_server import NatsServer
from tests.tiny_models import VOCAB_SIZE

ROOT = Path(__file__).resolve().parents[2]
# The last one that knows neither protocol numbers, nor several models, nor namespaces.
OLDER = "0501964"
PACKAGES = ("flowkv", "flowkv_common", "flowkv_engine", "flowkv_node")
SERVICES = ("gateway", "scheduler", "prefill", "decode")
NUM_WORKERS = 4
READY_S = 120.0


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """The older version's sources, from this clone's history."""
    archive = tmp_path / "older.tar"
    done = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--output", str(archive), OLDER], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this clone does not have {OLDER}: {done.stderr.strip()}")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path / "older", filter="data")
    return tmp_path / "older"


def search_path(root: Path) -> str:
    folders = [root / "libs" / name for name in PACKAGES] + [root / "services" / name for name in SERVICES]
    return os.pathsep.join(map(str, folders))


class System:
    """Services of two versions at one NATS, each a process of its own."""

    def __init__(self, folder: Path, nats_url: str, model: Path) -> None:
        self._folder = folder
        self._env = {
            **os.environ,
            "FLOWKV_NATS_URL": nats_url,
            "FLOWKV_MODEL_PATH": str(model),
            "FLOWKV_MODEL_NAME": "tiny",
            "FLOWKV_NUM_THREADS": "1",
        }
        self.processes: dict[str, Process] = {}

    def start(self, service: str, name: str, root: Path, **settings: str) -> None:
        """From the sources in `root`. Nodes are called `name` on the bus, too."""
        if service in ("prefill", "decode"):
            settings |= {"node_id": name, "kv_cache_bytes": str(64 * 1024 * 1024), "block_size": "8"}
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
        command = [sys.executable, "-m", "flowkv", service, *flags]
        env = {**self._env, "PYTHONPATH": search_path(root)}
        self.processes[name] = Process.start(name, command, env, self._folder / f"{name}.log")

    async def stop(self, *names: str) -> None:
        """By SIGTERM: they drain."""
        processes = [self.processes.pop(name) for name in names]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            await asyncio.to_thread(process.stop, 40)

    def kill(self) -> None:
        for process in self.processes.values():
            process.kill()


@contextlib.contextmanager
def system(folder: Path, nats_url: str, model: Path) -> Iterator[System]:
    started = System(folder, nats_url, model)
    try:
        yield started
    finally:
        started.kill()


@pytest.mark.full
async def test_a_rollout_over_the_older_version_under_load(
    tmp_path: Path, older: Path, model_path: Path, nats_server: NatsServer
) -> None:
    """2P2D, in the order of docs/operations.md. No request fails, no token is wrong."""
    model = tiny_with_tokenizer(tmp_path / "model", "llama", model_path)
    done: list[Streamed] = []
    is_over = asyncio.Event()
    ports = {"old": free_port(), "new": free_port()}
    asked = "old"

    async def keep_asking(number: int) -> None:
        for prompt in make_prompts(vocab_size=VOCAB_SIZE, longest=200, seed=number) * 100:
            if is_over.is_set():
                return
            http = clients[asked]
            done.append(await stream_completion(http, prompt, max_tokens=TOKENS, model="tiny"))

    async def more(num: int) -> None:
        wanted = len(done) + num
        async with asyncio.timeout(READY_S):
            while len(done) < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async with contextlib.AsyncExitStack() as opened:
        services = opened.enter_context(system(tmp_path, nats_server.url, model))
        observer = await opened.enter_async_context(observe(nats_server.url))
        moved = await observer.events(subjects.event("kv_transferred", ">"))
        finished = await observer.events(subjects.event("request_finished", "*"))
        clients = {
            which: await opened.enter_async_context(
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120)
            )
            for which, port in ports.items()
        }
        services.start("scheduler", "scheduler-old", older)
        services.start("gateway", "gateway-old", older, port=str(ports["old"]))
        for role in ("prefill", "decode"):
            for number in range(2):
                services.start(role, f"{role}-old-{number}", older)
        for role in ("prefill", "decode"):
            for number in range(2):
                await observer.wait_linked(f"{role}-old-{number}", 3, READY_S)
        await wait_healthy(clients["old"], READY_S)
        async with asyncio.TaskGroup() as workers:
            for number in range(NUM_WORKERS):
                workers.create_task(keep_asking(number))
            await more(10)
            for role in ("decode", "prefill"):
                for number in range(2):
                    services.start(role, f"{role}-new-{number}", ROOT)
                for number in range(2):
                    await observer.wait_linked(f"{role}-new-{number}", 5, READY_S)
                await more(10)
                await services.stop(f"{role}-old-0", f"{role}-old-1")
                await more(10)
            services.start("scheduler", "scheduler-new", ROOT)
            await services.stop("scheduler-old")
            await more(10)
            services.start("gateway", "gateway-new", ROOT, port=str(ports["new"]))
            await wait_healthy(clients["new"], READY_S)
            asked = "new"
            await more(NUM_WORKERS)
            await services.stop("gateway-old")
            await more(10)
            is_over.set()
        ended = await finished.wait_for_all(len(done))

    def version(node_id: str) -> str:
        return node_id.split("-")[1]

    pairs = {(version(event["prefill_node"]), version(event["decode_node"])) for _, event in moved.events}
    num_retried = sum(event["attempts"] > 1 for event in ended)
    print(f"{len(done)} requests, {num_retried} of them retried, KV went {sorted(pairs)}")
    check_all(model, done)
    assert {("old", "old"), ("old", "new"), ("new", "new")} <= pairs
