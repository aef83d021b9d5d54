"""What a request wants its answer to look like, as one grammar, and the check that nodes can keep to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from flowkv_common.errors import BadRequest, Full, Unavailable
from flowkv_common.grammar import JSON_OPTIONS
from flowkv_common.wire.messages import Grammar
from flowkv_gateway.dates import with_exact_dates
from flowkv_gateway.grammar_text import first_part, in_grammar, up_to, without
from flowkv_gateway.schemas import ChoicesRequest, ResponseFormat, StructuralTag, StructuredOutputs
from flowkv_gateway.tokenizer import Vocabulary

# In JSON. It travels in a message of 1 MiB with the request; OpenAI takes schemas of 120,000 characters.
MAX_GRAMMAR_BYTES = 128 * 1024
COMPILE_TIMEOUT_S = 1.0
# Python starts, and the compiler reads the tokenizer: 0.3 s, with the largest 2 s, on a busy machine more.
START_TIMEOUT_S = 20.0
# Behind other requests' new grammars.
QUEUE_TIMEOUT_S = 5.0
MAX_CHECKED = 1024  # outcomes that are remembered; a grammar is 1 KiB or so


class Wanted(NamedTuple):
    """A grammar, and the field of the request that asks for it."""

    field: str
    grammar: Grammar


def wanted_grammar(request: ChoicesRequest, vocabulary: Vocabulary) -> Wanted | None:
    """Raises BadRequest for two that differ, for one that says nothing, and for one that is too large.

    Clients may ask for the same twice, by vLLM's older and newer field.
    """
    wanted = [
        *_of_response_format(request.response_format, vocabulary),
        *_of_structured_outputs(request.structured_outputs, vocabulary),
        *_of_guided(request),
    ]
    if not wanted:
        return None
    if any(one.grammar != wanted[0].grammar for one in wanted):
        names = " and ".join(one.field for one in wanted)
        raise BadRequest(f"An answer has one format: {names} can't be given together.", field=wanted[1].field)
    return check_size(wanted[0])


def check_size(wanted: Wanted) -> Wanted:
    """The same. Raises BadRequest for one that is too large."""
    field, grammar = wanted
    num_bytes = len(msgspec.json.encode(grammar.text))
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise BadRequest(f"{field} has {num_bytes} bytes, {MAX_GRAMMAR_BYTES} are taken.", field=field)
    return wanted


def _of_response_format(asked: ResponseFormat | None, vocabulary: Vocabulary) -> Iterator[Wanted]:
    if asked is None or asked.type == "text":
        return
    if asked.type == "json_object":
        yield Wanted("response_format", _ANY_OBJECT)
    elif asked.type == "json_schema":
        if asked.json_schema is None or asked.json_schema.schema is None:
            raise BadRequest("The schema is missing.", field="response_format.json_schema.schema")
        field = "response_format.json_schema.schema"
        yield Wanted(field, json_schema(asked.json_schema.schema, field))
    else:
        yield Wanted("response_format", _structural_tag(asked, "response_format", vocabulary))


def _of_structured_outputs(asked: StructuredOutputs | None, vocabulary: Vocabulary) -> Iterator[Wanted]:
    if asked is None:
        return
    field = "structured_outputs"
    for name in ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"):
        if getattr(asked, name):
            raise BadRequest(f"{field}.{name} is not supported.", field=f"{field}.{name}")
    if asked.json is not None:
        yield Wanted(f"{field}.json", json_schema(asked.json, f"{field}.json"))
    if asked.regex is not None:
        yield Wanted(f"{field}.regex", Grammar(kind="regex", text=asked.regex))
    if asked.choice is not None:
        yield Wanted(f"{field}.choice", _choice(asked.choice))
    if asked.grammar is not None:
        yield Wanted(f"{field}.grammar", Grammar(kind="ebnf", text=asked.grammar))
    if asked.json_object:
        yield Wanted(f"{field}.json_object", _ANY_OBJECT)
    if asked.structural_tag is not None:
        field = f"{field}.structural_tag"
        try:
            tag = msgspec.json.decode(asked.structural_tag, type=StructuralTag)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRequest(f"{field}: {error}", field=field) from None
        yield Wanted(field, _structural_tag(tag, field, vocabulary))


def _of_guided(request: ChoicesRequest) -> Iterator[Wanted]:
    """What `structured_outputs` has replaced. Empty values ask for nothing."""
    if request.guided_json not in (None, "", {}):
        yield Wanted("guided_json", json_schema(request.guided_json, "guided_json"))
    if request.guided_regex:
        yield Wanted("guided_regex", Grammar(kind="regex", text=request.guided_regex))
    if request.guided_choice:
        yield Wanted("guided_choice", _choice(request.guided_choice))
    if request.guided_grammar:
        yield Wanted("guided_grammar", Grammar(kind="ebnf", text=request.guided_grammar))


def json_schema(schema: Any, field: str) -> Grammar:
    """Of a schema, or of its text. The order of properties is kept: answers have them in that order."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRequest(f"{field} is no JSON: {error}", field=field) from None
    if schema is True:  # any JSON
        schema = {}
    if not isinstance(schema, dict):
        raise BadRequest(f"{field} is no JSON schema that an answer can be of.", field=field)
    try:
        return Grammar(kind="json_schema", text=msgspec.json.encode(with_exact_dates(schema)).decode())
    except RecursionError:
        raise BadRequest(f"{field} is nested too deeply.", field=field) from None


