"""Links to other nodes' KV pools: each peer is reached by the best connector that works now.

A link that works is used at once; better connectors are tried beside it, and replace it under its users.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence

from flowkv_common.aio import Backoff, running, wait_event
from flowkv_common.bus.connection import Bus
from flowkv_common.errors import BadRequest, FlowKVError, Unavailable, WrongModel
from flowkv_common.wire import subjects
from flowkv_common.wire.messages import NodeRef, PoolLayout
from flowkv_common.wire.nodes import PROTOCOL, LinkOffer, LinkRequest, NodeDescriptor, serves_prefill
from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import ConnectorUnavailable, KVConnector, KVLink, TransferStats

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.2
LONGEST_RETRY_S = 5.0
OFFER_TIMEOUT_S = 5.0
# A request waits so long for a link that is being set up, however many others wait for it too.
LINK_PATIENCE_S = 5.0
LINK_POLL_S = 0.02
# A connector that is preferred has so long before the next one is tried beside it.
HEAD_START_S = 1.0
# When connectors that would be preferred are tried again. Each try may cost the peers a thread for minutes.
FIRST_PROBE_AGAIN_S = 10.0
LONGEST_PROBE_AGAIN_S = 300.0
# A peer that is missing from the registry may be there again once its bucket has been made anew.
FORGET_AFTER_S = 30.0


class SwitchedLink:
    """A `KVLink` by way of another one, which can be replaced: transfers end on the one where they began."""

    def __init__(self, link: KVLink) -> None:
        self._link = link
        self._sending: list[KVLink] = []  # one per send under way, also those that were replaced
        self._send_ended = asyncio.Event()

    @property
    def name(self) -> str:
        return self._link.name

    @property
    def is_lost(self) -> bool:
        return self._link.is_lost

    async def send_blocks(self, transfer_id: str, token: str, copies: Sequence[Copy]) -> TransferStats:
        link = self._link
        self._sending.append(link)
        try:
            return await link.send_blocks(transfer_id, token, copies)
        finally:
            self._sending.remove(link)
            self._send_ended.set()

    async def switch(self, link: KVLink) -> None:
        """What is sent from now on goes by `link`. Returns when the one before has ended its transfers."""
        before, self._link = self._link, link
        try:
            while before in self._sending:
                self._send_ended.clear()
                await self._send_ended.wait()
        finally:
            await before.close()

    async def until_lost(self) -> None:
        """Returns when a send has failed because the peer can't be reached by this transport any more."""
        while not self.is_lost:
            self._send_ended.clear()
            await self._send_ended.wait()

    async def close(self) -> None:
        """Ends the link, after the transfer under way. Idempotent."""
        await self._link.close()  # `switch` closes those before


