"""A pool that NIXL can't reach, as some on GPUs are, in host memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from flowkv_engine.transport.nixl_memory import Library, find_library

NIXL_SAYS_NO = "NIXL_ERR_BACKEND"


def library_without(pool: torch.Tensor, *, can_show: bool = False, can_read_into: bool = False) -> Library:
    """NIXL's library, which can't register this pool: to be read by others, or to be read into."""

    def new_agent(agent: Any, config: Any) -> _Agent:
        can_register = can_show if config.useProgThread else can_read_into
        return _Agent(agent, None if can_register else pool.data_ptr(), [])

    return _library(new_agent)


def library_that_fails(num_reads: int) -> Library:
    """NIXL's library, of which so many reads fail at first: registering alone does not tell."""
    failing = [NIXL_SAYS_NO] * num_reads
    return _library(lambda agent, _: _Agent(agent, None, failing))


def _library(new_agent: Callable[[Any, Any], _Agent]) -> Library:
    library = find_library()

    def make(name: str, config: Any) -> _Agent:
        return new_agent(library.bindings.nixlAgent(name, config), config)

    return library._replace(bindings=SimpleNamespace(**vars(library.bindings) | {"nixlAgent": make}))


class _Agent:
    """One of NIXL's agents. `unreachable` is an address, `failing` has an item for each read that fails."""

    def __init__(self, agent: Any, unreachable: int | None, failing: list[str]) -> None:
        self._agent = agent
        self._unreachable = unreachable
        self._failing = failing

    def registerMem(self, spans: Any) -> None:
        if spans[0][0] == self._unreachable:
            raise find_library().bindings.nixlBackendError(NIXL_SAYS_NO)
        self._agent.registerMem(spans)

    def postXferReq(self, handle: Any) -> Any:
        if self._failing:
            raise find_library().bindings.nixlBackendError(self._failing.pop())
        return self._agent.postXferReq(handle)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)
