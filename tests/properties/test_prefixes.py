"""The index of prefixes against one set of hashes per node, over a network that loses messages."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowkv_common.wire.messages import NodeRef
from flowkv_common.wire.nodes import BlockList, BlocksChanged
from flowkv_node.reporting import PAGE_SIZE, BlockNews
from flowkv_scheduler.prefixes import PART_SIZE, PrefixIndex, keys_of
from tests.described_nodes import blocks_by_node, knows, num_hashes

HASHES = [f"{number:016x}{0:016x}" for number in range(20)]
NODES = st.sampled_from(["n0", "n1", "n2"])
# Any row of hashes will do for a chain: the index doesn't know what builds on what.
chains = st.one_of(
    st.lists(st.sampled_from(HASHES[:7]), max_size=5, unique=True),
    st.builds(lambda first, num: HASHES[first : first + num], st.integers(0, 8), st.integers(0, 20)),
)


class Cache:
    """As much of `Blocks` as its news needs: what is cached, and what of it has been told."""

    num_blocks = 3 * PAGE_SIZE  # three pages

    def __init__(self) -> None:
        self.hashes: set[str] = set()
        self._told: set[str] = set()
        self.prefix_cache = self

    def take_changes(self, _: int) -> tuple[list[str], list[str]]:
        stored, removed = self.hashes - self._told, self._told - self.hashes
        self._told = set(self.hashes)
        return list(stored), list(removed)


class Node:
    """One life of a node, and what is on its way from it to the index."""

    def __init__(self, node_id: str, life: int) -> None:
        self.ref = NodeRef(node_id=node_id, incarnation=str(life))
        self.cache = Cache()
        self.news = BlockNews(self.ref, self.cache)  # type: ignore[arg-type]
        self.on_its_way: list[BlocksChanged] = []
        self.pages: list[BlockList] = []  # that were asked for; the last has not arrived yet
        self.must_load = True
        self.expected: dict[str, float] = {}


class PrefixIndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.nodes: dict[str, Node] = {}
        self.num_lives = 0
        self.now = 0.0

    @initialize()
    def begin(self) -> None:
        for node_id in ("n0", "n1", "n2"):
            self.restart(node_id, is_noticed=True)

    @rule(node_id=NODES, is_noticed=st.booleans())
    def restart(self, node_id: str, is_noticed: bool) -> None:
        self.num_lives += 1
        self.nodes[node_id] = Node(node_id, self.num_lives)
        if is_noticed:
            self.index.drop_node(node_id)

    @rule(node_id=NODES, stored=chains, removed=chains)
    def change(self, node_id: str, stored: list[str], removed: list[str]) -> None:
        node = self.nodes[node_id]
        node.cache.hashes = node.cache.hashes - set(removed) | set(stored)

    @rule(node_id=NODES, is_lost=st.booleans())
    def tell(self, node_id: str, is_lost: bool) -> None:
        node = self.nodes[node_id]
        if is_lost:
            node.news.next_change()
            node.news.skip()
        elif change := node.news.next_change():
            node.on_its_way.append(change)

    @precondition(lambda self: any(node.on_its_way for node in self.nodes.values()))
    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        self.deliver(data.draw(st.sampled_from([n for n in self.nodes.values() if n.on_its_way])))

    def deliver(self, node: Node) -> None:
        if not self.index.apply_change(node.on_its_way.pop(0)):
            node.must_load = True

    @precondition(lambda self: any(len(node.on_its_way) > 0 for node in self.nodes.values()))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from([n for n in self.nodes.values() if n.on_its_way]))
        del node.on_its_way[data.draw(st.integers(0, len(node.on_its_way) - 1))]
        node.news.skip()  # or a lost last message would be noticed only at the next change

    @rule(node_id=NODES)
    def ask_for_a_page(self, node_id: str) -> None:
        node = self.nodes[node_id]
        if len(node.pages) < 3:
            node.pages.append(node.news.page(len(node.pages)))

    @precondition(lambda self: any(node.pages for node in self.nodes.values()))
    @rule(data=st.data())
    def get_pages(self, data: st.DataObject) -> None:
        self.load(data.draw(st.sampled_from([n for n in self.nodes.values() if n.pages])))

    def load(self, node: Node) -> None:
        """The pages asked for so far, and the others; what is on its way may come before or after them."""
        pages, node.pages = node.pages, []
        pages += [node.news.page(number) for number in range(len(pages), 3)]
        node.must_load = not all(self.index.load_page(page, number) for number, page in enumerate(pages))
        assert node.must_load or knows(self.index, node.ref)

    @rule(node_id=NODES, hashes=chains, for_s=st.integers(1, 3))
    def expect(self, node_id: str, hashes: list[str], for_s: int) -> None:
        node = self.nodes[node_id]
        self.index.expect([node.ref], hashes, self.now + for_s)
        for block_hash in hashes[PART_SIZE - 1 :: PART_SIZE]:
            node.expected[block_hash] = max(node.expected.get(block_hash, 0.0), self.now + for_s)

    @rule(hashes=chains)
    def ask(self, hashes: list[str]) -> None:
        self.now += 1
        found = blocks_by_node(self.index.hits(keys_of(hashes), self.now))
        assert found.keys() <= self.nodes.keys()
        assert all(1 <= num_blocks <= len(hashes) for num_blocks in found.values())

    @rule(asked=st.lists(chains, min_size=1, max_size=5))
    def settle(self, asked: list[list[str]]) -> None:
        """When all have been heard, and what was missed has been loaded, the index is right."""
        for node in self.nodes.values():
            if node.pages:
                self.load(node)
            if change := node.news.next_change():
                node.on_its_way.append(change)
            while node.on_its_way:
                self.deliver(node)
            if node.must_load:
                self.load(node)
            assert not node.must_load
        for hashes in asked:
            assert blocks_by_node(self.index.hits(keys_of(hashes), self.now)) == self.naive_hits(hashes)

    def naive_hits(self, hashes: Sequence[str]) -> dict[str, int]:
        found = {}
        for node_id, node in self.nodes.items():
            coming = {h for h, until in node.expected.items() if until > self.now}
            num_blocks = 0
            for place, block_hash in enumerate(hashes):
                last_of_part = hashes[place - place % PART_SIZE :][PART_SIZE - 1 : PART_SIZE]
                if block_hash not in node.cache.hashes and not (coming | node.cache.hashes) & {*last_of_part}:
                    break
                num_blocks += 1
            if num_blocks:
                found[node_id] = num_blocks
        return found

    def teardown(self) -> None:
        self.settle([[block_hash] for block_hash in HASHES] + [HASHES, HASHES[::-1]])

    @invariant()
    def nothing_is_kept_for_nobody(self) -> None:
        assert num_hashes(self.index) <= len(HASHES)


TestPrefixIndex = PrefixIndexMachine.TestCase
TestPrefixIndex.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
