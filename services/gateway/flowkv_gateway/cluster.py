"""The gateway's view of its cluster: which nodes serve which of its models, and which of them are ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from flowkv_common.wire.messages import ModelCard, ModelFiles
from flowkv_common.wire.nodes import (
    SILENT_AFTER_PERIODS,
    LoadReport,
    NodeDescriptor,
    serves_decode,
    serves_prefill,
)
from flowkv_gateway.turns import Turns

log = logging.getLogger(__name__)


class OwnModel(msgspec.Struct, frozen=True):
    """The files in a model folder of the gateway, and the name that clients use; empty: the nodes' name."""

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
            mend = f"if it is the same model, start its nodes with FLOWKV_MODEL_NAME={self.name!r}"
            return f"it is not called {self.name!r}, and there are no weights here to compare: {mend}"
        return None


class ModelNodes:
    """The nodes of one model of the gateway, from their descriptors and load reports.

    Two sets of weights can fit while they are exchanged: then nodes stand under two fingerprints, and new
    requests go to one of them. Which nodes work together is the scheduler's business.
    """

    def __init__(self, own: OwnModel, clock: Callable[[], float] = time.monotonic) -> None:
        self.own = own
        self._clock = clock
        self._by_fingerprint: dict[str, dict[str, NodeDescriptor]] = {}
        self._fingerprints: set[str] = set()  # also of weights that were exchanged
        self._reports: dict[str, tuple[float, LoadReport]] = {}  # node id -> when it came, and the report
        self.model: ModelCard | None = None  # of new requests; None until a node of ours has joined
        self.turns = Turns(self.num_nodes, self.num_prefill_nodes, self.prompt_tokens_at_once)

    def on_nodes(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """Those that serve it have changed. It outlives them: clients may ask for it at any time."""
        self._reports = {name: heard for name, heard in self._reports.items() if name in descriptors}
        self._by_fingerprint = {}
        for node_id, node in descriptors.items():
            self._by_fingerprint.setdefault(node.model.fingerprint, {})[node_id] = node
        self._fingerprints |= self._by_fingerprint.keys()
        self._choose_model()

    def has_served(self, fingerprint: str) -> bool:
        """Whether requests for this fingerprint are, or were, requests for this model."""
        return fingerprint in self._fingerprints

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

    @property
    def has_nodes(self) -> bool:
        """Whether the registry has any, ready or not."""
        return bool(self._by_fingerprint)

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


class Cluster:
    """All nodes: each under the model that it serves, if that is one of the gateway's."""

    def __init__(self, models: Iterable[ModelNodes]) -> None:
        self.models = list(models)
        self.changed = asyncio.Event()  # set with each change of the registry
        self.others: dict[str, tuple[NodeDescriptor, str]] = {}  # by id: of no model here, and why
        self._descriptors: dict[str, NodeDescriptor] = {}
        self._served: dict[str, ModelNodes] = {}  # by id of the node

    def add(self, nodes: ModelNodes) -> None:
        """One more model. Those that serve it are ready with their next reports."""
        self.models.append(nodes)
        self.on_nodes(self._descriptors)

    def remove(self, nodes: ModelNodes) -> None:
        """Forget a model. Nodes that still serve it count as others."""
        self.models.remove(nodes)
        self.on_nodes(self._descriptors)

    def of(self, fingerprint: str) -> ModelNodes | None:
        """The nodes of the model that a request is for, by the fingerprint that it began with.

        None for a model that has been removed.
        """
        if len(self.models) == 1:
            return self.models[0]
        return next((nodes for nodes in self.models if nodes.has_served(fingerprint)), None)

    def on_nodes(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """The registry has changed."""
        self._descriptors = dict(descriptors)
        self._served, self.others = {}, {}
        for node_id, node in descriptors.items():
            reasons = {nodes: nodes.own.why_not(node.model) for nodes in self.models}
            fitting = [nodes for nodes, reason in reasons.items() if reason is None]
            if fitting:
                # A folder without weights may fit nodes that another folder has the weights of.
                exact = (nodes for nodes in fitting if nodes.own.files == node.model.files)
                self._served[node_id] = next(exact, fitting[0])
            else:
                self.others[node_id] = node, "; ".join(filter(None, reasons.values()))
        for nodes in self.models:
            mine = (node_id for node_id, served in self._served.items() if served is nodes)
            nodes.on_nodes({node_id: descriptors[node_id] for node_id in mine})
        self.changed.set()

    def on_report(self, report: LoadReport) -> None:
        served = self._served.get(report.node.node_id)
        # A report may come before its node is in the registry.
        for nodes in self.models if served is None else (served,):
            nodes.on_report(report)

    def touch_all(self) -> None:
        """After a reconnect: the silence was ours, not the nodes'."""
        for nodes in self.models:
            nodes.touch_all()


def _standing(report: LoadReport) -> tuple[str, bool, int]:
    """What of a report decides whether, and on which side, its node counts."""
    return report.node.incarnation, report.ready, report.max_prefill_tokens_per_step
