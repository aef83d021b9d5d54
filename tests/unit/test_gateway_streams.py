"""Token chunks come out in order and once, whatever the network does to them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.wire.messages import Refusal, TokenChunk, TokenLogprob
from flowkv_gateway.token_stream import TokenStream

MAX_TOKENS = 12


def chunk(start: int, end: int, *, finish: str | None = None, error: Refusal | None = None) -> TokenChunk:
    """Tokens `start` to `end - 1` of an output in which token i has id 100 + i and log probability -i."""
    return TokenChunk(
        transfer_id="r.1",
        index=start,
        token_ids=[100 + i for i in range(start, end)],
        logprobs=[TokenLogprob(token_id=100 + i, logprob=-float(i)) for i in range(start, end)],
        finish_reason=finish,
        error=error,
    )


def push(stream: TokenStream, piece: TokenChunk) -> list[TokenChunk]:
    """What is due once `piece` has come."""
    stream.add_chunk(piece, "d")
    return [stream.due.get_nowait() for _ in range(stream.due.qsize())]


def has_gap(stream: TokenStream) -> bool:
    return stream.gap_since is not None


def test_chunks_in_order_pass_unchanged() -> None:
    stream = TokenStream()
    first, second = chunk(0, 2), chunk(2, 3, finish="stop")
    assert push(stream, first) == [first]
    assert push(stream, second) == [second]
    assert stream.expected == 3
    assert not has_gap(stream)


def test_late_chunk_fills_the_gap() -> None:
    stream = TokenStream()
    assert push(stream, chunk(2, 4)) == []
    assert has_gap(stream)
    assert stream.expected == 0
    assert push(stream, chunk(0, 2)) == [chunk(0, 2), chunk(2, 4)]
    assert not has_gap(stream)


def test_overlap_is_trimmed_with_its_logprobs() -> None:
    stream = TokenStream()
    push(stream, chunk(0, 3))
    assert push(stream, chunk(1, 5)) == [chunk(3, 5)]


def test_attempt_may_go_on_where_another_ended() -> None:
    stream = TokenStream(expected=4)
    assert push(stream, chunk(4, 5)) == [chunk(4, 5)]


def test_error_waits_for_the_tokens_before_it() -> None:
    stream = TokenStream()
    lost = chunk(2, 2, error=Refusal(code=503, message="gone"))
    assert push(stream, lost) == []
    assert push(stream, chunk(0, 2)) == [chunk(0, 2), lost]


def test_finish_is_given_out_when_its_tokens_are_known() -> None:
    stream = TokenStream()
    push(stream, chunk(0, 3))
    assert push(stream, chunk(1, 3, finish="length")) == [chunk(3, 3, finish="length")]


def test_nothing_follows_the_end() -> None:
    stream = TokenStream()
    push(stream, chunk(0, 1, finish="stop"))
    assert push(stream, chunk(0, 1, finish="stop")) == []
    assert push(stream, chunk(1, 2)) == []
    assert not has_gap(stream)


@st.composite
def deliveries(draw: st.DrawFn) -> list[TokenChunk]:
    """Pieces of one output, lost, doubled, overlapping and shuffled."""
    num_tokens = draw(st.integers(0, MAX_TOKENS))
    bounds = st.tuples(st.integers(0, num_tokens), st.integers(0, num_tokens)).map(sorted)
    pieces = [chunk(start, end) for start, end in draw(st.lists(bounds, max_size=12))]
    ends = draw(st.lists(st.integers(0, num_tokens), max_size=2))
    pieces += [chunk(start, num_tokens, finish="stop") for start in ends]
    twice = draw(st.lists(st.sampled_from(pieces), max_size=6)) if pieces else []
    return draw(st.permutations(pieces + twice))


@given(deliveries())
def test_agrees_with_a_naive_model(chunks: list[TokenChunk]) -> None:
    stream = TokenStream()
    seen: dict[int, int] = {}
    end_at: int | None = None
    indices: set[int] = set()
    given_out: list[TokenChunk] = []
    for piece in chunks:
        indices.add(piece.index)
        seen.update(zip(range(piece.index, piece.index + len(piece.token_ids)), piece.token_ids, strict=True))
        if piece.finish_reason is not None:
            end_at = piece.index + len(piece.token_ids)
        given_out += push(stream, piece)

        known = next(i for i in range(MAX_TOKENS + 1) if i not in seen)
        assert stream.expected == known
        assert [t for c in given_out for t in c.token_ids] == [seen[i] for i in range(known)]
        assert [p.token_id for c in given_out for p in c.logprobs] == [seen[i] for i in range(known)]
        finished = [c.finish_reason for c in given_out if c.finish_reason is not None]
        assert finished == (["stop"] if end_at == known else [])
        assert has_gap(stream) == (end_at != known and any(index > known for index in indices))
    assert all(c.token_ids or c.finish_reason for c in given_out)
