"""Who shares a gateway: each name in the file of keys is a tenant, with its limits and the tokens it got.

All of it is of one gateway: another counts for itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Iterator

from flowkv_gateway.errors import KeyLimit

# A tenant that comes back within this time has not left: people read an answer, agents use their tools.
PRESENT_S = 600.0
# One that has just asked is likely to ask again: its next request is waited for.
EXPECTED_S = 10.0


class Tenants:
    """All that were seen, each with the same limits; 0 is none."""

    def __init__(
        self, max_requests: int, tokens_per_minute: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_requests = max_requests
        self.tokens_per_minute = tokens_per_minute
        self.clock = clock
        self.by_name: dict[str, Tenant] = {}

    def find(self, name: str) -> Tenant:
        """The tenant of this name; it is made when it is first asked for."""
        if name not in self.by_name:
            self.by_name[name] = Tenant(name, self)
        return self.by_name[name]


class Tenant:
    """The requests of all keys of one name. Made by `Tenants.find`."""

    def __init__(self, name: str, all_of_them: Tenants) -> None:
        self.name = name
        self.num_open = 0  # requests
        self.served = 0.0  # tokens; the place among tenants, so it is moved on for times without requests
        self.last_turn = 0
        self._tenants = all_of_them
        self._tokens_left = float(all_of_them.tokens_per_minute)
        self._refilled_at = self._seen_at = all_of_them.clock()
        self._last_request_s = 0.0  # what the request took that ended last

    def is_alone(self) -> bool:
        """Whether no other has a request, or had one lately."""
        since = self._tenants.clock() - PRESENT_S
        others = (other for other in self._tenants.by_name.values() if other is not self)
        return not any(other.num_open or other._seen_at > since for other in others)

    def expects_another(self, waiting: Container[Tenant]) -> bool:
        """Whether another that asked just now may ask at any moment: its requests don't wait already."""
        since = self._tenants.clock() - EXPECTED_S
        others = (other for other in self._tenants.by_name.values() if other is not self)
        return any(other._seen_at >= since and other not in waiting for other in others)

    def add_tokens(self, num_tokens: int) -> None:
        """Tokens of an answer."""
        self.served += num_tokens
        self._tokens_left -= num_tokens

    @contextlib.contextmanager
    def open_request(self, num_prompt_tokens: int) -> Iterator[None]:
        """Around all that is done for a request. Raises KeyLimit for one that is over a limit."""
        began = self._tenants.clock()
        if 0 < self._tenants.max_requests <= self.num_open:
            raise KeyLimit(
                f"The key has {self.num_open} open requests, it may not have more.",
                # They end evenly, if they take as long as the last one did.
                retry_after_s=self._last_request_s / self.num_open,
            )
        self._take_tokens(num_prompt_tokens, began)
        if not self.num_open:
            # Without requests no share is saved up.
            busy = [other.served for other in self._tenants.by_name.values() if other.num_open]
            self.served = max(self.served, min(busy, default=0.0))
        self.num_open += 1
        self._seen_at = began
        try:
            yield
        finally:
            self.num_open -= 1
            self._seen_at = self._tenants.clock()
            self._last_request_s = self._seen_at - began

    def _take_tokens(self, num_tokens: int, now: float) -> None:
        """A prompt, and answers, may take more than is left: the next request waits until that is made up."""
        most = self._tenants.tokens_per_minute
        if not most:
            return
        refill = (now - self._refilled_at) * most / 60.0
        self._tokens_left, self._refilled_at = min(float(most), self._tokens_left + refill), now
        if self._tokens_left < 1.0:
            raise KeyLimit(
                f"The key's {most} tokens per minute are used up.",
                retry_after_s=(1.0 - self._tokens_left) * 60.0 / most,
            )
        self._tokens_left -= num_tokens
