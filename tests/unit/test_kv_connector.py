"""Copies that reach out of a pool are found before anybody counts their blocks."""

from __future__ import annotations

import pytest

from flowkv_engine.kv.segments import Copy
from flowkv_engine.transport.base import find_stray


@pytest.mark.parametrize(
    "stray",
    [Copy(-1, 0, 1), Copy(0, -1, 1), Copy(4, 0, 2), Copy(0, 8, 2), Copy(0, 0, 0), Copy(0, 0, 10**18)],
)
def test_a_stray_copy_is_found(stray: Copy) -> None:
    assert find_stray([Copy(0, 0, 5), stray], num_src_blocks=5, num_dst_blocks=9) == stray


def test_copies_within_both_pools_are_fine() -> None:
    assert find_stray([Copy(0, 0, 5), Copy(1, 5, 4)], num_src_blocks=5, num_dst_blocks=9) is None


def test_more_blocks_than_the_pool_has_are_too_many() -> None:
    assert find_stray([Copy(0, 0, 5)] * 1000, num_src_blocks=5, num_dst_blocks=9) == Copy(0, 0, 5)
