"""`flowkv up`: the whole cluster on this machine, without Docker. Ctrl-C drains it, nothing is left."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from flowkv.fork_server import ForkServer
from flowkv.local_cluster import Cluster
from flowkv.processes import ClusterError
from flowkv.progress import Log, StartProgress, request_lines
from flowkv_engine.engine.fetch import served_name

READY_TIMEOUT_S = 300.0
NODES = ("prefill", "decode", "mixed")


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # A shell starts what runs in its background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_dir = Path(".run", str(options.port)).resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        with contextlib.ExitStack() as opened:
            with ForkServer(run_dir / "fork-server.log") as fork_server:  # it imports meanwhile
                _say(f"preparing {'the model' if len(options.model) == 1 else 'the models'}")
                models = {served_name(spec or None): _prepare_model(spec) for spec in options.model}
                (model_name, model_path), *others = models.items()
                nodes = {"prefill": options.prefill, "decode": options.decode, "mixed": options.mixed}
                _say(f"starting {', '.join(f'{count} {role}' for role, count in nodes.items() if count)}")
                cluster = Cluster(
                    run_dir,
                    model_path,
                    nodes=nodes,
                    num_schedulers=options.scheduler,
                    port=options.port,
                    model_name=model_name,
                    other_models=dict(others),
                    fork_server=fork_server,
                )
                opened.enter_context(cluster)
            nodes_started = [name for name in cluster.processes if name.startswith(NODES)]
            with StartProgress(cluster.processes, nodes_started, _say, sys.stderr.isatty()) as progress:
                cluster.wait_ready(READY_TIMEOUT_S, progress.look)
            _say(f"ready after {time.monotonic() - began:.1f} s, logs in {cluster.run_dir}")
            print(_welcome(cluster, list(models)), flush=True)
            try:
                watch(cluster)
            finally:
                _drain(cluster)
            return 0
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        _say("stopped")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flowkv up",
        description="A whole cluster on this machine. Its logs are written to the folder .run.",
        epilog="FLOWKV_ variables reach all services; docs/settings.md lists them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--prefill", type=int, default=1, help="number of prefill nodes")
    parser.add_argument("--decode", type=int, default=1, help="number of decode nodes")
    parser.add_argument("--mixed", type=int, default=0, help="number of nodes with both roles")
    parser.add_argument("--scheduler", type=int, default=1, help="one leads, the others stand by")
    help = "a folder, a GGUF file, gemma-3-270m or a hub id; empty: SmolLM2-135M-Instruct. Several times: "
    help += "several models, with so many nodes of each"
    parser.add_argument("--model", action="append", help=help)
    parser.add_argument("--port", type=int, default=8000, help="port of the API")
    options = parser.parse_args()
    options.model = options.model or [""]
    if options.mixed == 0 and (options.prefill == 0 or options.decode == 0):
        parser.error("one prefill and one decode node are needed, or one mixed node")
    if options.scheduler < 1:
        parser.error("one scheduler is needed")
    return options


def _prepare_model(spec: str) -> str:
    command = [sys.executable, "-m", "flowkv_engine.engine.fetch"]
    done = subprocess.run([*command, "--model", spec] if spec else command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ClusterError("the model could not be prepared, see above")
    return done.stdout.strip().splitlines()[-1]


def _welcome(cluster: Cluster, models: list[str]) -> str:
    which = f'"model": "{models[-1]}", ' if len(models) > 1 else ""
    body = f'{{{which}"messages": [{{"role": "user", "content": "What is the capital of France?"}}], '
    body += '"temperature": 0, "stream": true}'
    header = "-H 'content-type: application/json'"
    if cluster.needs_key:
        header += " -H 'authorization: Bearer KEY'"
    if cluster.has_tls:
        header += " --cacert CERTIFICATE"
    curl = f"curl -N {cluster.url}/v1/chat/completions {header} -d {shlex.quote(body)}"
    metrics = "\n".join(f"  {url}  {name}" for name, url in cluster.metrics_urls().items())
    return (
        f"\nFlowKV is up at {cluster.url}\n\n  {curl}\n\nMetrics:\n{metrics}\n\n"
        f"Look at it:   flowkv status, flowkv top (in this folder)\n"
        f"Look inside:  nats --server {cluster.nats_url} sub 'flowkv.>'\nStop it:      Ctrl-C\n"
    )


def watch(cluster: Cluster) -> None:
    """Until Ctrl-C: a line per request. A node or a scheduler may end while another runs.

    Raises ClusterError with the reason when the gateway, NATS, the last node or the last scheduler has ended.
    """
    with contextlib.closing(Log(cluster.processes["gateway"])) as requests:
        while True:
            time.sleep(0.5)
            for line in request_lines(requests):
                print(line, flush=True)
            for process in [p for p in cluster.processes.values() if not p.is_running]:
                del cluster.processes[process.name]
                kinds = next(
                    (kinds for kinds in (NODES, ("scheduler",)) if process.name.startswith(kinds)), ()
                )
                if not any(name.startswith(kinds) for name in cluster.processes):
                    raise ClusterError(process.why_ended())
                _say(f"{process.why_ended()}\n[up] the others go on")


def _drain(cluster: Cluster) -> None:
    _say("draining: open answers may end, Ctrl-C again cuts them off")
    try:
        for name in cluster.stopping():
            _say(f"draining {name}")
    except KeyboardInterrupt:
        for process in cluster.processes.values():
            process.kill()


def _say(text: str) -> None:
    print(f"[up] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
