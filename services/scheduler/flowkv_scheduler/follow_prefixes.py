"""Feeds the prefix index from NATS: nodes' changes as they come, and whole lists where one was missed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping

from nats.aio.msg import Msg

from flowkv_common.bus.connection import Bus
from flowkv_common.errors import BadRequest, FlowKVError, Stale
from flowkv_common.tasks import group
from flowkv_common.wire import subjects
from flowkv_common.wire.nodes import BlockList, BlocksChanged, ListBlocks, NodeDescriptor
from flowkv_common.wire.parts import NodeRef
from flowkv_scheduler.prefixes import PrefixIndex

SetNodes = Callable[[Mapping[str, NodeDescriptor]], None]

log = logging.getLogger(__name__)

PAGE_TIMEOUT_S = 2.0
FIRST_RETRY_S = 0.1
MAX_RETRY_S = 5.0
# A scheduler that has just started asks all nodes; their lists must not fill its connection.
MAX_LOADS = 8


@contextlib.asynccontextmanager
async def following_prefixes(bus: Bus, index: PrefixIndex) -> AsyncIterator[SetNodes]:
    """Keeps `index` up to date while the context lasts; gives what must hear who is registered."""
    async with group() as loads:
        follower = _Follower(bus, index, loads)
        forget_callback = bus.on_reconnect(follower.load_all)
        try:
            # First: what changes while a list is on its way must be heard.
            async with await bus.subscribe(subjects.BLOCKS_ALL, BlocksChanged, follower.hear):
                yield follower.set_nodes
        finally:
            forget_callback()
            follower.set_nodes({})


class _Follower:
    """Loads the list of a node that is new or was not heard for a moment; one load per node at a time."""

    def __init__(self, bus: Bus, index: PrefixIndex, loads: asyncio.TaskGroup) -> None:
        self._bus = bus
        self._index = index
        self._tasks = loads
        self._nodes: dict[str, NodeRef] = {}
        self._loading: dict[str, tuple[NodeRef, asyncio.Task[None]]] = {}  # by node id
        self._turns = asyncio.Semaphore(MAX_LOADS)

    def set_nodes(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """The registry has changed."""
        before, self._nodes = self._nodes, {name: found.node for name, found in descriptors.items()}
        for node_id in before.keys() - self._nodes.keys():
            self._stop_loading(node_id)
            self._index.drop(node_id)
        for node_id, ref in self._nodes.items():
            if ref != before.get(node_id):
                self._load(ref)

    def hear(self, event: BlocksChanged, _: Msg) -> None:
        """A node that the registry doesn't show is not heard: its list is loaded once it does."""
        if self._nodes.get(event.node.node_id) == event.node and not self._index.apply(event):
            self._load(event.node)

    def load_all(self) -> None:
        """After a reconnect: nobody knows what was missed, and the nodes may have nothing more to say."""
        for ref in self._nodes.values():
            self._stop_loading(ref.node_id)
            self._load(ref)

    def _load(self, ref: NodeRef) -> None:
        """Begins to load the node's list, unless that is under way."""
        loading, task = self._loading.get(ref.node_id, (None, None))
        if task is not None and not task.done() and loading == ref:
            return
        self._stop_loading(ref.node_id)
        self._loading[ref.node_id] = ref, self._tasks.create_task(self._keep_loading(ref))

    def _stop_loading(self, node_id: str) -> None:
        _, task = self._loading.pop(node_id, (None, None))
        if task is not None:
            task.cancel()

    async def _keep_loading(self, ref: NodeRef) -> None:
        """Until the node's list is loaded, or its life has ended."""
        retry_s = FIRST_RETRY_S
        while self._nodes.get(ref.node_id) == ref:
            try:
                async with self._turns:
                    if await self._load_pages(ref):
                        return
            except Stale:
                return  # another life: the registry will show it
            except BadRequest as error:
                log.warning("the list of prefixes of %s is no such list: %s", ref.node_id, error)
            except FlowKVError as error:
                log.debug("the list of prefixes of %s did not come: %s", ref.node_id, error)
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, MAX_RETRY_S)

    async def _load_pages(self, ref: NodeRef) -> bool:
        """False if it must be begun again. Raises FlowKVError."""
        number, num_pages = 0, 1
        subject = subjects.at(subjects.NODE_BLOCKS, ref.node_id)
        while number < num_pages:
            wanted = ListBlocks(node=ref, page=number)
            page = await self._bus.request(subject, wanted, BlockList, timeout_s=PAGE_TIMEOUT_S)
            num_pages = page.num_pages
            if not self._index.load(page, number):
                return False
            number += 1
        return True
