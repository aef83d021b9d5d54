"""`flowkv COMMAND ...`: one command for all of FlowKV's processes. `python -m flowkv` is the same."""

from __future__ import annotations

import sys

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
        case "-h" | "--help":
            print(USAGE)
        case _:
            print(f"{USAGE}\n\nunknown command {command!r}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
