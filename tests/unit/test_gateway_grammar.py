"""From the fields of a request to one grammar, and the check that nodes can keep to it."""

from __future__ import annotations

import asyncio
import json
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer

from flowkv_common.errors import BadRequest, Full
from flowkv_common.grammar import Grammars
from flowkv_common.wire.messages import Grammar
from flowkv_gateway import grammar as gateway_grammar
from flowkv_gateway.grammar import MAX_GRAMMAR_BYTES, GrammarChecker, Wanted, wanted_grammar
from flowkv_gateway.schemas import ChatRequest, CompletionRequest, parse_request
from flowkv_gateway.tokenizer import Tokenizer, Vocabulary
from tests.gateway_support import EOS, write_tokenizer

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "integer"}}}
JSON_SCHEMA = Grammar(kind="json_schema", text=json.dumps(SCHEMA, separators=(",", ":")))
ANY_JSON = Grammar(kind="json_schema", text="{}")
ANY_OBJECT = Grammar(kind="json_schema", text='{"type":"object"}')
TAG: dict[str, Any] = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<call=add>", "schema": {"enum": [1, 2]}, "end": "</call>"},
        {"begin": "<call=say>", "schema": {"enum": ["hi"]}, "end": "</call>"},
    ],
    "triggers": ["<call="],
}

NO_VOCABULARY = Vocabulary({}, frozenset())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def wanted(vocabulary: Vocabulary = NO_VOCABULARY, **fields: Any) -> Wanted | None:
    """The same of both endpoints."""
    of_chat = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    found = wanted_grammar(parse_request(of_chat, ChatRequest), vocabulary)
    of_completion = json.dumps({"prompt": "hi", **fields}).encode()
    assert wanted_grammar(parse_request(of_completion, CompletionRequest), vocabulary) == found
    return found


