"""Every subject, bucket and header name. Nothing else spells one.

General to specific, the version second, the verb before the id, the id last: `*` selects over nodes. The
first part is the namespace. Names here are those of the default one; `Bus` puts its own in (`in_namespace`).
"""

from __future__ import annotations

DEFAULT_NAMESPACE = "flowkv"

SCHEDULE = "flowkv.v1.scheduler.schedule"
SCHEDULER_READY = "flowkv.v1.scheduler.ready"
FINISHED = "flowkv.v1.gateway.finished"

# Endpoints of a node: `flowkv.v1.<role or node>.<verb>.<node_id>`, see `at`.
PREFILL_RUN = "flowkv.v1.prefill.run"
DECODE_RESERVE = "flowkv.v1.decode.reserve"
DECODE_RELEASE = "flowkv.v1.decode.release"
DECODE_RUN = "flowkv.v1.decode.run"
DECODE_RESUME = "flowkv.v1.decode.resume"
NODE_LINK = "flowkv.v1.node.link"
NODE_DRAIN = "flowkv.v1.node.drain"
NODE_CORDON = "flowkv.v1.node.cordon"
NODE_RESUME = "flowkv.v1.node.resume"
NODE_CHECK = "flowkv.v1.node.check"
NODE_WEDGE = "flowkv.v1.node.wedge"
NODE_CAP = "flowkv.v1.node.cap"
NODE_BLOCKS = "flowkv.v1.node.blocks"
NODE_CANCEL = "flowkv.v1.node.cancel"

LOAD_ALL = "flowkv.v1.load.*"
BLOCKS_ALL = "flowkv.v1.blocks.*"
SEEN_ALL = "flowkv.v1.gateway.seen.*"
CANCEL_ALL = "flowkv.v1.request.cancel.>"

NODES_BUCKET = "flowkv_nodes"
LEADER_BUCKET = "flowkv_leader"

ERROR_HEADER = "Nats-Service-Error"  # ADR-32
ERROR_CODE_HEADER = "Nats-Service-Error-Code"


def in_namespace(name: str, namespace: str) -> str:
    """What a subject or bucket of this file is called in a namespace.

    What does not begin with the default namespace belongs to none: inboxes, and what NATS itself serves.
    """
    is_subject = name.startswith(f"{DEFAULT_NAMESPACE}.")
    is_bucket = name.startswith(f"{DEFAULT_NAMESPACE}_") and "." not in name
    if not (is_subject or is_bucket):
        return name
    return namespace + name.removeprefix(DEFAULT_NAMESPACE)


def service_in_namespace(name: str, namespace: str) -> str:
    """What `nats micro ls` calls a service: beside the default namespace with its own before the name."""
    return name if namespace == DEFAULT_NAMESPACE else f"{namespace}-{name}"


def at(endpoint: str, node_id: str) -> str:
    """The subject of one node's endpoint."""
    return f"{endpoint}.{node_id}"


def load(node_id: str) -> str:
    return f"flowkv.v1.load.{node_id}"


def blocks(node_id: str) -> str:
    return f"flowkv.v1.blocks.{node_id}"


def assignment(request_id: str) -> str:
    return f"flowkv.v1.assignment.{request_id}"


def cancel(transfer_id: str) -> str:
    """For operators, who don't know the nodes of an attempt: every node hears it."""
    return f"flowkv.v1.request.cancel.{transfer_id}"


def tokens(gateway_id: str) -> str:
    """Where nodes send the tokens of a gateway's requests."""
    return f"flowkv.v1.gateway.tokens.{gateway_id}"


def keepalive(gateway_id: str) -> str:
    return f"flowkv.v1.gateway.keepalive.{gateway_id}"


def seen(gateway_id: str) -> str:
    """What a gateway saw of nodes."""
    return f"flowkv.v1.gateway.seen.{gateway_id}"


def event(past_tense: str, subject_id: str) -> str:
    return f"flowkv.v1.event.{past_tense}.{subject_id}"
