"""Runs in a container of the compose network, without credentials. Prints what it got, as JSON.

Arguments: the address of a node's data socket, and services whose HTTP side is there for all.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import urllib.request

import nats


async def say_on_nats(url: str) -> str:
    try:
        nc = await nats.connect(url, allow_reconnect=False, connect_timeout=3)
    except Exception as error:
        return f"refused: {error}"
    await nc.publish("flowkv.v1.scheduler.schedule", b"{}")
    await nc.flush()
    return "let in"


def write_into_pool(address: str, token: str) -> str:
    """What the receiver says to a sender who does not know the link's secret."""
    host, _, port = address.rpartition(":")
    hello = json.dumps({"type": "Hello", "token": token, "layout": "", "num_blocks": 1}).encode()
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        sock.sendall(len(hello).to_bytes(4, "big") + hello)
        said = sock.recv(65536)[4:]
        return str(json.loads(said).get("error"))


def open_door(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=3):
            return "open"
    except OSError as error:
        return f"refused: {error}"


async def main(data_address: str) -> None:
    got = {
        "nats": await say_on_nats("nats://nats:4222"),
        "nats with a guess": await say_on_nats("nats://gateway:gateway@nats:4222"),
        "monitoring": open_door("http://nats:8222/connz"),
        "pool": write_into_pool(data_address, "0" * 32),
        "pool without a token": write_into_pool(data_address, ""),
    }
    print(json.dumps(got))


asyncio.run(main(sys.argv[1]))
