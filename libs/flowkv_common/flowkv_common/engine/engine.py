"""What a node asks of an engine. `tests/contract/test_engines.py` holds all of them to it."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from flowkv_common.engine.batch import PackedBatch
from flowkv_common.engine.sampler import Sampled

Result = list[Sampled | None]


class DeviceLost(Exception):
    """The device computes nothing more for this process: after a CUDA error every further call fails."""


class Engine(Protocol):
    """Runs steps one after the other, in the order asked for. An async context manager.

    A step that is cancelled while it waits or runs goes on, and its result is dropped: its blocks may be
    written until a later step returns.
    """

    @property
    def busy_since(self) -> float | None:
        """Monotonic seconds; None while there is no work."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def step(self, batch: PackedBatch) -> Result:
        """One result per item of the batch; raises what computing it raises. `DeviceLost` is the end."""

    def wedge(self, for_s: float) -> None:
        """Holds all later steps up for so long (a test hook: the step that never ends)."""
