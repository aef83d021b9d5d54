"""A cluster on one machine: a real nats-server and each service as a process of its own.

Used by `flowkv up` and by the tests. It only starts, watches and stops the processes.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from flowkv.fork_server import ForkServer
from flowkv.processes import ClusterError, Process
from flowkv_common.health import gateway_entry, problem
from flowkv_common.wire.limits import MAX_PAYLOAD_BYTES

NATS_URL_FILE = "nats_url"  # in a cluster's folder while it runs
_EPHEMERAL = range(32_768, 65_536)  # ports that kernels give, where they don't tell which
OLDEST_NATS = (2, 11)  # older servers don't tell watchers of expired keys


def find_nats_server() -> str:
    """`$FLOWKV_NATS_SERVER`, else `nats-server` on PATH, else the one beside this Python.

    Raises ClusterError when there is none, or none that is new enough.
    """
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = os.environ.get("FLOWKV_NATS_SERVER") or shutil.which("nats-server") or str(beside)
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10).stdout
    except OSError as error:
        raise ClusterError(f"no nats-server: {error}; install one or set FLOWKV_NATS_SERVER") from None
    version = re.search(r"v(\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_NATS:
        raise ClusterError(f"{found} is {said.strip() or 'unknown'}, FlowKV needs nats-server 2.11 or newer")
    return found


def free_ports() -> Iterator[int]:
    """Ports that nobody listens on, in random order, each once.

    None of those that the kernel gives to connections and to whoever asks for any port: another process
    would get it before the one that it is for has started, or while that is started again.
    """
    given_by_kernel = _EPHEMERAL
    with contextlib.suppress(OSError):  # only Linux tells
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        given_by_kernel = range(first, last + 1)
    every = range(10_000, 65_536)
    ports = [port for port in every if port not in given_by_kernel] or every
    for port in random.sample(ports, len(ports)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        yield port


def free_port() -> int:
    return next(free_ports())


class Cluster:
    """Starts in the order NATS, schedulers, gateway, nodes; stops in the order gateway, nodes, the rest."""

    def __init__(
        self,
        run_dir: Path,
        model_path: str,
        *,
        nodes: Mapping[str, int],
        num_schedulers: int = 1,
        port: int = 0,
        nats_url: str = "",
        model_name: str = "",
        other_models: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        drain_timeout_s: float = 40.0,
        fork_server: ForkServer | None = None,
        nats_host: str = "127.0.0.1",
    ) -> None:
        """`nodes` counts them per role; `settings` are further `FLOWKV_*` variables for all services.
        `other_models`: name to folder; there are as many nodes of each.

        Of several schedulers one leads, the others stand by. Logs are written to `run_dir`. Nodes are forked
        from `fork_server`, or from one that starts and ends with the cluster if it starts with nodes. NATS
        listens on `nats_host`, an address that its clients reach; none is started if `nats_url` names some
        servers that run.
        """
        self.run_dir = run_dir
        self._free_ports = free_ports()
        self.port = port or next(self._free_ports)
        self.processes: dict[str, Process] = {}
        self._health_ports: dict[str, int] = {}  # of nodes and schedulers
        self._nodes = nodes
        self._num_schedulers = num_schedulers
        self._other_models = dict(other_models or {})
        self._drain_timeout_s = drain_timeout_s
        self._fork_server = fork_server
        self._opened = contextlib.ExitStack()
        self._nats_host = nats_host
        self._nats_port = next(self._free_ports)
        self._starts_nats = not nats_url
        self.nats_url = nats_url or f"nats://{nats_host}:{self._nats_port}"
        num_nodes = max(1, sum(nodes.values())) * (1 + len(self._other_models))
        self._env = {
            **os.environ,
            "FLOWKV_NATS_URL": self.nats_url,
            "FLOWKV_MODEL_PATH": model_path,
            "FLOWKV_MODEL_NAME": model_name,
            # More compute threads than cores on one host cost every node its speed.
            "FLOWKV_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_nodes)),
            **(settings or {}),
        }

    @property
    def url(self) -> str:
        return f"{'https' if self.has_tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def has_tls(self) -> bool:
        return bool(self._env.get("FLOWKV_TLS_CERT"))

    @property
    def needs_key(self) -> bool:
        return bool(self._env.get("FLOWKV_API_KEYS_FILE"))

    def __enter__(self) -> Self:
        try:
            socket.create_server(("127.0.0.1", self.port)).close()
        except OSError as error:  # the answers of what listens there would pass for ours
            taken = f"port {self.port} can't be had: {error.strerror}; choose another with --port"
            raise ClusterError(taken) from None
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self._fork_server is None and any(self._nodes.values()):  # it imports while the others start
                log_path = self.run_dir / "fork-server.log"
                self._fork_server = self._opened.enter_context(ForkServer(log_path, self._env))
            if self._starts_nats:
                self.start_nats()
            for i in range(self._num_schedulers):
                self._start_service(f"scheduler-{i}", "scheduler")
            self.start_gateway()
            models: list[dict[str, str]] = [
                {},
                *({"model_name": name, "model_path": path} for name, path in self._other_models.items()),
            ]
            for role, count in self._nodes.items():
                for i, model in enumerate(model for model in models for _ in range(count)):
                    self.start_node(role, f"{role}-{i}", **model)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def metrics_urls(self) -> dict[str, str]:
        """Where each process that runs shows its metrics, by name; of the gateways the first."""
        others = {name: f"http://127.0.0.1:{port}" for name, port in self._health_ports.items()}
        running = {name for name, process in self.processes.items() if process.is_running}
        urls = {"gateway": self.url, **others}
        return {name: f"{url}/metrics" for name, url in urls.items() if name in running}

    def start_nats(self) -> Process:
        """On the same port and folder every time: a restarted server is the same one."""
        config = self.run_dir / "nats.conf"
        config.write_text(f"max_payload: {MAX_PAYLOAD_BYTES}\n")  # long prompts: no flag has it
        # Where commands in another terminal look (`terminal.find_nats`).
        (self.run_dir / NATS_URL_FILE).write_text(self.nats_url)
        command = [find_nats_server(), "-c", str(config), "-a", self._nats_host, "-p", str(self._nats_port)]
        return self.start_process("nats", [*command, "-js", "-sd", str(self.run_dir / "jetstream")])

    def start_gateway(self, name: str = "gateway", port: int = 0, **settings: str) -> Process:
        """One more gateway, or the first one; `settings` are flags of its own."""
        if self._other_models:
            folders = [self._env["FLOWKV_MODEL_PATH"], *self._other_models.values()]
            settings = {"model_path": ",".join(folders), **settings}
        return self._start_service(name, "gateway", port=str(port or self.port), **settings)

    def start_node(self, role: str, name: str, **settings: str) -> Process:
        """A node that is called `name` on the bus too; `settings` are flags of its own."""
        arguments = self._arguments(name, role, node_id=name, **settings)
        if self._fork_server is None or not self._fork_server.suits(self._env):
            return self.start_process(name, [sys.executable, "-m", "flowkv", *arguments])
        process = self._fork_server.fork(name, arguments, self._env, self.run_dir / f"{name}.log")
        self.processes[name] = process
        return process

    def start_process(self, name: str, command: list[str]) -> Process:
        """Any program, in the environment of all services. `name` says when it is stopped."""
        process = Process.start(name, command, self._env, self.run_dir / f"{name}.log")
        self.processes[name] = process
        return process

    def _start_service(self, name: str, service: str, **settings: str) -> Process:
        return self.start_process(
            name, [sys.executable, "-m", "flowkv", *self._arguments(name, service, **settings)]
        )

    def _arguments(self, name: str, service: str, **settings: str) -> list[str]:
        """Those of `flowkv` for this service."""
        if service != "gateway":  # its health is on the API's port
            self._health_ports[name] = port = next(self._free_ports)
            settings["http_port"] = str(port)
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
        return [service, *flags]

    def wait_ready(self, timeout_s: float, look: Callable[[], None] = lambda: None) -> None:
        """Until all nodes and schedulers are ready and requests can be served; meanwhile `look` is called.

        Raises ClusterError when a process ends.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            for process in self.processes.values():
                if not process.is_running:
                    raise ClusterError(process.why_ended())
            look()
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.log_tail(8)}" for p in self.processes.values())
                raise ClusterError(f"not ready after {timeout_s} s\n{logs}")
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """The gateway is ready as soon as one pair of nodes could serve; here all that run must be ready."""
        ports = [port for name, port in self._health_ports.items() if self.processes[name].is_running]
        if any(problem(port, "/health/ready") for port in ports):
            return False
        return problem(self.port, "/health/ready", gateway_entry(self._env)) is None

    def stop(self) -> None:
        """Drain and end everything, so that requests finish before what they need goes away."""
        for _ in self.stopping():
            pass

    def stopping(self) -> Iterator[str]:
        """As `stop`; gives the name of each process before it is waited for."""
        for kind in ("gateway", "nodes", "prefill", "decode", "mixed", "scheduler", "nats"):
            group = [p for p in self.processes.values() if p.name.startswith(kind)]
            for process in group:
                process.send_signal(signal.SIGTERM)
            for process in group:
                if process.is_running:
                    yield process.name
                process.stop(self._drain_timeout_s)
        self._opened.close()
        shutil.rmtree(self.run_dir / "jetstream", ignore_errors=True)
        (self.run_dir / NATS_URL_FILE).unlink(missing_ok=True)