def with_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize(
    ("fields", "field", "grammar"),
    [
        ({"response_format": with_schema(SCHEMA)}, "response_format.json_schema.schema", JSON_SCHEMA),
        ({"response_format": {"type": "json_object"}}, "response_format", ANY_OBJECT),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", JSON_SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "structured_outputs.json", JSON_SCHEMA),
        ({"structured_outputs": {"json": True}}, "structured_outputs.json", ANY_JSON),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", ANY_OBJECT),
        (
            {"structured_outputs": {"regex": "a|b"}},
            "structured_outputs.regex",
            Grammar(kind="regex", text="a|b"),
        ),
        (
            {"structured_outputs": {"grammar": "root ::= 'a'"}},
            "structured_outputs.grammar",
            Grammar(kind="ebnf", text="root ::= 'a'"),
        ),
        (
            {"structured_outputs": {"choice": ["a", 'b"\n\u00e9']}},
            "structured_outputs.choice",
            Grammar(kind="lark", text='start: "a" | "b\\"\\n\u00e9"'),
        ),
        ({"guided_json": SCHEMA}, "guided_json", JSON_SCHEMA),
        ({"guided_regex": "a"}, "guided_regex", Grammar(kind="regex", text="a")),
        ({"guided_choice": ["a"]}, "guided_choice", Grammar(kind="lark", text='start: "a"')),
        ({"guided_grammar": "start: /a/"}, "guided_grammar", Grammar(kind="ebnf", text="start: /a/")),
        (  # as guidance asks servers of any age
            {"structured_outputs": {"grammar": "start: /a/"}, "guided_grammar": "start: /a/"},
            "structured_outputs.grammar",
            Grammar(kind="ebnf", text="start: /a/"),
        ),
    ],
    ids=str,
)
def test_each_field_is_a_grammar(fields: dict[str, Any], field: str, grammar: Grammar) -> None:
    assert wanted(**fields) == (field, grammar)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None},
        {"structured_outputs": {"json_object": False, "disable_any_whitespace": False}},
        {"guided_json": {}, "guided_regex": "", "guided_choice": [], "guided_grammar": ""},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_none(fields: dict[str, Any]) -> None:
    assert wanted(**fields) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": with_schema(None)}, "response_format.json_schema.schema"),
        ({"response_format": with_schema("text")}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format"),
        ({"response_format": {**TAG, "triggers": ["<tool>"]}}, "response_format.structures"),
        ({"response_format": {**TAG, "triggers": [""]}}, "response_format.structures"),
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": False}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": ["a"]}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
        ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"structural_tag": "[" * 5000}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_json": "[" * 5000}, "guided_json"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_BYTES - 1)}, "guided_regex"),
        ({"guided_regex": "\x01" * (MAX_GRAMMAR_BYTES // 6 + 1)}, "guided_regex"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_field_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        wanted(**fields)
    assert refused.value.field == field


# --- what the grammars mean -----------------------------------------------------------------------------


def takes(tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether an answer may be `text` and end there."""
    state = Grammars(tokenizer.file, [EOS]).matcher(grammar)
    token_ids = tokenizer._encode([text], False)[0]
    return state.try_consume_tokens(token_ids) == len(token_ids) and state.is_accepting()


@pytest.mark.parametrize(
    "text",
    ["", " ", "plain", 'quo"te', "back\\slash", "line\nbreak\ttab", "\x01", "é日😀", "/a/", "$(x)*[|]"],
)
def test_a_choice_is_taken_as_it_is_written(tokenizer: Tokenizer, text: str) -> None:
    found = wanted(guided_choice=["another", text])
    assert found is not None
    assert takes(tokenizer, found.grammar, text)
    assert not takes(tokenizer, found.grammar, text + "x")


def test_a_grammar_may_be_of_lark_or_of_llama_cpp(tokenizer: Tokenizer) -> None:
    for text in ('root ::= "a" b*\nb ::= "b" | "c"', 'start: "a" b*\nb: "b" | "c"'):
        grammar = Grammar(kind="ebnf", text=text)
        assert takes(tokenizer, grammar, "abcb")
        assert not takes(tokenizer, grammar, "b")


@pytest.mark.parametrize(
    ("text", "is_taken"),
    [
        ("no call at all, 1 < 2", True),
        ('first <call=add>1</call> then <call=say>"hi"</call>.', True),
        ("<call=add>3</call>", False),
        ("<call=sub>1</call>", False),
        ("<call=add>1", False),
        ("<call=say>1</call>", False),
    ],
)
def test_a_trigger_begins_one_of_the_structures(tokenizer: Tokenizer, text: str, is_taken: bool) -> None:
    for fields in ({"response_format": TAG}, {"structured_outputs": {"structural_tag": json.dumps(TAG)}}):
        found = wanted(**fields)
        assert found is not None
        assert takes(tokenizer, found.grammar, text) is is_taken


@pytest.mark.parametrize("trigger", ["<call>", "<call>a", "= <call>"])
def test_a_trigger_may_be_a_token(tmp_path: Path, trigger: str) -> None:
    folder = write_tokenizer(tmp_path)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_tokens(["<call>", "</call>"])
    raw.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    structure = {"begin": f"{trigger}add:", "schema": {"enum": [1, 2]}, "end": "</call>"}
    tag = {"type": "structural_tag", "structures": [structure], "triggers": [trigger]}
    found = wanted(tokenizer.vocabulary, response_format=tag)
    assert found is not None
    for text in ("no call", f"first {trigger}add:1</call> then {trigger}add:2</call>."):
        assert takes(tokenizer, found.grammar, text)
    assert not takes(tokenizer, found.grammar, f"{trigger}add:3</call>")


def of_json(schema: Any) -> Grammar:
    found = wanted(structured_outputs={"json": schema})
    assert found is not None
    return found.grammar


@pytest.mark.parametrize(
    ("format", "valid", "invalid"),
    [
        ("date", "0001-01-01 2024-02-29 2000-02-29", "0000-01-01 2023-02-29 1900-02-29 2023-04-31"),
        ("time", "00:00:00Z 23:59:59.123456+01:30", "23:59:60Z 24:00:00Z 10:00:00 10:00:00z"),
        ("date-time", "2024-02-29T10:00:00Z 2023-01-01T00:00:00.5-12:00", "2023-02-29T10:00:00Z 2024-02-29"),
    ],
)
def test_dates_are_those_that_clients_can_read(
    tokenizer: Tokenizer, format: str, valid: str, invalid: str
) -> None:
    read = {"date": date.fromisoformat, "time": time.fromisoformat, "date-time": datetime.fromisoformat}
    in_all_places = [
        {"type": "string", "format": format},
        {"type": ["string", "null"], "format": format, "pattern": "^[0-9]", "allOf": [{"maxLength": 99}]},
        {"$ref": "#/$defs/it", "$defs": {"it": {"anyOf": [{"format": format, "type": "string"}]}}},
    ]
    for grammar in map(of_json, in_all_places):
        for text in valid.split():
            read[format](text)
            assert takes(tokenizer, grammar, f'"{text}"')
        for text in invalid.split():
            assert not takes(tokenizer, grammar, f'"{text}"')


def test_what_only_looks_like_a_format_stays(tokenizer: Tokenizer) -> None:
    """A property's name, a constant, other formats, and what is no schema at all."""
    for schema in (
        {"properties": {"format": {"const": {"format": "date"}}}},
        {"enum": ["date", {"format": "time"}]},
        {"type": "string", "format": "uuid"},
        {"format": ["date"], "items": 5, "properties": ["date"], "anyOf": {"x": 1}},
        {"format": "date", "allOf": 5},
    ):
        assert json.loads(of_json(schema).text) == schema


# --- the check ------------------------------------------------------------------------------------------


async def complaint(checker: GrammarChecker, grammar: Grammar) -> str | None:
    try:
        await checker.check(Wanted("the_field", grammar))
    except BadRequest as error:
        return f"{error.field}; {error.message}"
    return None


async def test_the_checker_tells_what_cant_be_kept_to(tokenizer: Tokenizer) -> None:
    bad = Grammar(kind="json_schema", text='{"type":"array","uniqueItems":true}')
    async with GrammarChecker(tokenizer.file) as checker:
        assert await complaint(checker, ANY_OBJECT) is None
        assert await complaint(checker, bad) == 'the_field; the_field: Unimplemented keys: ["uniqueItems"]'
        process = checker._process
        assert process is not None
        # Remembered: the process is not asked again.
        process.kill()
        await process.wait()
        assert await complaint(checker, ANY_OBJECT) is None
        assert "uniqueItems" in (await complaint(checker, bad) or "")


async def test_a_grammar_that_ends_its_compiler_costs_no_other(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of these patterns at once take some GB to tell whether any text is of them."""
    patterns = [{"type": "string", "pattern": f".*a.{{{n}}}b.*"} for n in range(1, 20)]
    hostile = Grammar(kind="json_schema", text=json.dumps({"allOf": patterns}))
    async with GrammarChecker(tokenizer.file) as checker:
        found = await asyncio.gather(complaint(checker, hostile), complaint(checker, ANY_OBJECT))
        assert "to compile" in (found[0] or "")
        assert found[1] is None
        monkeypatch.setattr(gateway_grammar, "COMPILE_TIMEOUT_S", 0.0)
        assert "longer than" in (await complaint(checker, JSON_SCHEMA) or "")
        monkeypatch.setattr(gateway_grammar, "COMPILE_TIMEOUT_S", 10.0)
        assert await complaint(checker, JSON_SCHEMA) is None


async def test_a_client_that_leaves_gets_no_one_elses_answer(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, is_reading = Grammar(kind="regex", text="("), asyncio.Event()
    async with asyncio.timeout(10), GrammarChecker(tokenizer.file) as checker:
        await checker.check(Wanted("f", ANY_OBJECT))
        assert checker._process is not None
        answers: Any = checker._process.stdout
        readline = answers.readline

        async def tell_and_read() -> bytes:
            is_reading.set()
            line: bytes = await readline()
            return line

        monkeypatch.setattr(answers, "readline", tell_and_read)
        leaving = asyncio.create_task(checker.check(Wanted("f", bad)))
        await is_reading.wait()
        leaving.cancel()
        assert await complaint(checker, JSON_SCHEMA) is None
        assert await complaint(checker, bad) is not None


async def test_no_one_waits_for_long_behind_new_grammars(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_grammar, "QUEUE_TIMEOUT_S", 0.01)
    async with GrammarChecker(tokenizer.file) as checker:
        async with checker._lock:
            with pytest.raises(Full):
                await checker.check(Wanted("f", ANY_OBJECT))


async def test_a_tokenizer_that_cant_be_read_is_said(tmp_path: Path) -> None:
    async with GrammarChecker(tmp_path / "tokenizer.json") as checker:
        assert "tokenizer" in (await complaint(checker, ANY_OBJECT) or "")
