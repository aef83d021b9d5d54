"""What the gateway knows of the nodes: which model they serve, and whether a request could be served now.

Only nodes of the gateway's own model count. Several fingerprints may fit it, while its weights or their dtype
are being changed: new requests go to the one with the most pairs of nodes, and each stays with its own.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_common.wire.parts import ModelCard
from flowkv_gateway.own_model import OwnModel
from flowkv_gateway.prompt_hashes import HashBasis

log = logging.getLogger(__name__)

# A node that has missed so many reports does not count as ready.
MISSED_REPORTS = 4


class Cluster:
    """Fed by the registry and by load reports; chooses nothing but the fingerprint."""

    def __init__(self, own: OwnModel, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = own
        self._clock = clock
        self._by_fingerprint: dict[str, dict[str, NodeDescriptor]] = {}
        self._reports: dict[str, tuple[float, LoadReport]] = {}
        self._model: ModelCard | None = None
        self._others: dict[str, str] = {}  # node id -> why it is none of ours

    def follow(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """The registry has changed. The model outlives its nodes: clients may ask for it at any time."""
        self._reports = {name: heard for name, heard in self._reports.items() if name in descriptors}
        self._by_fingerprint = {}
        others = {}
        for node_id, node in descriptors.items():
            if reason := self._own.why_not(node.model):
                others[node_id] = reason
                if node_id not in self._others:
                    log.warning("%s serves another model, %s: %s", node_id, node.model.name, reason)
            else:
                self._by_fingerprint.setdefault(node.model.fingerprint, {})[node_id] = node
        self._others = others
        self._choose_model()

    def hear(self, report: LoadReport) -> None:
        """The latest word of a node."""
        _, before = self._reports.get(report.node.node_id, (0.0, None))
        self._reports[report.node.node_id] = (self._clock(), report)
        if before is None or _standing(before) != _standing(report):
            self._choose_model()

    def model(self) -> ModelCard | None:
        """Of new requests; None until a node of ours has joined."""
        return self._model

    def hash_basis(self, fingerprint: str) -> HashBasis | None:
        """How the nodes of a fingerprint hash their blocks, most of them; None while there are none."""
        nodes = self._by_fingerprint.get(fingerprint)
        if not nodes:
            return None
        [(block_size, _)] = Counter(node.layout.block_size for node in nodes.values()).most_common(1)
        return HashBasis(fingerprint, block_size)

    def has_ready_node(self) -> bool:
        """Which of them can work together is known to the scheduler."""
        return self._model is not None and self._num_of_sides(self._model.fingerprint)[1] > 0

    def kv_cache_usage(self) -> float:
        """The share of blocks in use, 0 to 1, over all nodes of the model that report; 0 if none does."""
        nodes = self._by_fingerprint.get(self._model.fingerprint, {}) if self._model else {}
        blocks = [report.blocks for _, report in self._fresh(nodes)]
        used = sum(one.leased + one.quarantined for one in blocks)
        return used / max(1, sum(one.total for one in blocks))

    def _fresh(self, nodes: Mapping[str, NodeDescriptor]) -> Iterator[tuple[NodeDescriptor, LoadReport]]:
        """The nodes that have reported lately, in this life, with their reports."""
        now = self._clock()
        for node_id, node in nodes.items():
            heard_at, report = self._reports.get(node_id, (0.0, None))
            if report is None or report.node != node.node:
                continue
            if now - heard_at < MISSED_REPORTS * report.period_s:
                yield node, report

    def _choose_model(self) -> None:
        """The weights that were served while any node has them; then most pairs, then most nodes."""
        if not self._by_fingerprint:
            return
        current = self._model

        def rank(fingerprint: str) -> tuple[bool, tuple[int, int], bool, str]:
            card = next(iter(self._by_fingerprint[fingerprint].values())).model
            nums = self._num_of_sides(fingerprint)
            # Where there are no weights here, others' may fit this gateway: they must not push ours aside.
            stays = current is not None and nums[1] > 0 and card.files.weights == current.files.weights
            return stays, nums, current is not None and fingerprint == current.fingerprint, fingerprint

        best = max(self._by_fingerprint, key=rank)
        self._model = _servable(list(self._by_fingerprint[best].values()))
        if current is None or best != current.fingerprint:
            log.info("served by the nodes of %s, fingerprint %s", self._model.name, best)

    def _num_of_sides(self, fingerprint: str) -> tuple[int, int]:
        """How many are ready: on the smaller side, and on both. A mixed node stands on each side."""
        num_prefill = num_decode = 0
        for node, report in self._fresh(self._by_fingerprint.get(fingerprint, {})):
            if not report.ready:
                continue
            num_prefill += report.max_prefill_tokens_per_step > node.layout.block_size
            num_decode += report.max_prefill_tokens_per_step < node.token_budget
        return min(num_prefill, num_decode), num_prefill + num_decode


def _standing(report: LoadReport) -> tuple[str, bool, int]:
    """What of a report decides whether, and on which side, its node counts."""
    return report.node.incarnation, report.ready, report.max_prefill_tokens_per_step


def _servable(nodes: Sequence[NodeDescriptor]) -> ModelCard:
    """The model, its context no longer than the largest KV cache: the scheduler refuses what is.

    It is called as most of its nodes say.
    """
    [(name, _)] = Counter(sorted(node.model.name for node in nodes)).most_common(1)
    largest = max(node.num_blocks * node.layout.block_size for node in nodes)
    model = nodes[-1].model
    return msgspec.structs.replace(model, name=name, max_model_len=min(model.max_model_len, largest))
