"""Writes the tables of docs/api.md from the code: run this file after a change to either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from flowkv_gateway.schemas import (
    REFUSED,
    ChatRequest,
    ChoicesRequest,
    CompletionRequest,
    GenerationRequest,
    ResponseRequest,
    TokenizeRequest,
)

# Accepted like any unknown field, since nothing here depends on them.
CHANGE_NOTHING = {
    "metadata": "for stored answers",
    "store": "chats and completions are not stored",
    "max_tool_calls": "of tools that run on a server, which are refused",
    "background_options": "of background responses, which are refused",
    "image": "of images, which are refused",
    "access_programs": "of OpenAI's models",
    "prompt_cache_key": "the prefix cache finds its blocks by what they hold",
    "prompt_cache_options": "the same",
    "prompt_cache_retention": "the same",
    "prediction": "would make an answer faster, not another one",
    "length_penalty": "of beam search, which is refused",
    "spaces_between_special_tokens": "there are never any",
    "guided_decoding_backend": "grammars have one compiler",
    "media_io_kwargs": "of images and sound, which are refused",
    "mm_processor_kwargs": "the same",
    "return_mm_kwargs": "the same",
    "return_token_offsets": "of an endpoint that does not exist here",
    "routed_experts_prompt_start": "the choice of experts is not shown",
    "request_id": "an answer's id is the gateway's",
    "session_id": "related requests are known by what they share",
    "stream_interval": "a stream has a chunk per token",
}

BODIES = {
    ChatRequest: ("chat", "/v1/chat/completions"),
    CompletionRequest: ("completions", "/v1/completions"),
    ResponseRequest: ("responses", "/v1/responses"),
    TokenizeRequest: ("tokenize", "/tokenize"),
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def page_from_code(page: str) -> str:
    """The page with its tables as the code has them."""
    for name, lines in (("served", _served()), ("refused", _refused()), ("nothing", _nothing())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        assert begin in page, f"docs/api.md has no {begin}"
        table = "\n".join([begin, *lines, end])
        before, _, rest = page.partition(begin)
        page = before + table + rest.partition(end)[2]
    return page


def _served() -> Iterator[str]:
    common = GenerationRequest.__struct_fields__
    yield f"- chat, completions and responses: {_names(common)}"
    choices = [name for name in ChoicesRequest.__struct_fields__ if name not in common]
    yield f"- chat and completions: {_names(choices)}"
    for kind, (_, path) in BODIES.items():
        told = () if kind is TokenizeRequest else (*common, *choices)
        own = [name for name in kind.__struct_fields__ if name not in told]
        yield f"- `{path}`: {_names(own)}"


def _refused() -> Iterator[str]:
    alike: dict[tuple[str, str, str], list[str]] = {}
    for row in REFUSED:
        accepted = ", ".join(f"`{json.dumps(value)}`" for value in row.accepted if value is not None)
        where = ", ".join(BODIES[kind][0] for kind in row.bodies)
        alike.setdefault((where, accepted, row.reason), []).append(row.name)
    for (where, accepted, reason), names in alike.items():
        but = f"; not {accepted}" if accepted else ""
        yield f"- {_names(names)} ({where}{but}): {reason}"


def _nothing() -> Iterator[str]:
    alike: dict[str, list[str]] = {}
    for name, reason in CHANGE_NOTHING.items():
        reason = list(alike)[-1] if reason == "the same" else reason
        alike.setdefault(reason, []).append(name)
    for reason, names in alike.items():
        yield f"- {_names(names)}: {reason}"


def _names(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page_from_code(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
