"""The cluster as the bus shows it: services, nodes, pairs and the links between them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flowkv.doctor import Finding, bad, good, look
from flowkv.doctor.bus import payload_mend
from flowkv_common.cluster_view import (
    ClusterView,
    NodeState,
    are_on_two_hosts,
    best_connector,
    could_be_faster,
)
from flowkv_common.config import listed
from flowkv_common.wire.limits import window_that_fits
from flowkv_common.wire.nodes import NodeDescriptor
from flowkv_scheduler.cluster import why_apart

SHOWN_LINKS = 3
# Connectors that need something of the host, and what.
MEND_LINK = {
    "shm": "of one host: let both see one folder FLOWKV_SOCKET_DIR (in Compose the volume `sockets`); "
    "of two hosts tcp is right",
    "cuda_ipc": "of one host: let both see one FLOWKV_SOCKET_DIR, and share PID and IPC namespaces "
    "(in Compose `gpu-anchor`)",
    "nccl": "install the extra `gpu`, and look whether the hosts reach each other's FLOWKV_DATA_PORT",
    "nixl": "install one version of the extra `nixl` on both, and look whether the hosts reach each other",
}


def check_services(view: ClusterView) -> Iterator[Finding]:
    schedulers, gateways = view.services("scheduler"), view.services("gateway")
    leaders = [one.id for one in schedulers if one.metadata.get("state") == "leader"]
    if len(leaders) == 1:
        yield good("scheduler", f"{leaders[0]} leads, {len(schedulers) - 1} stand by")
    elif leaders:
        yield bad("scheduler", f"{' and '.join(leaders)} both lead", "look again: one must step down in 2 s")
    elif schedulers:
        yield bad(
            "scheduler", "there are schedulers, but none leads", "look at their logs: can they write to NATS?"
        )
    else:
        yield bad("scheduler", "none has answered", "start one: `flowkv scheduler`")
    if not gateways:
        yield bad("gateway", "none has answered", "start one: `flowkv gateway`")
    names = {node.descriptor.model.fingerprint: node.descriptor.model.name for node in view.nodes()}
    for gateway in gateways:
        served = listed(gateway.metadata.get("fingerprint", ""))
        if missing := sorted({name for fingerprint, name in names.items() if fingerprint not in served}):
            said = f"{gateway.id} does not serve {', '.join(missing)}, which nodes have"
            mend = "name a folder of each model in its FLOWKV_MODEL_PATH: its log says what differs"
            yield look("gateway", said, mend)
        else:
            yield good("gateway", f"{gateway.id} at {gateway.metadata.get('url') or 'an unknown URL'}")


def check_nodes(view: ClusterView, max_payload: int) -> Iterator[Finding]:
    nodes = view.nodes()
    for node in nodes:
        yield _standing(node)
    yield from _payload(nodes, max_payload)
    if apart := why_apart(node.descriptor for node in nodes):
        mend = "give all the same FLOWKV_MODEL_PATH, FLOWKV_BLOCK_SIZE, FLOWKV_DTYPE and FLOWKV_KV_DTYPE"
        yield (look if view.pairs() else bad)("nodes", apart, mend)
    versions = sorted({node.descriptor.version for node in nodes})
    if len(versions) > 1:
        said = f"they are of the versions {', '.join(versions)}"
        yield look("nodes", said, "that works for an upgrade: end it soon")
    yield from _shared_cores(nodes)
    if pairs := view.pairs():
        yield good("nodes", f"{len(pairs)} pairs of a prefill and a decode node")
    else:
        yield _no_pair(nodes)


def _standing(node: NodeState) -> Finding:
    what = f"{node.node_id} ({' and '.join(node.serves)})"
    process = f"process {node.descriptor.pid} on {node.descriptor.host}"
    match node.state:
        case "ready":
            return good("nodes", f"{what} is ready")
        case "silent" | "unheard":
            since = f" for {node.heard_s_ago:.0f} s" if node.heard_s_ago else ""
            mend = f"look at {process}: if it is stopped, `kill -CONT {node.descriptor.pid}`; "
            mend += "else end it and start it anew"
            return bad(
                "nodes", f"{what} is in the registry but says nothing{since}: frozen, or cut off", mend
            )
        case "draining" | "cordoned":
            mend = f"take it back with `flowkv resume {node.node_id}`, or stop it"
            return look("nodes", f"{what} is {node.state}", mend)
    return bad("nodes", f"{what} is not ready: {node.state}", f"look at the log of {process}")


def _payload(nodes: Sequence[NodeState], max_payload: int) -> Iterator[Finding]:
    """A node cuts its window to what messages can carry."""
    for node in nodes:
        window = window_that_fits(max_payload, node.descriptor.layout.block_size)
        if node.descriptor.model.max_model_len == window:
            said = f"messages of {max_payload} bytes cut the window of {node.node_id} to {window} tokens"
            yield bad("NATS", said, payload_mend())
            return


def _shared_cores(nodes: Sequence[NodeState]) -> Iterator[Finding]:
    """Nodes that compute on the same cores slow each other, and have none to lend."""
    by_host: dict[str, list[NodeDescriptor]] = {}
    for node in nodes:
        if node.descriptor.boot_id and node.descriptor.num_cores:
            by_host.setdefault(node.descriptor.boot_id, []).append(node.descriptor)
    for members in by_host.values():
        num_wanted, num_cores = sum(one.num_cores for one in members), members[0].num_host_cores
        if len(members) > 1 and num_wanted > num_cores:
            names = ", ".join(one.node.node_id for one in members)
            said = f"{names} compute on {num_wanted:g} cores of a host that has {num_cores}: they share them"
            mend = "they slow each other, and few are lent: lower FLOWKV_NUM_THREADS, or start fewer"
            yield look("nodes", said, mend)


def _no_pair(nodes: Sequence[NodeState]) -> Finding:
    ready = [node for node in nodes if node.state == "ready"]
    sides = {side for node in ready for side in node.serves}
    if missing := [side for side in ("prefill", "decode") if side not in sides]:
        said = f"no node serves {' or '.join(missing)}: no request can be served"
        starts = " and ".join(f"`flowkv {side}`" for side in missing)
        return bad(
            "nodes",
            said,
            f"start {starts}, with FLOWKV_NATS_URL and FLOWKV_MODEL_PATH; or one `flowkv mixed`",
        )
    return bad("nodes", "no two nodes fit together", "see what differs, above")


def check_links(view: ClusterView) -> Iterator[Finding]:
    """By which connector nodes send to each other, and why not by the faster one."""
    nodes = {node.node_id: node for node in view.nodes()}
    # How KV goes, a connector that would be better, and whether between two hosts -> links
    alike: dict[tuple[str, str, bool], list[str]] = {}
    for node in nodes.values():
        if node.slower_links and could_be_faster(node, nodes):
            reasons = node.slower_links.partition("not by ")[2]
            yield look("links", f"{node.node_id}: {node.slower_links}", _mend_of(reasons))
            continue
        for peer, connector in node.links.items():
            best = best_connector(node.descriptor, nodes[peer].descriptor)
            better = "" if best == connector else best
            is_far = are_on_two_hosts(node.descriptor, nodes[peer].descriptor)
            kind = (node.named_link(peer), better, is_far)
            alike.setdefault(kind, []).append(f"{node.node_id} to {peer}")
    for (how, better, is_far), links in alike.items():
        shown = ", ".join(links[:SHOWN_LINKS]) + (", ..." if len(links) > SHOWN_LINKS else "")
        which = f"{len(links)} links ({shown})"
        if not how:
            mend = "look again in 10 s; else the logs of both say why: grep 'no link'"
            yield look("links", f"{which} are not there, as far as reports tell", mend)
        elif better:
            yield look("links", f"{which} are by {how}, though both sides have {better}", _mend_of(better))
        else:
            where = "between two hosts" if is_far else "that both sides have"
            yield good("links", f"{which} are by {how}, the best {where}")


def _mend_of(reasons: str) -> str:
    name = reasons.partition(":")[0].strip()
    return MEND_LINK.get(name, "the node's log says more: grep 'KV goes to'")
