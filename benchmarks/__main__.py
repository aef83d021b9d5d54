"""`python -m benchmarks NAME [options]` runs a benchmark; without a name, lists them."""

from __future__ import annotations

import importlib
import subprocess
import sys

from benchmarks import BenchmarkFailed
from flowkv.processes import ClusterError
from flowkv_common.errors import CannotStart, FlowKVError

BENCHMARKS = {
    "One engine, one device": {
        "engine": "the bare engine beside transformers, vLLM and llama.cpp, and the floor under them",
        "steps": "single steps on a GPU, with graphs and without, beside the floor",
        "grammar": "decode steps that keep to a JSON schema, beside free ones",
    },
    "Moving KV": {
        "transfer": "what each idea is worth, beside gloo, NIXL and Mooncake; --device cuda: on one GPU",
        "fragmentation": "pools long in use: copies per request, and what prefix caches find, by a trace",
        "overlap": "time to the second token, transfer overlapped or not, beside one node",
    },
    "Over HTTP": {
        "serving": "throughput and latency beside vLLM, and what the services cost",
        "disturbed": "chats beside long prompts: 1P1D, and one node's chunk sizes; --device cuda: on one GPU",
        "speculation": "guessed tokens on and off, where answers copy and where they don't",
        "looking": "what the live page, traces and request lines cost",
        "disconnects": "how long blocks stay held after a client has left",
        "load": "an open loop of load for any cluster that runs",
    },
    "Scheduling": {
        "shift": "load that shifts between prompts and outputs, lending off and on",
        "overload": "three times what the cluster can do, for a minute",
        "burst": "many requests at once, predicted waits beside real ones",
        "bad-days": "bursts, giants, a slow, a lying, a joining node, mixed nodes; beside a steady day",
        "many-hosts": "16 nodes on 4 hosts, which are killed and cut off; each token is checked; needs root",
        "decisions": "what a decision costs, by the number of nodes",
        "sustain": "steps per second that one process of paced nodes keeps on this machine",
        "record": "write down what a running scheduler hears and decides",
        "replay": "decide a recording's requests again, by FlowKV's or another policy",
    },
    "Simulation": {
        "simulate": "policies side by side on one trace",
        "simulate-cells": "all policies on all traces, loads and mixes of nodes",
        "plan": "the smallest cluster that keeps the targets on a trace, split or not",
        "simulated": "how far the simulator is off, beside paced nodes or --real ones",
    },
}
# There is no result: the message is all that its reader needs.
EXPECTED = (
    BenchmarkFailed,
    CannotStart,
    ClusterError,
    FlowKVError,
    TimeoutError,
    subprocess.CalledProcessError,
)


def main(argv: list[str]) -> int:
    names = {name for group in BENCHMARKS.values() for name in group}
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        for title, group in BENCHMARKS.items():
            print(f"\n{title}")
            for name, text in group.items():
                print(f"  {name:<16}{text}")
        return 0
    if argv[0] not in names:
        print(f"unknown benchmark {argv[0]!r}: choose one of {', '.join(sorted(names))}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.{argv[0].replace('-', '_')}")
    try:
        status: int = module.main(argv[1:])
        return status
    except EXPECTED as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
