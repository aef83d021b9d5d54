"""What every message looks like on the wire, held by golden files; a change of one shows in the diff."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from flowkv_common.wire import nodes
from flowkv_common.wire.messages import (
    Accepted,
    Cancel,
    Message,
    Part,
    Release,
    Reserve,
    Resume,
    decode,
    encode,
)
from tests.contract.wire_examples import EXAMPLES, GOLDEN, MESSAGES, PARTS, as_golden, golden_file

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)


def structs_in(value: Any) -> Iterator[Message | Part]:
    """`value`, if it is one of ours, and all of ours inside it."""
    if isinstance(value, Message | Part):
        yield value
        for field in value.__struct_fields__:
            yield from structs_in(getattr(value, field))
    elif isinstance(value, list):
        for item in value:
            yield from structs_in(item)


# Objects whose keys are values, not fields.
MAPS = {"logit_bias", "states", "phases_s", "links", "addresses", "by_length"}


def with_unknown_fields(value: Any) -> Any:
    """The JSON value with a field that nobody knows in every struct."""
    if isinstance(value, list):
        return [with_unknown_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    known = {name: item if name in MAPS else with_unknown_fields(item) for name, item in value.items()}
    return known | {"of_tomorrow": [1]}


def test_every_message_has_one_example_and_one_golden_file() -> None:
    kinds = sorted(kind.__name__ for kind in MESSAGES)
    assert sorted(type(example).__name__ for example in EXAMPLES) == kinds
    assert sorted(file.stem for file in GOLDEN.iterdir()) == kinds


def test_the_examples_set_every_field_of_every_struct() -> None:
    shown = {type(found) for example in EXAMPLES for found in structs_in(example)}
    assert shown == {*MESSAGES, *PARTS}
    for found in (found for example in EXAMPLES for found in structs_in(example)):
        shown_fields = msgspec.json.decode(encode(found)).keys() - {"type"}
        assert shown_fields == set(found.__struct_encode_fields__), type(found).__name__


@each_example
def test_a_message_is_written_as_its_golden_file(example: Message) -> None:
    assert as_golden(example) == golden_file(type(example)).read_bytes()


@each_example
def test_a_golden_file_is_read_as_its_message(example: Message) -> None:
    assert decode(golden_file(type(example)).read_bytes(), type(example)) == example


@each_example
def test_fields_of_a_newer_version_are_ignored(example: Message) -> None:
    golden = msgspec.json.decode(golden_file(type(example)).read_bytes())
    newer = msgspec.json.encode(with_unknown_fields(golden))
    assert decode(newer, type(example)) == example


@each_example
def test_a_message_is_not_taken_for_another_kind(example: Message) -> None:
    other = Accepted if type(example) is not Accepted else nodes.Check
    with pytest.raises(msgspec.ValidationError):
        decode(encode(example), other)


def with_field(example: Message, name: str, value: object) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(encode(example)), name: value})


NUMBERED = [example for example in EXAMPLES if "attempt" in example.__struct_fields__]
# What a node is asked of an attempt by its one name.
ABOUT_AN_ATTEMPT = [
    example for example in EXAMPLES if isinstance(example, Reserve | Release | Resume | Cancel)
]


@pytest.mark.parametrize("example", NUMBERED, ids=lambda example: type(example).__name__)
@pytest.mark.parametrize("number", [-1, 100, 1_000_000])
def test_an_attempts_number_is_small(example: Message, number: int) -> None:
    """A node goes through all numbers before it."""
    read = decode(with_field(example, "attempt", 99), type(example))
    assert msgspec.structs.asdict(read)["attempt"] == 99
    with pytest.raises(msgspec.ValidationError, match=r"\$\.attempt"):
        decode(with_field(example, "attempt", number), type(example))


@pytest.mark.parametrize("example", ABOUT_AN_ATTEMPT, ids=lambda example: type(example).__name__)
@pytest.mark.parametrize("name", ["", "r", "r.", "r.x", "r.-1", "r.00", "r.100", "r.1000000", "r.1\n", "r.²"])
def test_the_name_of_an_attempt_ends_in_its_number(example: Message, name: str) -> None:
    for good in ("r.0", "a.b.99"):
        read = decode(with_field(example, "transfer_id", good), type(example))
        assert msgspec.structs.asdict(read)["transfer_id"] == good
    with pytest.raises(msgspec.ValidationError, match=r"\$\.transfer_id"):
        decode(with_field(example, "transfer_id", name), type(example))


def test_a_report_of_a_node_that_knows_no_lengths_by_prompt_is_read() -> None:
    """As before `by_length` was there; and what such a node reads of a report is what it read before."""
    golden = msgspec.json.decode(golden_file(nodes.LoadReport).read_bytes())
    del golden["forecast"]["by_length"]
    read = decode(msgspec.json.encode(golden), nodes.LoadReport)
    assert read.forecast == nodes.OutputForecast(tokens_left=192.5, first_ends_in=3.5, stop_rate=0.00390625)
    assert read.forecast is not None
    assert read.forecast.by_length == {}
    assert b"by_length" not in encode(read)


def test_who_tells_no_protocol_speaks_the_first() -> None:
    """As version 0.1.0 does, which knows no such field, nor the others that came with it."""
    golden = msgspec.json.decode(golden_file(nodes.NodeDescriptor).read_bytes())
    del golden["protocol"], golden["model"]["folder"]
    read = decode(msgspec.json.encode(golden), nodes.NodeDescriptor)
    assert (read.protocol, read.model.folder) == (1, "")
    for kind in (nodes.RegimeChanged, nodes.ScaleWanted):
        golden = msgspec.json.decode(golden_file(kind).read_bytes())
        del golden["model"]
        assert msgspec.structs.asdict(decode(msgspec.json.encode(golden), kind))["model"] == ""


def test_defaults_are_left_out() -> None:
    assert encode(nodes.Drain()) == b'{"type":"Drain"}'


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("queued_prefill_tokens", "-1"),
        ("max_num_seqs", "0"),
        ("decode_step_s", "-0.5"),
        ("prefill_tokens_per_s", "1e999"),
        ("prefill_tokens_per_s", "NaN"),
        ("blocks", '{"total":-1,"free":0,"cached":0,"leased":0,"quarantined":0,"longest_free_run":0}'),
    ],
)
def test_a_load_report_has_no_number_out_of_range(field: str, value: str) -> None:
    fields = msgspec.json.decode(golden_file(nodes.LoadReport).read_bytes(), type=dict[str, msgspec.Raw])
    decode(msgspec.json.encode(fields), nodes.LoadReport)
    with pytest.raises(msgspec.DecodeError):
        decode(msgspec.json.encode(fields | {field: msgspec.Raw(value.encode())}), nodes.LoadReport)
