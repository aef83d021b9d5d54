"""`flowkv COMMAND ...`: one command for all of FlowKV's processes. `python -m flowkv` is the same."""

from __future__ import annotations

import importlib
import logging
import sys

# Command -> its function, whose module is imported when it is asked for, and what it does.
LOOK = {
    "chat": ("flowkv.chat:main", "talk to it, in the terminal"),
    "status": ("flowkv.status:main", "nodes, roles, links, pools, what runs and waits, who leads"),
    "top": ("flowkv.top:main", "the same, live, with the last requests"),
    "trace": ("flowkv.trace:main", "where the time of a request went, moment by moment"),
    "nats": ("flowkv.nats_commands:main", "messages, services and records on the bus, to be read by people"),
}
MEASURE = {
    "bench": ("flowkv.bench.command:main", "load for any OpenAI server; TTFT, TPOT, ITL, goodput"),
    "plan": ("flowkv.clone:plan", "the smallest cluster for a trace, split or not"),
    "record": ("flowkv.clone:record", "write down what a running scheduler hears and decides"),
    "replay": ("flowkv.clone:replay", "decide a recording's requests again, by another policy too"),
}
OPERATE = {
    "doctor": ("flowkv.doctor.command:main", "check what can go wrong, and say what to do"),
    "cordon": ("flowkv.hands:cordon", "a node takes nothing new and keeps what it has"),
    "drain": ("flowkv.hands:drain", "a node takes nothing new and finishes what it has"),
    "resume": ("flowkv.hands:resume", "a drained or cordoned node takes new work again"),
    "lend": ("flowkv.hands:lend", "move a node to the other side: to prefill, to decode, to both"),
    "certs": ("flowkv.certs:main", "a private authority and certificates, to try TLS with"),
    "completion": ("flowkv.completion:main", "the Tab key for bash, zsh and fish"),
}
GROUPS = {
    "Look and try": LOOK,
    "Measure": MEASURE,
    "Operate": OPERATE,
}
SERVICES = {
    "gateway": "the OpenAI-style HTTP API",
    "scheduler": "pairs a prefill and a decode node for each request",
    "prefill": "a node that starts as a prefill node",
    "decode": "a node that starts as a decode node",
    "mixed": "a node that starts with both roles",
}


def names() -> list[str]:
    """Of all commands."""
    return ["up", *SERVICES, *(name for commands in GROUPS.values() for name in commands)]


def usage() -> str:
    lines = ["usage: flowkv COMMAND [options]", "", "Run"]
    lines.append(f"  {'up':<12}a whole cluster on this machine: NATS and all services")
    lines += [f"  {name:<12}{text}" for name, text in SERVICES.items()]
    for title, commands in GROUPS.items():
        lines += ["", title, *(f"  {name:<12}{text}" for name, (_, text) in commands.items())]
    lines += ["", "`flowkv COMMAND --help` tells more. Begin with: flowkv up"]
    return "\n".join(lines)


def main() -> int:
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    sys.argv = [f"flowkv {command}", *arguments]
    # Each command imports what it needs: a gateway loads no torch, whatever else is installed.
    match command:
        case "up":
            from flowkv import up

            return up.main()
        case "gateway":
            from flowkv_gateway.__main__ import main as gateway

            gateway()
        case "scheduler":
            from flowkv_scheduler.__main__ import main as scheduler

            scheduler()
        case "prefill" | "decode" | "mixed":
            from flowkv import node

            node.main(command)
        case "" | "-h" | "--help" | "help":
            print(usage())
        case _:
            for commands in GROUPS.values():
                if command in commands:
                    return _run(commands[command][0], arguments)
            print(f"{usage()}\n\nunknown command {command!r}", file=sys.stderr)
            return 2
    return 0


def _run(function: str, arguments: list[str]) -> int:
    """A command for people: what goes wrong is one line, not a traceback, and no log lines come between."""
    from flowkv_common.errors import CannotStart, FlowKVError

    logging.basicConfig(handlers=[logging.NullHandler()])
    try:
        module, _, name = function.partition(":")
        status: int = getattr(importlib.import_module(module), name)(arguments)
        return status
    except (FlowKVError, CannotStart) as error:
        print(f"flowkv: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `flowkv nats sub | head`
        return 0


if __name__ == "__main__":
    sys.exit(main())
