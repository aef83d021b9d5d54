"""How much of one prompt each node has cached. Pure: made by `PrefixIndex`, read by the policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


class Hits(Mapping[str, int]):
    """Blocks from the front of the prompt, by node id; nodes without the first one are left out.

    Nodes are kept as bits: a prefix that a thousand nodes share costs no more than one of a single node.
    """

    def __init__(
        self, ends: Sequence[tuple[int, int]], names: Sequence[str], bit_of: Mapping[str, int]
    ) -> None:
        """`ends`: so many blocks, and the bits of the nodes that have those and no more; shortest first."""
        self._ends = ends
        self._names = names
        self._bit_of = bit_of

    def of(self, node_id: str) -> int:
        """0 for a node that has none."""
        if self._ends:
            bit = self._bit_of.get(node_id, 0)
            for num_blocks, bits in self._ends:
                if bits & bit:
                    return num_blocks
        return 0

    def longest_first(self) -> Iterator[str]:
        """All that have any; equals in the order of their bits."""
        for _, bits in reversed(self._ends):
            while bits:
                lowest = bits & -bits
                yield self._names[lowest.bit_length() - 1]
                bits ^= lowest

    def __getitem__(self, node_id: str) -> int:
        if num_blocks := self.of(node_id):
            return num_blocks
        raise KeyError(node_id)

    def __iter__(self) -> Iterator[str]:
        return self.longest_first()

    def __len__(self) -> int:
        return sum(bits.bit_count() for _, bits in self._ends)
