"""How a broken invariant is reported: with both sides of the equation. Knows nothing of what it compares."""

from __future__ import annotations


class IntegrityError(AssertionError):
    """The books of the KV cache contradict each other: a bug, never a user's fault."""


def expect_equal(what: str, left: object, right: object) -> None:
    """Raises `IntegrityError` that names both sides unless they are equal."""
    if left != right:
        raise IntegrityError(f"{what}: {left!r} != {right!r}")
