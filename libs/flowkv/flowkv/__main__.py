"""`flowkv SERVICE ...`: one command for all of FlowKV's processes. `python -m flowkv` is the same."""

from __future__ import annotations

import sys
from collections.abc import Callable

USAGE = """\
usage: flowkv COMMAND [--setting VALUE ...]

  up         a whole cluster on this machine: NATS and all services
  gateway    the OpenAI-style HTTP API
  scheduler  pairs a prefill and a decode node for each request
  prefill    a node that starts as a prefill node
  decode     a node that starts as a decode node
  mixed      a node that starts with both roles

`flowkv COMMAND --help` lists what a command can be told. Each setting is also read from the environment."""


def main() -> int:
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command not in COMMANDS:
        if command in ("-h", "--help"):
            print(USAGE)
            return 0
        print(f"{USAGE}\n\nunknown command {command!r}", file=sys.stderr)
        return 2
    sys.argv = [f"flowkv {command}", *arguments]
    return COMMANDS[command]() or 0


# Each imports what it runs: a gateway loads no torch, whatever else is installed.
def _up() -> int:
    from flowkv.up import main

    return main()


def _gateway() -> None:
    from flowkv_gateway.__main__ import main

    main()


def _scheduler() -> None:
    from flowkv_scheduler.__main__ import main

    main()


def _node(role: str) -> Callable[[], None]:
    def run() -> None:
        from flowkv.node import main

        main(role)

    return run


COMMANDS: dict[str, Callable[[], int | None]] = {
    "up": _up,
    "gateway": _gateway,
    "scheduler": _scheduler,
    "prefill": _node("prefill"),
    "decode": _node("decode"),
    "mixed": _node("mixed"),
}

if __name__ == "__main__":
    sys.exit(main())
