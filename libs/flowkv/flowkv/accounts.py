"""Users of a NATS server that others can reach: one per service, with what it may publish and subscribe to.

`python -m flowkv.accounts FOLDER` writes `FOLDER/nats/nats.conf` and, per user, `FOLDER/<user>/nats_url`,
which only that user's services need. Passwords are made once and kept; permissions are written each time, so
that they follow the code.

New passwords come in two steps (docs/operations.md#new-passwords): `--rotate` writes new ones and lets the
former stand beside them, and without it only the newest stand. With `--certificates` there are no passwords:
a user is whom its certificate names.

With several addresses the servers are one cluster. Each starts with `FOLDER/nats/server-HOST.conf`, which
adds its name to what all have. One of the command line would be forgotten when the server reads its
configuration again.

With `--namespace A --namespace B` there are users for each, such as `A-gateway`, who can't hear or say
anything in the other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flowkv_common.cluster_view import ASKED_EVERY
from flowkv_common.config import NatsSettings, listed
from flowkv_common.wire import subjects
from flowkv_common.wire.limits import MAX_PAYLOAD_BYTES


class Rights(NamedTuple):
    """Subjects that a user may publish on and subscribe to, answers to requests apart."""

    publish: list[str]
    subscribe: list[str]


def _reading(bucket: str) -> list[str]:
    """What a watch on a bucket asks of JetStream; the first service to come makes the bucket."""
    api, stream = "$JS.API", f"KV_{bucket}"
    verbs = ["STREAM.CREATE", "STREAM.UPDATE", "STREAM.INFO", "STREAM.MSG.GET", "CONSUMER.CREATE"]
    nested = ["DIRECT.GET", "CONSUMER.CREATE", "CONSUMER.INFO", "CONSUMER.DELETE"]
    asked = [f"{api}.{verb}.{stream}" for verb in verbs] + [f"{api}.{verb}.{stream}.>" for verb in nested]
    return [f"{api}.INFO", *asked, f"$JS.ACK.{stream}.>", f"$JS.FC.{stream}.>"]


def _found_as(*services: str) -> list[str]:
    """What services listen to that `nats micro` asks: all of them, all of one name, one of them."""
    return ["$SRV.*", *(f"$SRV.*.{each}" for each in services), *(f"$SRV.*.{each}.*" for each in services)]


_ANSWERS = 8  # to one question, of one process: a node is three services, each of which answers a ping
_ANY_NODE = "*"
CLUSTER_PORT = 6222
# Where a right names the default namespace: at the beginning of a subject, or of a bucket's name.
_DEFAULT_ROOT = re.compile(rf"(?:(?<=^)|(?<=KV_)|(?<=KV\.)){subjects.DEFAULT_NAMESPACE}(?=[._])")

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
            subjects.at(subjects.NODE_CHECK, _ANY_NODE),  # does it hear us?
            *(f"$SRV.INFO.{each}" for each in ASKED_EVERY),
            *_reading(subjects.NODES_BUCKET),
        ],
        subscribe=[
            subjects.LOAD_ALL,
            subjects.tokens("*"),
            subjects.keepalive("*"),
            subjects.FINISHED,
            subjects.assignment("*"),  # for the live page, as the next one
            subjects.event("*", ">"),
            *_found_as("gateway"),
        ],
    ),
    "scheduler": Rights(
        publish=[
            subjects.assignment("*"),
            subjects.at(subjects.NODE_CAP, _ANY_NODE),
            subjects.at(subjects.NODE_BLOCKS, _ANY_NODE),
            subjects.at(subjects.NODE_CHECK, _ANY_NODE),  # does it hear us?
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
            *_found_as("scheduler"),
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
            subjects.at(subjects.NODE_CHECK, _ANY_NODE),  # is another of its id alive? does it hear us?
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
            *_found_as("prefill", "decode", "node"),
        ],
    ),
    # A person who looks and mends: all of it.
    "operator": Rights(publish=[">"], subscribe=[">"]),
}


class _Account(NamedTuple):
    """A user of the server by the name and the password that it shows, none where it shows a certificate."""

    name: str
    password: str


def rights_in(namespace: str) -> dict[str, Rights]:
    """By user: `RIGHTS` for the subjects, buckets and services of one namespace, and for no others'.

    Nothing is kept from the operator of the default one.
    """
    if namespace == subjects.DEFAULT_NAMESPACE:
        return dict(RIGHTS)

    def moved(rights: Sequence[str]) -> list[str]:
        return [
            re.sub(r"^(\$SRV\.[^.]+\.)", rf"\g<1>{namespace}-", _DEFAULT_ROOT.sub(namespace, one))
            for one in rights
        ]

    users = {name: Rights(moved(one.publish), moved(one.subscribe)) for name, one in RIGHTS.items()}
    services = [one for name, one in users.items() if name != "operator"]
    publish = {subject for one in services for subject in (*one.publish, *one.subscribe)}
    users["operator"] = Rights(
        publish=[f"{namespace}.>", *sorted(publish - {"$SRV.*"})],
        subscribe=[f"{namespace}.>"],
    )
    return {subjects.service_in_namespace(name, namespace): rights for name, rights in users.items()}


def write_accounts(
    folder: Path,
    address: str,
    *,
    namespaces: Sequence[str] = (subjects.DEFAULT_NAMESPACE,),
    is_rotation: bool = False,
    certificates: Path | None = None,
) -> None:
    """Write the servers' configuration, and each service's URL of the servers.

    `address` is host:port of the server, or of several with commas between. In a rotation each service gets a
    new password, and those before it stay valid until the next call. `certificates` is the folder with
    ca.pem, nats.pem and nats.key, as the server sees it.
    """
    servers = listed(address)
    users: list[dict[str, Any]] = []
    rights_of = {name: rights for each in namespaces for name, rights in rights_in(each).items()}
    for service, rights in rights_of.items():
        permissions = {
            "publish": {"allow": rights.publish},
            "subscribe": {"allow": [f"_INBOX.{service}.>", *rights.subscribe]},
            "allow_responses": {"max": _ANSWERS, "expires": "2m"},
        }
        url_file = folder / service / "nats_url"
        if certificates is not None:
            _replace_file(url_file, ",".join(f"tls://{each}" for each in servers) + "\n")
            users.append({"user": service, "permissions": permissions})
            continue
        newest = _account_in(url_file) or _Account(service, secrets.token_hex(32))
        valid = [newest]
        if is_rotation:
            valid = [newest, _Account(_next_name(service, newest.name), secrets.token_hex(32))]
        urls = (f"nats://{valid[-1].name}:{valid[-1].password}@{each}" for each in servers)
        _replace_file(url_file, ",".join(urls) + "\n")
        users += [{"user": name, "password": word, "permissions": permissions} for name, word in valid]
    config: dict[str, Any] = {
        "host": "0.0.0.0",
        "port": 4222,
        "http": "127.0.0.1:8222",  # monitoring shows who is connected from where
        "max_payload": MAX_PAYLOAD_BYTES,
        "jetstream": {"max_memory_store": 256 << 20, "max_file_store": 0},
        "authorization": {"users": users},  # others can't even connect
    }
    files: dict[str, Any] = {}
    if certificates is not None:
        files = {
            "ca_file": str(certificates / "ca.pem"),
            "cert_file": str(certificates / "nats.pem"),
            "key_file": str(certificates / "nats.key"),
        }
        config["tls"] = files | {"verify_and_map": True}  # who has none of the authority can't connect
    config_file = folder / "nats" / "nats.conf"
    if len(hosts := [urlsplit(f"//{each}").hostname for each in servers]) > 1:
        for host in hosts:
            own_file = config_file.with_name(f"server-{host}.conf")
            _replace_file(own_file, f'server_name: "{host}"\ninclude {config_file.name}\n')
        config |= {"ping_interval": "1s", "ping_max": 2}  # a network that drops packets is noticed soon
        config["cluster"] = _cluster(hosts, config_file)
        if files:
            config["cluster"]["tls"] = files | {"verify": True}
    # The server's own format includes JSON.
    _replace_file(config_file, json.dumps(config, indent=2) + "\n")


def _cluster(hosts: Sequence[str | None], config_file: Path) -> dict[str, Any]:
    """How the servers find each other; a stranger who took part would hear everything."""
    old = json.loads(config_file.read_text()) if config_file.exists() else {}
    known = old["cluster"]["authorization"]["password"] if "cluster" in old else None
    password = known or secrets.token_hex(32)
    return {
        "name": "flowkv",
        "port": CLUSTER_PORT,
        "no_advertise": True,  # services know all servers, and servers do not know how they are reached
        "authorization": {"user": "server", "password": password},
        "routes": [f"nats://server:{password}@{host}:{CLUSTER_PORT}" for host in hosts],
    }


def _account_in(url_file: Path) -> _Account | None:
    """The one that the file shows, if there is one with a password."""
    url = urlsplit(url_file.read_text().strip()) if url_file.exists() else None
    return _Account(url.username, url.password) if url and url.username and url.password else None


def _next_name(service: str, name: str) -> str:
    """gateway, gateway-2, gateway-3: the server wants one password per user."""
    number = name.removeprefix(f"{service}-")
    return f"{service}-{int(number) + 1 if number.isdecimal() else 2}"


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
    parser.add_argument(
        "--address",
        default="nats:4222",
        help="host:port at which services reach the server, or the servers of a cluster, with commas between",
    )
    parser.add_argument("--rotate", action="store_true", help="new passwords; the former stay valid, too")
    parser.add_argument(
        "--certificates",
        type=Path,
        metavar="FOLDER",
        help="no passwords but certificates; the server finds ca.pem, nats.pem and nats.key there",
    )
    parser.add_argument(
        "--namespace",
        action="append",
        help="users for this one, as in FLOWKV_NAMESPACE; name all that the server has, each time",
    )
    options = parser.parse_args()
    if options.rotate and options.certificates:
        parser.error("--rotate is for passwords: renew certificates with `flowkv certs`")
    namespaces = options.namespace or [subjects.DEFAULT_NAMESPACE]
    for namespace in namespaces:
        try:
            NatsSettings(namespace=namespace)
        except ValueError as error:  # users of `*` could hear all namespaces
            parser.error(str(error))
    write_accounts(
        options.folder,
        options.address,
        namespaces=namespaces,
        is_rotation=options.rotate,
        certificates=options.certificates,
    )


if __name__ == "__main__":
    main()
