"""How the time of a transfer divides into what prefill hid and what it did not."""

from __future__ import annotations

import pytest

from flowkv_prefill.handoff import Span, split_at


@pytest.mark.parametrize(
    ("spans", "hidden_s", "exposed_s"),
    [
        ([], 0.0, 0.0),
        ([Span(1.0, 2.0)], 1.0, 0.0),
        ([Span(5.0, 7.0)], 0.0, 2.0),
        ([Span(4.0, 5.0)], 1.0, 0.0),
        ([Span(3.0, 7.0)], 2.0, 2.0),  # under way when the last chunk was done
        ([Span(1.0, 2.0), Span(4.5, 5.5), Span(5.5, 8.5)], 1.5, 3.5),
    ],
)
def test_sends_are_hidden_until_the_last_chunk_is_computed(
    spans: list[Span], hidden_s: float, exposed_s: float
) -> None:
    assert split_at(5.0, spans) == (hidden_s, exposed_s)
