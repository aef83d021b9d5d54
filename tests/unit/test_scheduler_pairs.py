"""Who can serve together, and what is said of those who can't."""

from __future__ import annotations

import msgspec

from flowkv_common.wire.nodes import PROTOCOL
from flowkv_scheduler.cluster import num_pairs, why_apart
from tests.described_nodes import MODEL, Described, cluster, descriptor, node


def pairs(*nodes: Described) -> int:
    return num_pairs(cluster(*nodes).usable(0.0))


def test_pairs_are_of_both_sides_of_a_group() -> None:
    two_and_three = [
        node("p0", "prefill"),
        node("p1", "prefill"),
        *(node(f"d{i}", "decode") for i in range(3)),
    ]
    assert pairs(*two_and_three) == 6
    assert pairs(node("p0", "prefill")) == pairs() == 0
    assert pairs(node("m0", "mixed")) == 1
    assert pairs(node("m0", "mixed"), node("d0", "decode")) == 2


def test_nodes_that_cant_exchange_blocks_are_no_pair() -> None:
    for other in (
        node("d0", "decode", layout={"block_size": 32}),
        node("d0", "decode", layout={"dtype": "float16"}),
        node("d0", "decode", memory="gpu"),
        node("d0", "decode", protocol=PROTOCOL + 1),
    ):
        assert pairs(node("p0", "prefill"), other) == 0


def test_nodes_that_take_nothing_are_no_pair() -> None:
    assert pairs(node("p0", "prefill"), node("d0", "decode", ready=False)) == 0
    assert pairs(node("p0", "prefill"), node("d0", "decode", age_s=9.0)) == 0


def test_who_is_apart_is_named_with_what_differs() -> None:
    alike = [descriptor("p0", "prefill"), descriptor("d0", "decode")]
    assert why_apart(alike) is None
    assert why_apart([]) is None
    other = descriptor("d1", "decode", block_size=32, dtype="bfloat16")
    assert why_apart([other, *alike]) == (
        "d1 can't exchange KV with d0, p0: block size 32, not 16, KV dtype bfloat16, not float32"
    )
    gpu = descriptor("d2", "decode", memory="gpu")
    said = why_apart([other, gpu, *alike])
    assert said is not None
    assert "; d2 can't exchange KV with d0, p0: memory of the KV cache gpu, not host" in said
    newer = descriptor("d3", "decode", protocol=PROTOCOL + 1)
    assert why_apart([newer, *alike]) == (
        f"d3 can't exchange KV with d0, p0: protocol {PROTOCOL + 1}, not {PROTOCOL}"
    )


def test_models_of_other_names_are_not_meant_to_work_together() -> None:
    """Only nodes of one name are a mistake, such as those of two dtypes."""
    nodes = [descriptor("p0", "prefill"), descriptor("d0", "decode")]
    other = msgspec.structs.replace(MODEL, name="other", fingerprint="g")
    assert why_apart([*nodes, descriptor("o0", "decode", model=other)]) is None
    same_name = msgspec.structs.replace(MODEL, fingerprint="g")
    assert why_apart([*nodes, descriptor("d1", "decode", model=same_name)]) == (
        "d1 can't exchange KV with d0, p0: model fingerprint g, not f"
    )
