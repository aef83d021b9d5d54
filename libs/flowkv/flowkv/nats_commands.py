"""Look inside: the messages, services and records on NATS, without another tool.

  flowkv nats sub                                what is said, without reports that come all the time
  flowkv nats sub 'flowkv.v1.assignment.*'       which nodes a request got, and why
  flowkv nats sub 'flowkv.v1.event.>' --raw      finished requests, transfers, lending; whole payloads
  flowkv nats ls                                 gateways, schedulers, nodes: what they answered, and errors
  flowkv nats info decode-0                      one of them, or all of one name
  flowkv nats kv                                 the records: of nodes, and of the leader
  flowkv nats kv flowkv_nodes decode-0           one of them; --watch: each change

What the subjects and messages mean: docs/protocol.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from nats.aio.msg import Msg
from nats.js.errors import BucketNotFoundError
from rich.markup import escape

from flowkv.terminal import connected, console, make_parser
from flowkv_common.bus.connection import Bus
from flowkv_common.bus.registry import CALL_TIMEOUT_S, TROUBLE, describe
from flowkv_common.errors import NotFound, Unavailable
from flowkv_common.wire import subjects

EVERYTHING = f"{subjects.DEFAULT_NAMESPACE}.>"
SERVICES = ("gateway", "scheduler", "prefill", "decode", "node")
# They come several times a second, whatever happens, and would hide the rest.
CONSTANT = tuple(
    pattern.removesuffix("*")
    for pattern in (
        subjects.LOAD_ALL,
        subjects.SEEN_ALL,
        subjects.keepalive("*"),
        subjects.SCHEDULER_READY,
    )
)
# Services answer in milliseconds; the last answer is the last after so long a silence.
SILENCE_S = 0.3
# Shown of a list, and of a string: ids, hashes and packed tokens are long, and nobody reads them.
SHOWN_ITEMS = 4
SHOWN_CHARACTERS = 60


def main(argv: list[str]) -> int:
    # `--nats` may stand before the verb, and behind it.
    shared = make_parser("nats", __doc__)
    verbs = shared.add_subparsers(dest="verb", required=True, metavar="sub|ls|info|kv")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=text)
        parser.add_argument("--nats", metavar="URL", default=argparse.SUPPRESS, help="as above")
        return parser

    sub = verb("sub", "print messages as they come")
    sub.add_argument("subject", nargs="?", default=EVERYTHING, help="`*` is one part, `>` all that follow")
    sub.add_argument("--all", action="store_true", help="also reports and keepalives that come all the time")
    sub.add_argument(
        "--grep", default="", metavar="TEXT", help="only messages with this in them, as a request's id"
    )
    sub.add_argument("--count", type=int, default=0, metavar="N", help="end after N messages")
    sub.add_argument("--raw", action="store_true", help="whole payloads, nothing shortened")
    verb("ls", "list the services, with what they have answered")
    verb("info", "what a service says of itself").add_argument(
        "name", help="a name or an id, as `ls` shows it"
    )
    kv = verb("kv", "print records")
    kv.add_argument("bucket", nargs="?", choices=(subjects.NODES_BUCKET, subjects.LEADER_BUCKET))
    kv.add_argument("key", nargs="?", help="of one record; all without")
    kv.add_argument("--watch", action="store_true", help="go on with each change, until Ctrl-C")
    kv.add_argument("--raw", action="store_true", help="whole records")
    options = shared.parse_args(argv)
    verbs_by_name = {"sub": _sub, "ls": _ls, "info": _info, "kv": _kv}

    async def go() -> None:
        async with connected(options) as bus:
            await verbs_by_name[options.verb](bus, options)

    asyncio.run(go())
    return 0


# --- messages ----------------------------------------------------------------------------------------


async def _sub(bus: Bus, options: argparse.Namespace) -> None:
    arrived: asyncio.Queue[Msg] = asyncio.Queue()
    async with await bus.subscribe_raw(options.subject, arrived.put):
        num_shown = 0
        while not options.count or num_shown < options.count:
            msg = await arrived.get()
            is_constant = options.subject == EVERYTHING and bus.plain_name(msg.subject).startswith(CONSTANT)
            if (
                is_constant and not options.all
            ) or options.grep.encode() not in msg.subject.encode() + msg.data:
                continue
            num_shown += 1
            show_message(msg, raw=options.raw)


def show_message(msg: Msg, *, raw: bool) -> None:
    text = msg.data.decode(errors="replace")
    if raw:
        print(f"{msg.subject} {text}", flush=True)
        return
    console().print(f"[dim]{time.strftime('%H:%M:%S')}[/] [bold cyan]{escape(msg.subject)}[/]")
    try:
        show_json(json.loads(text))
    except ValueError:
        console().print(f"  {escape(text)}", style="yellow")


def show_json(value: Any) -> None:
    """On one line, its long parts shortened, in colours."""
    from rich.highlighter import JSONHighlighter
    from rich.text import Text

    line = Text(f"  {json.dumps(shortened(value), ensure_ascii=False)}")
    console().print(JSONHighlighter()(line), soft_wrap=True)


def shortened(value: Any) -> Any:
    """Long lists and strings end in how much more there is."""
    match value:
        case dict():
            return {key: shortened(each) for key, each in value.items()}
        case list() if len(value) > SHOWN_ITEMS:
            return [*map(shortened, value[:SHOWN_ITEMS]), f"... {len(value) - SHOWN_ITEMS} more"]
        case list():
            return [shortened(each) for each in value]
        case str() if len(value) > SHOWN_CHARACTERS and " " not in value:  # no sentence
            return f"{value[: SHOWN_CHARACTERS // 4]}... ({len(value)} characters)"
    return value


# --- services ----------------------------------------------------------------------------------------


async def _ls(bus: Bus, _: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("service", "id", "version", "state"):
        table.add_column(column)
    for column in ("requests", "errors"):
        table.add_column(column, justify="right")
    table.add_column("last error")
    for stats in sorted(await answers(bus, "STATS"), key=lambda one: (one["name"], one["id"])):
        endpoints, metadata = stats["endpoints"], stats["metadata"]
        last_error = next((each["last_error"] for each in endpoints if each.get("last_error")), "")
        table.add_row(
            stats["name"],
            stats["id"],
            stats["version"],
            metadata.get("state") or metadata.get("url", ""),
            str(sum(each["num_requests"] for each in endpoints)),
            str(sum(each["num_errors"] for each in endpoints)),
            escape(last_error),
        )
    console().print(table)


async def _info(bus: Bus, options: argparse.Namespace) -> None:
    found = [one for one in await answers(bus, "INFO") if options.name in (one["name"], one["id"])]
    if not found:
        raise NotFound(f"no service {options.name!r} has answered: `flowkv nats ls` lists those that do")
    for one in found:
        console().print_json(data=one)


async def answers(bus: Bus, verb: str) -> list[dict[str, Any]]:
    """What all services of the namespace answer to a verb of ADR-32. Raises Unavailable if none does."""
    arrived: asyncio.Queue[Msg] = asyncio.Queue()
    found = []
    inbox = bus.nc.new_inbox()
    async with await bus.subscribe_raw(inbox, arrived.put):
        for name in SERVICES:
            subject = f"$SRV.{verb}.{subjects.service_in_namespace(name, bus.namespace)}"
            await bus.nc.publish(subject, b"", reply=inbox)
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    msg = await arrived.get()
                if msg.data:  # else it is NATS itself: nobody listens
                    found.append(json.loads(msg.data))
        except TimeoutError:
            if not found:
                raise Unavailable(
                    f"no service of FlowKV has answered at this NATS in the namespace {bus.namespace!r}"
                ) from None
    return found


# --- records -----------------------------------------------------------------------------------------


async def _kv(bus: Bus, options: argparse.Namespace) -> None:
    buckets = [options.bucket] if options.bucket else [subjects.NODES_BUCKET, subjects.LEADER_BUCKET]
    for bucket in map(bus.full_name, buckets):
        is_found = False
        async for key, value in records(bus, bucket, options.key or ">", goes_on=options.watch):
            is_found = True
            if options.raw:
                print(f"{bucket} {key} {value.decode() if value else ''}", flush=True)
                continue
            console().print(
                f"[dim]{bucket}[/] [bold cyan]{escape(key)}[/]{'' if value else ' [red]is gone[/]'}"
            )
            if value:
                show_json(json.loads(value))
        if options.key and not is_found:
            raise NotFound(f"there is no {options.key!r} in {bucket}")


async def records(
    bus: Bus, bucket: str, keys: str, *, goes_on: bool
) -> AsyncIterator[tuple[str, bytes | None]]:
    """The records of a bucket, then their changes, None for one that is gone. Raises Unavailable."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            entries = await (await bus.jetstream().key_value(bucket)).watch(keys, ignore_deletes=not goes_on)
    except BucketNotFoundError:
        raise Unavailable(f"there is no bucket {bucket}: nothing of FlowKV has run at this NATS") from None
    except TROUBLE as error:
        raise Unavailable(f"the bucket {bucket} can't be read: {describe(error)}") from None
    try:
        while True:
            async with asyncio.timeout(None if goes_on else CALL_TIMEOUT_S):
                entry = await anext(entries)
            if entry is not None:
                yield entry.key, entry.value or None  # what is gone has none
            elif not goes_on:
                return
    finally:
        await entries.stop()  # type: ignore[no-untyped-call]
