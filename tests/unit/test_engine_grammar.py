"""Output that keeps to a grammar: the masks, the matchers' states, and answers of a random model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.errors import BadRequest
from flowkv_common.grammar import MAX_COMPILED, Grammars
from flowkv_common.wire.messages import Grammar, SamplingParams
from flowkv_engine.engine.batch import WorkItem, pack
from flowkv_engine.engine.grammar import MAX_ONE_BY_ONE, Constraints, Masks, Matcher
from flowkv_engine.engine.runner import Runner
from flowkv_engine.engine.sampler import Sampled, SampleInput, sample
from flowkv_gateway.grammar import json_schema
from flowkv_gateway.tokenizer import Tokenizer
from tests.drive import BLOCK_SIZE, load_tiny, make_pool, make_sequence
from tests.gateway_support import EOS, START, write_tokenizer
from tests.json_schemas import SCHEMAS, Schema, check
from tests.tiny_models import VOCAB_SIZE, make_tiny_model

NUM_TOKENS = 312  # of the tokenizer; the model's logits are for `VOCAB_SIZE`
NUM_BLOCKS = 512
MAX_TOKENS = 160
# Lets a random model come to an end: it likes quotes, brackets and digits no more than other text.
CLOSERS = '"}],0'
NUM_AT_ONCE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    make_tiny_model(folder, seed=1, eos_token_id=EOS, bos_token_id=START)
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def runner(folder: Path) -> Iterator[Runner]:
    model, num_threads = load_tiny(folder), torch.get_num_threads()
    torch.set_num_threads(1)  # many steps of next to no work: threads would only wait for each other
    yield Runner(model, make_pool(model, NUM_BLOCKS), attention="torch")
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return Grammars(folder / "tokenizer.json", [EOS])


def of_schema(schema: Schema) -> Grammar:
    return json_schema(schema, "schema")


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer._encode([text], False)[0]


def text_of(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return b"".join(map(tokenizer.vocabulary.token_bytes, token_ids)).decode()


class Answers:
    """Steps sequences to their ends, as a node does."""

    def __init__(self, runner: Runner, sampling: list[SamplingParams]) -> None:
        per_sequence = -(-(MAX_TOKENS + 8) // BLOCK_SIZE)
        tables = [list(range(row * per_sequence, (row + 1) * per_sequence)) for row in range(len(sampling))]
        self.sequences = [make_sequence([5, 6, 7], *each) for each in zip(tables, sampling, strict=True)]
        self.reasons: dict[int, str] = {}  # of those that have ended
        self.sampled: list[Sampled] = []
        self._runner = runner

    def run(self) -> Answers:
        while items := [
            (row, WorkItem(sequence, sequence.num_new_tokens))
            for row, sequence in enumerate(self.sequences)
            if row not in self.reasons
        ]:
            result = self._runner.run(pack([item for _, item in items], BLOCK_SIZE))
            for (row, (sequence, num_tokens, _)), one in zip(items, result.sampled, strict=True):
                assert one is not None
                self.sampled.append(one)
                reason = sequence.finish_reason_after(one.token_id, [EOS], 256)
                sequence.output_ids.append(one.token_id)
                sequence.num_computed_tokens += num_tokens
                if reason := "error" if one.error else "stop" if one.ends_grammar else reason:
                    self.reasons[row] = reason
        return self

    def text(self, tokenizer: Tokenizer, row: int = 0) -> str:
        return text_of(tokenizer, [token for token in self.sequences[row].output_ids if token != EOS])


def drawn(grammar: Grammar | None, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": MAX_TOKENS, "temperature": 1.5, "grammar": grammar, **fields})


# --- masks ----------------------------------------------------------------------------------------------


def allowed_after(
    grammars: Grammars, grammar: Grammar, output_ids: list[int], **sampling: Any
) -> tuple[set[int], Masks]:
    """The token ids that may come next."""
    params = SamplingParams(max_tokens=99, grammar=grammar, **sampling)
    input = SampleInput(params, len(output_ids), [], output_ids, Matcher(grammar))
    masking = Constraints(grammars, VOCAB_SIZE, [EOS]).begin([input])
    assert masking is not None
    masks = masking.result(10)
    row = torch.zeros(1, VOCAB_SIZE)
    return set(masks.apply(row)[0].isfinite().nonzero().flatten().tolist()), masks


def test_only_what_the_grammar_allows_may_come_next(grammars: Grammars, tokenizer: Tokenizer) -> None:
    [a], [b], [c] = (ids_of(tokenizer, text) for text in "abc")
    assert allowed_after(grammars, regex("a(b|c)?"), [])[0] == {a}
    assert allowed_after(grammars, regex("a(b|c)?"), [a])[0] == {b, c, EOS}
    assert allowed_after(grammars, regex("a(b|c)?"), [a, b])[0] == {EOS}


def test_many_masks_at_once_are_those_of_each_alone(grammars: Grammars, tokenizer: Tokenizer) -> None:
    wanted = [regex(f"[{''.join(letters)}]x") for letters in itertools.combinations("abcdefgh", 3)]
    params = [drawn(grammar) for grammar in wanted]
    inputs = [
        SampleInput(one, 0, [], [], Matcher(grammar)) for one, grammar in zip(params, wanted, strict=True)
    ]
    assert len(inputs) > MAX_ONE_BY_ONE
    masking = Constraints(grammars, VOCAB_SIZE, [EOS]).begin(inputs)
    assert masking is not None
    rows = masking.result(10).apply(torch.zeros(len(inputs), VOCAB_SIZE)).isfinite()
    for row, grammar in zip(rows, wanted, strict=True):
        assert set(row.nonzero().flatten().tolist()) == allowed_after(grammars, grammar, [])[0]


def test_no_special_token_is_text(grammars: Grammars) -> None:
    assert START not in allowed_after(grammars, regex("(.|\n)+"), [])[0]


@pytest.mark.parametrize("text", ["a<|start|>b", "<|start|>", "<tool call>"])
def test_text_like_that_of_a_special_token_is_made_of_others(
    grammars: Grammars, tokenizer: Tokenizer, text: str
) -> None:
    output_ids: list[int] = []
    while EOS not in (allowed := allowed_after(grammars, of_schema({"const": text}), output_ids)[0]):
        output_ids.append(min(allowed))
    assert text_of(tokenizer, output_ids) == f'"{text}"'


def test_a_grammar_may_name_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    [a], [less] = (ids_of(tokenizer, text) for text in "a<")
    grammar = Grammar(kind="ebnf", text='start: "a" (<|start|> | "<|start|>")')
    assert allowed_after(grammars, grammar, [a])[0] == {START, less}


def test_stops_wait_for_min_tokens_unless_nothing_else_may_come(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    [a] = ids_of(tokenizer, "a")
    for sampling in ({"min_tokens": 3}, {"ignore_eos": True}):
        assert allowed_after(grammars, regex("aa*"), [a], **sampling)[0] == {a}
        assert allowed_after(grammars, regex("a"), [a], **sampling)[0] == {EOS}
    [b] = ids_of(tokenizer, "b")
    assert allowed_after(grammars, regex("[ab]+"), [a], min_tokens=3, stop_token_ids=[b, 9999])[0] == {a}
    assert allowed_after(grammars, regex("[ab]+"), [a], ignore_eos=True, stop_token_ids=[b])[0] == {a, b}


def test_a_grammar_that_cant_go_on_says_so_and_allows_all(grammars: Grammars, tokenizer: Tokenizer) -> None:
    [a] = ids_of(tokenizer, "a")
    for grammar, output_ids in ((regex("b"), [a]), (regex("("), [])):
        allowed, masks = allowed_after(grammars, grammar, output_ids)
        assert len(allowed) == VOCAB_SIZE
        assert masks.errors.keys() == {0}


def test_rows_without_a_grammar_are_untouched(grammars: Grammars) -> None:
    """So their tokens, and their logits bit by bit, are those that they get in other company."""
    grammar = regex("a+")
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.manual_seed(0))
    free = [SampleInput(SamplingParams(max_tokens=9, temperature=t), 0, [], []) for t in (0.0, 1.0)]
    bound = SampleInput(drawn(grammar), 0, [], [], Matcher(grammar))
    masking = Constraints(grammars, VOCAB_SIZE, [EOS]).begin([free[0], bound, free[1]])
    assert masking is not None
    masks = masking.result(10)
    assert torch.equal(masks.apply(logits)[0::2], logits[0::2])
    inputs = [free[0], bound, free[1]]
    assert sample(logits, inputs, [EOS], masks)[0::2] == sample(logits[0::2], free, [EOS])
    assert Constraints(grammars, VOCAB_SIZE, [EOS]).begin(free) is None


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"logit_bias": {7: 100.0}},
        {"top_k": 1},
        {"top_p": 0.1},
        {"min_p": 0.9},
        {"repetition_penalty": 2.0, "frequency_penalty": 2.0},
    ],
)
def test_no_way_to_sample_leaves_the_grammar(
    grammars: Grammars, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    grammar = regex("[xyz]+")
    wanted = {
        token for token in range(NUM_TOKENS) if set(tokenizer.vocabulary.token_bytes(token)) <= set(b"xyz")
    }
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.manual_seed(1))
    logits[0, 7] += 20  # what it would say
    output_ids = ids_of(tokenizer, "x")
    for index in range(20):
        params = SamplingParams(max_tokens=99, seed=index, num_logprobs=1, grammar=grammar, **sampling)
        input = SampleInput(params, index, [], output_ids, Matcher(grammar))
        masking = Constraints(grammars, VOCAB_SIZE, [EOS]).begin([input])
        assert masking is not None
        [one] = sample(logits, [input], [EOS], masking.result(10))
        assert one.token_id in wanted | {EOS}
        assert one.logprob is not None
        # The model's own: it knows of no grammar.
        assert one.logprob.top[0][0] == 7
        assert one.logprob.logprob == pytest.approx(float(logits[0].log_softmax(-1)[one.token_id]), abs=1e-5)


# --- matchers -------------------------------------------------------------------------------------------

NESTED = of_schema(
    {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "size": {"type": ["number", "null"]},
        },
        "required": ["tags", "size"],
        "additionalProperties": False,
    }
)


@given(choices=st.lists(st.integers(0, 10**6), max_size=40))
def test_a_replayed_matcher_stands_where_the_one_stands_that_went_along(
    grammars: Grammars, choices: list[int]
) -> None:
    """After a handoff, a preemption or a retry the state is made of the output ids alone."""
    along, output_ids = Matcher(NESTED), list[int]()
    for choice in choices:
        state = along.follow(output_ids, grammars)
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
        options = [token for token in np.flatnonzero(bits).tolist() if token != EOS]
        if not options:
            break
        output_ids.append(options[choice % len(options)])
    went, replayed = along.follow(output_ids, grammars), Matcher(NESTED).follow(output_ids, grammars)
    assert went.compute_bitmask() == replayed.compute_bitmask()
    assert (went.is_accepting(), went.is_stopped()) == (replayed.is_accepting(), replayed.is_stopped())


def test_the_latest_grammars_stay_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = Grammars(folder / "tokenizer.json", [EOS]), list[str]()

    def source(grammar: Grammar, _: object) -> str:
        compiled.append(grammar.text)
        return "start: /a/"

    monkeypatch.setattr("flowkv_common.grammar._source", source)
    for number in [*range(MAX_COMPILED), 0, MAX_COMPILED, 0, 1]:
        grammars.matcher(regex(str(number)))
    assert compiled == [*map(str, range(MAX_COMPILED + 1)), "1"]


@pytest.mark.parametrize(
    ("grammar", "complaint"),
    [
        (of_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (of_schema({"not": {}, "x-guidance": {"lenient": True}}), r'"not"'),
        (of_schema({"type": "string", "format": "of-tomorrow"}), "of-tomorrow"),
        (of_schema({"$ref": "https://example.com/schema.json"}), "example.com"),
        (Grammar(kind="json_schema", text="{"), "EOF"),
        (regex("(a"), "regex"),
        (Grammar(kind="lark", text="begin: /a/"), "start"),
        (Grammar(kind="poem", text="a"), "poem"),
    ],
)
def test_what_cant_be_followed_is_refused_with_the_part(
    grammars: Grammars, grammar: Grammar, complaint: str
) -> None:
    with pytest.raises(BadRequest, match=complaint) as refused:
        grammars.matcher(grammar)
    assert len(refused.value.message) < 1000


def test_a_model_without_a_readable_tokenizer_refuses(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="tokenizer"):
        Grammars(tmp_path / "tokenizer.json", [EOS]).matcher(regex("a"))


# --- answers --------------------------------------------------------------------------------------------


def test_a_finished_grammar_ends_the_answer(runner: Runner, tokenizer: Tokenizer) -> None:
    """With its last token where nothing may follow, with EOS where more might."""
    answers = Answers(
        runner, [drawn(regex("yes|no")), drawn(regex("[0-9]{2,}"), logit_bias={EOS: 100.0})]
    ).run()
    assert answers.reasons == {0: "stop", 1: "stop"}
    assert answers.text(tokenizer) in ("yes", "no")
    assert answers.sequences[0].output_ids[-1] != EOS
    assert answers.sequences[1].output_ids[-1] == EOS
    assert len(answers.text(tokenizer, 1)) >= 2


def test_max_tokens_within_a_grammar_is_a_length(runner: Runner) -> None:
    answers = Answers(runner, [SamplingParams(max_tokens=3, grammar=regex("[a-z]{99}"))]).run()
    assert answers.reasons == {0: "length"}
    assert not any(one.ends_grammar for one in answers.sampled)


def test_a_grammar_that_fails_costs_its_own_request_alone(runner: Runner, tokenizer: Tokenizer) -> None:
    answers = Answers(runner, [drawn(regex("(")), drawn(regex("ok")), SamplingParams(max_tokens=2)]).run()
    assert answers.reasons == {0: "error", 1: "stop", 2: "length"}
    assert answers.text(tokenizer, 1) == "ok"


def test_an_answer_goes_on_elsewhere_as_it_would_have_here(runner: Runner) -> None:
    """With the tokens so far and nothing else, and beside others."""
    nested = drawn(NESTED, seed=3, max_tokens=24)
    whole = Answers(runner, [nested]).run().sequences[0].output_ids
    for cut in range(0, len(whole), 8):
        answers = Answers(runner, [drawn(None, max_tokens=4), nested, drawn(regex("a+"), max_tokens=6)])
        answers.sequences[1].output_ids += whole[:cut]
        assert answers.run().sequences[1].output_ids == whole


def check_answers(runner: Runner, tokenizer: Tokenizer, schemas: list[Schema], seeds: range) -> float:
    """All finished answers are JSON of their schema; returns the share of finished ones."""
    bias = {ids_of(tokenizer, text)[0]: 4.0 for text in CLOSERS}
    cases = list(itertools.product(schemas, seeds))
    num_finished = 0
    for start in range(0, len(cases), NUM_AT_ONCE):
        batch = cases[start : start + NUM_AT_ONCE]
        sampling = [drawn(of_schema(schema), seed=seed, logit_bias=bias) for schema, seed in batch]
        answers = Answers(runner, sampling).run()
        assert "error" not in answers.reasons.values()
        for row, (schema, _) in enumerate(batch):
            if answers.reasons[row] == "stop":
                num_finished += 1
                check(schema, answers.text(tokenizer, row))
    return num_finished / len(cases)


def test_answers_are_json_of_their_schema(runner: Runner, tokenizer: Tokenizer) -> None:
    assert check_answers(runner, tokenizer, SCHEMAS[::9], range(1)) > 0.8


@pytest.mark.full
def test_answers_to_all_schemas_are_json_of_them(runner: Runner, tokenizer: Tokenizer) -> None:
    assert len(SCHEMAS) >= 200
    assert check_answers(runner, tokenizer, SCHEMAS, range(5)) > 0.8