class Links:
    """Both ends: offers this node's pool to peers, and keeps a link to each peer's pool."""

    def __init__(
        self, bus: Bus, node: NodeRef, layout: PoolLayout, fingerprint: str, num_blocks: int
    ) -> None:
        self._bus = bus
        self._node = node
        self._layout = layout
        self._fingerprint = fingerprint
        self._num_blocks = num_blocks
        self._connectors: dict[str, KVConnector] = {}  # by name, the best one first
        self._addresses: dict[str, str] = {}
        self._tokens: dict[str, tuple[NodeRef, str]] = {}  # node_id -> a peer, and the secret it was given
        self._peers: dict[str, NodeRef] = {}
        self.has_prefill_peer = False  # another node of the model that serves prefill, in the registry
        self._missing_since: dict[str, float] = {}
        self._links: dict[NodeRef, SwitchedLink] = {}
        self.why_slower: dict[str, str] = {}  # node_id -> the connector in use, and why not a preferred one
        self._changed = asyncio.Event()

    async def listen(self, connector: KVConnector) -> None:
        """Open this node's pool through a connector too; the first one is preferred."""
        self._addresses[connector.name] = await connector.listen()
        self._connectors[connector.name] = connector

    def admits(self, token: str) -> bool:
        """Whether a peer that presents `token` may write into this pool."""
        return any(token == given for _, given in self._tokens.values())

    def offer(self, request: LinkRequest) -> LinkOffer:
        """Answer a peer that wants to send here.

        Raises BadRequest for another protocol or layout, WrongModel.
        """
        if request.protocol != PROTOCOL:
            raise BadRequest(
                f"{request.peer.node_id} speaks protocol {request.protocol}, {self._node.node_id} speaks "
                f"{PROTOCOL}: run one version of FlowKV on both",
                field="protocol",
            )
        if request.layout != self._layout:
            raise BadRequest(f"KV layouts differ: {request.layout} and {self._layout}", field="layout")
        if request.fingerprint != self._fingerprint:
            raise WrongModel(f"{self._node.node_id} serves another model", field="fingerprint")
        # An incarnation keeps its token: a link that it has must be able to reconnect while it tries others.
        peer, token = self._tokens.get(request.peer.node_id, (None, ""))
        if peer != request.peer:
            token = secrets.token_hex(16)
            self._tokens[request.peer.node_id] = (request.peer, token)
        return LinkOffer(node=self._node, num_blocks=self._num_blocks, token=token, addresses=self._addresses)

    async def link_to(self, peer: NodeRef) -> KVLink:
        """The link to one incarnation of a peer, once it is made. Raises Unavailable after `LINK_PATIENCE_S`.

        Whether that incarnation is yet to be seen here or is over can't be told: the registry may lag behind.
        """
        gives_up_at = time.monotonic() + LINK_PATIENCE_S
        while (link := self._links.get(peer)) is None:
            if time.monotonic() >= gives_up_at:
                raise Unavailable(f"no link to {peer.node_id} within {LINK_PATIENCE_S:g} s")
            await asyncio.sleep(LINK_POLL_S)
        return link

    def is_current(self, peer: NodeRef, link: KVLink) -> bool:
        """Whether this is still the link to that peer."""
        return self._links.get(peer) is link

    def connectors_in_use(self) -> dict[str, str]:
        """node_id -> name of the connector."""
        return {peer.node_id: link.name for peer, link in self._links.items()}

    def follow(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """The registry has changed: link to new nodes of our model, forget missing ones after a while."""
        now = time.monotonic()
        others = {
            node_id: descriptor
            for node_id, descriptor in descriptors.items()
            if node_id != self._node.node_id
            and (descriptor.model.fingerprint, descriptor.protocol) == (self._fingerprint, PROTOCOL)
        }
        present = {node_id: descriptor.node for node_id, descriptor in others.items()}
        self.has_prefill_peer = any(
            serves_prefill(other.max_prefill_tokens_per_step, other.layout.block_size)
            for other in others.values()
        )
        self._missing_since = {
            node_id: self._missing_since.get(node_id, now) for node_id in self._peers.keys() - present.keys()
        }
        self._peers |= present
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled: one keeper task per peer."""
        keepers: dict[NodeRef, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                for node_id, since in list(self._missing_since.items()):
                    if time.monotonic() - since > FORGET_AFTER_S and self._bus.is_settled:
                        del self._missing_since[node_id], self._peers[node_id]
                        self._tokens.pop(node_id, None)
                wanted = set(self._peers.values())
                for peer in set(keepers) - wanted:
                    keepers.pop(peer).cancel()
                for peer in wanted - set(keepers):
                    keepers[peer] = tasks.create_task(self._keep(peer))
                await wait_event(self._changed, FORGET_AFTER_S)

    # --- the link to one peer ---------------------------------------------------------------------

    async def _keep(self, peer: NodeRef) -> None:
        """Link to one incarnation of a peer, again and again until it works, then by better connectors."""
        pair = _Pair(peer)
        retry = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S)
        probe = Backoff(FIRST_PROBE_AGAIN_S, LONGEST_PROBE_AGAIN_S)
        try:
            while True:
                before = pair.link and pair.link.name
                await self._try_connectors(pair, retry.next_s)
                if pair.link is None or not pair.has_link.is_set():
                    await retry.sleep()
                    continue
                retry.reset()
                if pair.link.name != before:
                    probe.reset()
                again_s = probe.advance() if self._better_than(pair) else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(again_s):
                        await pair.link.until_lost()
        finally:
            if pair.link is not None:
                if self._links.get(peer) is pair.link:
                    del self._links[peer]
                    self.why_slower.pop(peer.node_id, None)
                await pair.link.close()

    def _better_than(self, pair: _Pair) -> list[str]:
        """The connectors that would serve the pair better than what it has, the best first."""
        names = list(self._connectors)
        if pair.link is None or pair.link.is_lost:
            return names
        return names[: names.index(pair.link.name)]

    async def _try_connectors(self, pair: _Pair, retry_s: float) -> None:
        """Try what would be better than what the pair has. One that is slow doesn't hold the next one up."""
        peer = pair.peer
        if pair.link is None or pair.link.is_lost:
            pair.has_link.clear()
        else:
            pair.has_link.set()
        request = LinkRequest(
            node=peer,
            peer=self._node,
            layout=self._layout,
            fingerprint=self._fingerprint,
            protocol=PROTOCOL,
        )
        subject = subjects.at(subjects.NODE_LINK, peer.node_id)
        try:
            offer = await self._bus.request(subject, request, LinkOffer, timeout_s=OFFER_TIMEOUT_S)
        except FlowKVError as error:
            if pair.link is None:
                level = logging.WARNING if isinstance(error, BadRequest | WrongModel) else logging.INFO
                log.log(level, "no link to %s yet, next try in %.1f s: %s", peer.node_id, retry_s, error)
            return
        pair.tries, pair.is_over = {}, False
        async with running(pair.end_tries_when_lost()), asyncio.TaskGroup() as tasks:
            for name in self._better_than(pair):
                if name in self._better_than(pair) and not pair.is_over:  # still
                    pair.tries[name] = tasks.create_task(self._try(pair, self._connectors[name], offer))
                    await asyncio.wait([pair.tries[name]], timeout=HEAD_START_S)
        if pair.link is None:
            reasons = pair.reasons(self._connectors)
            log.info("no link to %s yet, next try in %.1f s: %s", peer.node_id, retry_s, reasons)

    async def _try(self, pair: _Pair, connector: KVConnector, offer: LinkOffer) -> None:
        """Use the connector if it works, and end the tries of those that would serve less well."""
        name, node_id = connector.name, pair.peer.node_id
        pair.why_not[name] = "takes long"
        try:
            if (address := offer.addresses.get(name)) is None:
                raise ConnectorUnavailable("the peer does not offer it")
            async with asyncio.timeout(connector.connect_timeout_s):
                link = await connector.connect(address, offer.token, offer.num_blocks)
        except (ConnectorUnavailable, TimeoutError) as error:
            pair.why_not[name] = str(error) or f"not within {connector.connect_timeout_s:g} s"
            return
        except Exception as error:  # whatever one peer says costs only the link to it
            log.exception("%s to %s failed", name, node_id)
            pair.why_not[name] = f"{type(error).__name__}: {error}"
            return
        del pair.tries[name], pair.why_not[name]
        if name not in self._better_than(pair):  # another was found meanwhile
            await link.close()
            return
        preferred = list(self._connectors)[: list(self._connectors).index(name)]
        for other in set(pair.tries) - set(preferred):
            pair.tries[other].cancel()
        self.why_slower.pop(node_id, None)
        if preferred:
            reasons = pair.reasons(preferred)
            self.why_slower[node_id] = f"to {node_id} by {name}, not by {reasons}"
            log.warning("KV goes to %s by %s, not by %s", node_id, name, reasons)
        else:
            log.info("linked to %s by %s", node_id, name)
        pair.has_link.set()  # the waiter runs after the link is in place
        if pair.link is None:
            pair.link = self._links[pair.peer] = SwitchedLink(link)
        else:
            await pair.link.switch(link)


class _Pair:
    """This node and one incarnation of a peer: the link between them, and the tries to get a better one."""

    def __init__(self, peer: NodeRef) -> None:
        self.peer = peer
        self.link: SwitchedLink | None = None
        self.has_link = asyncio.Event()  # not lost when the connectors were tried last, or found since
        self.tries: dict[str, asyncio.Task[None]] = {}  # by connector
        self.is_over = False  # this round of tries
        self.why_not: dict[str, str] = {}  # connector -> why the last try has failed

    async def end_tries_when_lost(self) -> None:
        """When the link that serves meanwhile is lost, this round ends: all connectors must be tried."""
        await self.has_link.wait()
        assert self.link is not None
        await self.link.until_lost()
        self.is_over = True
        for task in self.tries.values():
            task.cancel()

    def reasons(self, names: Iterable[str]) -> str:
        """Why not by these connectors."""
        return "; ".join(f"{name}: {self.why_not.get(name, 'not tried')}" for name in names)