def json_rule(grammar: Grammar) -> str:
    """JSON of the schema of this grammar, in a rule of another. Raises BadRequest."""
    try:
        schema = msgspec.json.decode(grammar.text)
        return "%json " + msgspec.json.encode({**schema, "x-guidance": JSON_OPTIONS}).decode()
    except RecursionError:
        raise BadRequest("A JSON schema is nested too deeply.") from None


_ANY_OBJECT = Grammar(kind="json_schema", text='{"type":"object"}')


def _choice(texts: list[str]) -> Grammar:
    return Grammar(kind="lark", text="start: " + " | ".join(map(_quoted, texts)))


def _structural_tag(tag: StructuralTag | ResponseFormat, field: str, vocabulary: Vocabulary) -> Grammar:
    """Free text; where a trigger stands, a structure that begins with it, its JSON, its end."""
    if not tag.structures or not tag.triggers:
        raise BadRequest(
            f"{field} needs structures and triggers, other forms are not supported.", field=field
        )
    triggers = [first_part(trigger, vocabulary) for trigger in tag.triggers if trigger]
    rules, begun = [f"TEXT: {without(triggers, vocabulary)}"], []
    for place, one in enumerate(tag.structures):
        trigger = next((trigger for trigger in tag.triggers if trigger and one.begin.startswith(trigger)), "")
        if not trigger:
            raise BadRequest(
                f"{field}: structure {place} begins with none of the triggers.", field=f"{field}.structures"
            )
        schema = json_rule(json_schema(one.schema, f"{field}.structures[{place}].schema"))
        trigger = first_part(trigger, vocabulary)
        begin, end = (in_grammar(text, vocabulary) for text in (one.begin[len(trigger) :], one.end))
        rules += [
            up_to(f"begin_{place}", trigger, vocabulary, text="TEXT"),
            f"structure_{place}: begin_{place} {begin} {schema} {end}",
        ]
        begun.append(f"structure_{place}")
    return Grammar(kind="lark", text="\n".join([f"start: ({' | '.join(begun)})* TEXT", *rules]))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- the check ----------------------------------------------------------------------------------------


class GrammarChecker:
    """Tells whether nodes can keep to a grammar, in a process that starts with the first one.

    It compiles them as nodes will. A process, since a grammar can be written that takes any time or memory to
    compile, or that aborts its compiler. An async context manager, or `close` it.
    """

    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer_file = tokenizer_file
        self._complaints: OrderedDict[Grammar, str] = OrderedDict()  # of those checked last; empty: none
        self._lock = asyncio.Lock()  # of the process
        self._process: Process | None = None

    async def __aenter__(self) -> GrammarChecker:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the process. It starts again with the next grammar."""
        await self._end()

    async def check(self, wanted: Wanted) -> None:
        """Raises BadRequest with what can't be kept to, and Full while other new grammars are compiled."""
        field, grammar = wanted
        complaint = self._complaints.pop(grammar, None)
        if complaint is None:
            try:
                complaint = await self._compile(grammar)
            except BadRequest as error:
                raise BadRequest(f"{field}: {error.message}", field=field) from None
        self._complaints[grammar] = complaint
        if len(self._complaints) > MAX_CHECKED:
            self._complaints.popitem(last=False)
        if complaint:
            raise BadRequest(f"{field}: {complaint}", field=field)

    async def _compile(self, grammar: Grammar) -> str:
        """What the compiler says against it, or empty. Raises BadRequest if it does not come to an end."""
        try:
            await asyncio.wait_for(self._lock.acquire(), QUEUE_TIMEOUT_S)
        except TimeoutError:
            raise Full("Too many new formats of answers at once.", retry_after_s=QUEUE_TIMEOUT_S) from None
        line = b""
        try:
            process = self._process or await self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(ConnectionError):
                process.stdin.write(msgspec.json.encode(grammar) + b"\n")
                async with asyncio.timeout(COMPILE_TIMEOUT_S):
                    await process.stdin.drain()
                    line = await process.stdout.readline()
            if not line:
                raise BadRequest("it takes too much memory to compile.")
            return msgspec.json.decode(line, type=str)
        except TimeoutError:
            raise BadRequest(f"it takes longer than {COMPILE_TIMEOUT_S:g} s to compile.") from None
        finally:
            if not line:  # also if the client has left: it must not come to the next one
                await asyncio.shield(self._end())
            self._lock.release()

    async def _start(self) -> Process:
        """The process, with its tokenizer read. Raises Unavailable."""
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flowkv_gateway.compile_grammars", str(self._tokenizer_file)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the gateway, which ends it
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                if await process.stdout.readline():
                    return process
        except TimeoutError:
            pass
        raise Unavailable("The compiler of grammars does not start.", retry_after_s=START_TIMEOUT_S)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            # Closes the pipes, too.
            await process.communicate()
