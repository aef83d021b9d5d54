"""What the gateway knows of the nodes: which model they serve, and whether a request could be served now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from flowkv_common.wire.nodes import LoadReport, NodeDescriptor
from flowkv_common.wire.parts import ModelCard
from flowkv_gateway.prompt_hashes import HashBasis

# A node that has missed so many reports does not count as ready.
MISSED_REPORTS = 4


class Cluster:
    """Fed by the registry and by load reports; chooses nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._descriptors: dict[str, NodeDescriptor] = {}
        self._reports: dict[str, tuple[float, LoadReport]] = {}
        self._model: ModelCard | None = None

    def follow(self, descriptors: Mapping[str, NodeDescriptor]) -> None:
        """The registry has changed. The model outlives its nodes: clients may ask for it at any time."""
        self._descriptors = dict(descriptors)
        self._reports = {name: heard for name, heard in self._reports.items() if name in descriptors}
        if self._descriptors:
            self._model = _servable(list(self._descriptors.values()))

    def hear(self, report: LoadReport) -> None:
        self._reports[report.node.node_id] = (self._clock(), report)

    def model(self) -> ModelCard | None:
        return self._model

    def hash_basis(self) -> HashBasis | None:
        """How the nodes hash their blocks; None while no node is known."""
        if not self._descriptors:
            return None
        node = list(self._descriptors.values())[-1]
        return HashBasis(node.model.fingerprint, node.layout.block_size)

    def is_ready(self) -> bool:
        """At least one node that takes prompts and one that takes decodes; a mixed node is both."""
        caps = [
            (report.max_prefill_tokens_per_step, self._descriptors[node_id])
            for node_id, (heard_at, report) in self._reports.items()
            if node_id in self._descriptors
            and report.ready
            and self._clock() - heard_at < MISSED_REPORTS * report.period_s
        ]
        can_prefill = any(cap > node.layout.block_size for cap, node in caps)
        can_decode = any(cap < node.token_budget for cap, node in caps)
        return can_prefill and can_decode


def _servable(nodes: Sequence[NodeDescriptor]) -> ModelCard:
    """The model, its context no longer than the largest KV cache: the scheduler refuses what is."""
    model = nodes[-1].model
    largest = max(node.num_blocks * node.layout.block_size for node in nodes)
    return msgspec.structs.replace(model, max_model_len=min(model.max_model_len, largest))
