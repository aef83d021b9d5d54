"""The gateway's view of its cluster: which nodes serve its model, and which of them are ready."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import msgspec

from flowkv_common.wire.messages import ModelCard, ModelFiles
from flowkv_common.wire.nodes import (
    SILENT_AFTER_PERIODS,
    LoadReport,
    NodeDescriptor,
    serves_decode,
    serves_prefill,
)

log = logging.getLogger(__name__)


class OwnModel(msgspec.Struct, frozen=True):
    """The files in the gateway's model folder, and the name that clients use; empty: the nodes' name."""

    files: ModelFiles
    name: str = ""

    def why_not(self, card: ModelCard) -> str | None:
        """Why nodes with this card serve another model; None if they serve ours.

        The tokenizer must be the same. Then the weights decide, where both sides have them. Else the rest of
        what is known must agree: config and name.
        """
        ours, theirs = self.files, card.files
        if ours.tokenizer and theirs.tokenizer and ours.tokenizer != theirs.tokenizer:
            return "its tokenizer.json differs"
        if ours.weights and theirs.weights:
            return "its weights differ" if ours.weights != theirs.weights else None
        if ours.config and theirs.config and ours.config != theirs.config:
            return "its config.json differs"
        if self.name and self.name != card.name:
            return f"it is not called {self.name!r}, and there are no weights here to compare"
        return None


class Cluster:
    """The nodes of the gateway's own model, from their descriptors and load reports.

    Two sets of weights can fit while they are exchanged: then nodes stand under two fingerprints, and new
    requests go to one of them. Which nodes work together is the scheduler's business.
    """

    def __init__(self, own: OwnModel, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = own
        self._clock = clock
        self._by_fingerprint: dict[str, dict[str, NodeDescriptor]] = {}
        self._reports: dict[str, tuple[float, LoadReport]] = {}  # node id -> when it came, and the report
        self.model: ModelCard | None = None  # of new requests; None until a node of ours has joined
        self._others: dict[str, str] = {}  # node id -> why it serves another model

    def on_nodes(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
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

    def on_report(self, report: LoadReport) -> None:
        _, before = self._reports.get(report.node.node_id, (0.0, None))
        self._reports[report.node.node_id] = (self._clock(), report)
        if before is None or _standing(before) != _standing(report):
            self._choose_model()

    def touch_all(self) -> None:
        """After a reconnect: the silence was ours, not the nodes'."""
        self._reports = {name: (self._clock(), report) for name, (_, report) in self._reports.items()}

    def block_size(self, fingerprint: str) -> int | None:
        """Tokens per KV block at most nodes of this fingerprint; None while there are none."""
        nodes = self._by_fingerprint.get(fingerprint, {}).values()
        sizes = Counter(node.layout.block_size for node in nodes).most_common(1)
        return sizes[0][0] if sizes else None

    def num_nodes(self) -> int:
        """Nodes that serve the model."""
        return len(self._by_fingerprint.get(self.model.fingerprint, ())) if self.model else 0

    def num_prefill_nodes(self) -> int:
        """Ready nodes that serve prefill of the model."""
        return len(self._prefill_reports())

    def prompt_tokens_at_once(self, are_short: bool) -> int:
        """That these nodes may compute in one step; in short ones in twice an empty one's time."""
        num_tokens = 0
        for report in self._prefill_reports():
            most, step = report.max_prefill_tokens_per_step, report.step
            if are_short and step is not None and step.prefill_token_s * most > step.base_s:
                most = int(step.base_s / step.prefill_token_s)
            num_tokens += most
        return num_tokens

    def _prefill_reports(self) -> list[LoadReport]:
        reports = self._fresh_reports(self.model.fingerprint) if self.model else ()
        return [
            report
            for node, report in reports
            if report.ready and serves_prefill(report.max_prefill_tokens_per_step, node.layout.block_size)
        ]

    def has_ready_node(self) -> bool:
        return self.model is not None and self._num_ready(self.model.fingerprint)[1] > 0

    def kv_cache_usage(self) -> float:
        """The share of blocks in use, 0 to 1, over all nodes of the model that report; 0 if none does."""
        reports = self._fresh_reports(self.model.fingerprint) if self.model else ()
        blocks = [report.blocks for _, report in reports]
        used = sum(one.leased + one.quarantined for one in blocks)
        return used / max(1, sum(one.total for one in blocks))

    def _fresh_reports(self, fingerprint: str) -> Iterator[tuple[NodeDescriptor, LoadReport]]:
        """The nodes that have reported lately and since they started, with their reports."""
        now = self._clock()
        for node_id, node in self._by_fingerprint.get(fingerprint, {}).items():
            heard_at, report = self._reports.get(node_id, (0.0, None))
            if report is None or report.node != node.node:
                continue
            if now - heard_at < SILENT_AFTER_PERIODS * report.period_s:
                yield node, report

    def _choose_model(self) -> None:
        """The weights that were served while any node has them; then most pairs, then most nodes."""
        if not self._by_fingerprint:
            return
        current = self.model

        def rank(fingerprint: str) -> tuple[bool, tuple[int, int], bool, str]:
            card = next(iter(self._by_fingerprint[fingerprint].values())).model
            num_ready = self._num_ready(fingerprint)
            # Where there are no weights here, others' may fit this gateway: they must not push ours aside.
            stays = current is not None and num_ready[1] > 0 and card.files.weights == current.files.weights
            return stays, num_ready, current is not None and fingerprint == current.fingerprint, fingerprint

        best = max(self._by_fingerprint, key=rank)
        nodes = list(self._by_fingerprint[best].values())
        [(name, _)] = Counter(sorted(node.model.name for node in nodes)).most_common(1)
        # The scheduler refuses a context that is longer than the largest KV cache.
        largest = max(node.num_blocks * node.layout.block_size for node in nodes)
        card = nodes[-1].model
        max_model_len = min(card.max_model_len, largest)
        self.model = msgspec.structs.replace(card, name=name, max_model_len=max_model_len)
        if current is None or best != current.fingerprint:
            log.info("served by the nodes of %s, fingerprint %s", name, best)

    def _num_ready(self, fingerprint: str) -> tuple[int, int]:
        """Ready nodes on the smaller of the two sides, and on both. A mixed node stands on each side."""
        num_prefill = num_decode = 0
        for node, report in self._fresh_reports(fingerprint):
            if report.ready:
                chunk_budget = report.max_prefill_tokens_per_step
                num_prefill += serves_prefill(chunk_budget, node.layout.block_size)
                num_decode += serves_decode(chunk_budget, node.token_budget)
        return min(num_prefill, num_decode), num_prefill + num_decode


def _standing(report: LoadReport) -> tuple[str, bool, int]:
    """What of a report decides whether, and on which side, its node counts."""
    return report.node.incarnation, report.ready, report.max_prefill_tokens_per_step
