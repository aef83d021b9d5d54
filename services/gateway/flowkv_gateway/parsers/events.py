"""What a parser finds in an answer. All texts of one kind, put together, are what the client reads."""

from __future__ import annotations

from typing import NamedTuple


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


class CallBegins(NamedTuple):
    """`call` counts the answer's calls from 0. `id` is the model's own, which its template wants back."""

    call: int
    name: str
    id: str | None = None


class Arguments(NamedTuple):
    """A piece of this call's arguments. All pieces together are the JSON text of an object."""

    call: int
    text: str


class Leftover(NamedTuple):
    """Text that is no part of the answer.

    It stands where only calls may stand, or the answer breaks off in it, within a call: that call must not
    run.
    """

    text: str


Event = Content | Reasoning | CallBegins | Arguments | Leftover
