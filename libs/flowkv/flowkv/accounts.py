"""Users of a NATS server that others can reach: one per service, with what it may publish and subscribe to.

`python -m flowkv.accounts FOLDER` writes `FOLDER/nats/nats.conf` and, per user, `FOLDER/<user>/nats_url`,
which only that user's services need. Passwords are made once and kept; permissions are written each time, so
that they follow the code.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from flowkv_common.wire import subjects
from flowkv_common.wire.messages import MAX_PAYLOAD_BYTES


class Rights(NamedTuple):
    """Subjects that a user may publish on and subscribe to, answers to requests apart."""

    publish: list[str]
    subscribe: list[str]


def _reading(bucket: str) -> list[str]:
    """What a watch on a bucket asks of JetStream; the first service to come makes the bucket."""
    api, stream = "$JS.API", f"KV_{bucket}"
    verbs = ["STREAM.CREATE", "STREAM.INFO", "STREAM.MSG.GET", "CONSUMER.CREATE"]
    nested = ["DIRECT.GET", "CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.DELETE"]
    asked = [f"{api}.{verb}.{stream}" for verb in verbs] + [f"{api}.{verb}.{stream}.>" for verb in nested]
    return [f"{api}.INFO", *asked, f"$JS.ACK.{stream}.>", f"$JS.FC.{stream}.>"]


_FOUND_BY_ALL = "$SRV.>"
_ANSWERS = 8  # to one question, of one process: a node is three services, each of which answers a ping
_ANY_NODE = "*"

RIGHTS: Mapping[str, Rights] = {
    "gateway": Rights(
        publish=[
            subjects.SCHEDULE,
            subjects.SCHEDULER_READY,
            subjects.at(subjects.PREFILL_RUN, _ANY_NODE),
            subjects.at(subjects.DECODE_RESUME, _ANY_NODE),
            subjects.at(subjects.NODE_CANCEL, _ANY_NODE),
            subjects.seen("*"),
            subjects.event("request_finished", "*"),
            "$SRV.INFO.*",
            *_reading(subjects.NODES_BUCKET),
        ],
        subscribe=[
            subjects.LOAD_ALL,
            subjects.tokens("*"),
            subjects.keepalive("*"),
            subjects.FINISHED,
            subjects.assignment("*"),  # for the live page, as the next one
            subjects.event("*", ">"),
            _FOUND_BY_ALL,
        ],
    ),
    "scheduler": Rights(
        publish=[
            subjects.assignment("*"),
            subjects.at(subjects.NODE_CAP, _ANY_NODE),
            subjects.at(subjects.NODE_BLOCKS, _ANY_NODE),
            subjects.event("regime_changed", "*"),
            subjects.event("cap_moved", "*"),
            subjects.event("scale_wanted", "*"),
            *_reading(subjects.NODES_BUCKET),
            *_reading(subjects.LEADER_BUCKET),
            f"$KV.{subjects.LEADER_BUCKET}.>",
        ],
        subscribe=[
            subjects.SCHEDULE,
            subjects.SCHEDULER_READY,
            subjects.LOAD_ALL,
            subjects.BLOCKS_ALL,
            subjects.SEEN_ALL,
            _FOUND_BY_ALL,
        ],
    ),
    "node": Rights(
        publish=[
            subjects.load(_ANY_NODE),
            subjects.blocks(_ANY_NODE),
            subjects.at(subjects.DECODE_RESERVE, _ANY_NODE),
            subjects.at(subjects.DECODE_RELEASE, _ANY_NODE),
            subjects.at(subjects.DECODE_RUN, _ANY_NODE),
            subjects.at(subjects.NODE_LINK, _ANY_NODE),
            subjects.at(subjects.NODE_CHECK, _ANY_NODE),  # is another of its id alive?
            subjects.tokens("*"),
            subjects.keepalive("*"),
            subjects.event("kv_transferred", ">"),
            *_reading(subjects.NODES_BUCKET),
            f"$KV.{subjects.NODES_BUCKET}.>",
        ],
        subscribe=[
            subjects.at(subjects.PREFILL_RUN, _ANY_NODE),
            subjects.at(subjects.DECODE_RESERVE, _ANY_NODE),
            subjects.at(subjects.DECODE_RELEASE, _ANY_NODE),
            subjects.at(subjects.DECODE_RUN, _ANY_NODE),
            subjects.at(subjects.DECODE_RESUME, _ANY_NODE),
            "flowkv.v1.node.*.*",
            subjects.CANCEL_ALL,
            _FOUND_BY_ALL,
        ],
    ),
    # A person who looks and mends: all of it.
    "operator": Rights(publish=[">"], subscribe=[">"]),
}


def write_accounts(folder: Path, address: str) -> None:
    """Write the server's configuration, and each service's URL of the server at `address` (host:port)."""
    users = []
    for name, rights in RIGHTS.items():
        url_file = folder / name / "nats_url"
        known = urlsplit(url_file.read_text().strip()).password if url_file.exists() else None
        password = known or secrets.token_hex(32)
        _replace_file(url_file, f"nats://{name}:{password}@{address}\n")
        permissions = {
            "publish": {"allow": rights.publish},
            "subscribe": {"allow": [f"_INBOX.{name}.>", *rights.subscribe]},
            "allow_responses": {"max": _ANSWERS, "expires": "2m"},
        }
        users.append({"user": name, "password": password, "permissions": permissions})
    config = {
        "host": "0.0.0.0",
        "port": 4222,
        "http": "127.0.0.1:8222",  # monitoring shows who is connected from where
        "max_payload": MAX_PAYLOAD_BYTES,
        "jetstream": {"max_memory_store": 256 << 20, "max_file_store": 0},
        "authorization": {"users": users},  # others can't even connect
    }
    # The server's own format includes JSON.
    _replace_file(folder / "nats" / "nats.conf", json.dumps(config, indent=2) + "\n")


def _replace_file(path: Path, content: str) -> None:
    """In one step; only its owner can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with open(fresh, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
    fresh.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the users of the NATS server.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address", default="nats:4222", help="host:port at which services reach the server")
    options = parser.parse_args()
    write_accounts(options.folder, options.address)


if __name__ == "__main__":
    main()
