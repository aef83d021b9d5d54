"""Check what can go wrong, and say what to do: NATS, nodes and their pairs, links, clocks, this host.

  flowkv doctor                          of the `flowkv up` in this folder; ends with real requests
  flowkv doctor --model /path/to/folder  also the files of a model (else FLOWKV_MODEL_PATH)
  flowkv doctor --json >report.json      to paste into a bug report: no passwords and no keys are in it

It ends with 0 if nothing is bad.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from flowkv.doctor import Finding, bad
from flowkv.doctor.bus import START_IT, ask_server, check_buckets, check_rights, check_server
from flowkv.doctor.cluster import check_links, check_nodes, check_services
from flowkv.doctor.host import check_clocks, check_host, describe_host, seconds_ahead_of
from flowkv.doctor.remote import prove_remote_prefill, try_pairs
from flowkv.terminal import connected, console, find_nats, make_parser, write_json
from flowkv_common.bus.access import Access
from flowkv_common.bus.connection import Bus
from flowkv_common.cluster_view import ClusterView, until_complete, viewing
from flowkv_common.config import OTHER_VARIABLES
from flowkv_common.errors import FlowKVError
from flowkv_common.wire import subjects

CACHE = "FLOWKV_CACHE"
MARKS = {"good": "[green]ok [/]", "look": "[yellow]look[/]", "bad": "[bold red]BAD[/]"}
# A frozen node's record stays for 6 s: whoever reports, does so several times within this.
PATIENCE_S = 3.0


def main(argv: list[str]) -> int:
    parser = make_parser("doctor", __doc__)
    parser.add_argument("--url", default="", help="of the API; else as the gateway tells")
    parser.add_argument("--key", default="", help="for the API; else the first of FLOWKV_API_KEYS_FILE")
    text = "a folder or a GGUF file to check"
    parser.add_argument("--model", default=os.environ.get("FLOWKV_MODEL_PATH", ""), help=text)
    parser.add_argument("--no-request", action="store_true", help="only look, send no request")
    parser.add_argument("--json", action="store_true", help="the report for a bug report, or a script")
    options = parser.parse_args(argv)
    findings = list(check_host(options.model, _cache()))
    findings += asyncio.run(_check_cluster(options))
    num_bad = sum(one.level == "bad" for one in findings)
    if options.json:
        write_json({"host": describe_host(), "findings": findings})
        return 1 if num_bad else 0
    for line in report(findings):
        console().print(line, soft_wrap=True)
    return 1 if num_bad else 0


def _cache() -> Path:
    """As the engine has it, which is not loaded here."""
    assert CACHE in OTHER_VARIABLES
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "flowkv").expanduser()


async def _check_cluster(options: argparse.Namespace) -> list[Finding]:
    access = Access(find_nats(options.nats))
    servers = access.read_servers()
    try:
        server = await asyncio.to_thread(ask_server, access)
    except (OSError, ValueError) as error:
        return [bad("NATS", f"nobody answers at {servers.where}: {error}", START_IT)]
    findings = list(check_server(server))
    if server.refusal or not server.info.get("jetstream"):
        return findings  # there is nothing to be seen
    try:
        async with connected(options) as bus, viewing(bus) as view:
            await until_complete(view, PATIENCE_S)
            findings += check_rights(servers.logins[0].user, bus.nc.last_error)
            findings += await check_buckets(bus)
            findings += check_services(view)
            findings += check_nodes(view, server.max_payload)
            findings += check_links(view)
            findings += await _check_clocks(bus, view)
            if not options.no_request and view.pairs() and view.leader:
                findings += await prove_remote_prefill(view, options.url, options.key)
                findings += await try_pairs(view, options.url, options.key)
    except FlowKVError as error:
        findings.append(bad("NATS", error.message, START_IT))
    return findings


async def _check_clocks(bus: Bus, view: ClusterView) -> list[Finding]:
    urls = {node.node_id: node.descriptor.metrics_url for node in view.nodes() if node.descriptor.metrics_url}
    others = {}
    with contextlib.suppress(TimeoutError, ValueError, LookupError):
        async with asyncio.timeout(PATIENCE_S):
            subject = f"$JS.API.STREAM.INFO.KV_{bus.full_name(subjects.NODES_BUCKET)}"
            answer = await bus.nc.request(subject, b"", timeout=None)  # type: ignore[arg-type]
            others["the NATS server"] = seconds_ahead_of(json.loads(answer.data)["ts"])
    return await asyncio.to_thread(lambda: list(check_clocks(urls, others)))


def report(findings: Sequence[Finding]) -> Iterator[str]:
    """What was found, the worst last: a terminal shows the end."""
    rank = list(MARKS)
    for one in sorted(findings, key=lambda one: rank.index(one.level)):
        yield f"{MARKS[one.level]} [bold]{one.about}[/]: {escape(one.said)}"
        if one.mend:
            yield f"     [cyan]do:[/] {escape(one.mend)}"
    num_bad = sum(one.level == "bad" for one in findings)
    yield f"[bold red]{num_bad} things are bad[/]" if num_bad else "[green]nothing is bad[/]"
