"""Room for handoffs: who may write, and when blocks come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowkv_common.errors import BadRequest, Stale
from flowkv_common.wire.messages import NodeRef
from flowkv_engine.kv.blocks import Blocks, OutOfBlocks
from flowkv_engine.kv.reservations import Reservation, Reservations

NODE = NodeRef(node_id="prefill-1", incarnation="a")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    blocks = Blocks(num_blocks=16)
    yield blocks
    blocks.check_integrity()


@pytest.fixture
def reservations(blocks: Blocks, clock: Clock) -> Reservations:
    return Reservations(blocks, clock)


def reserve(
    reservations: Reservations, num_blocks: int, *, name: str = "r.1", hashes: tuple[str, ...] = ()
) -> Reservation:
    return reservations.reserve(name, num_blocks, hashes, [num_blocks], expires_in_s=10.0)


def cache(blocks: Blocks, *hashes: str) -> list[int]:
    block_ids = blocks.allocate(len(hashes))
    for block_id, block_hash, parent in zip(block_ids, hashes, [None, *hashes], strict=False):
        blocks.commit(block_id, block_hash, parent)
    blocks.release(block_ids)
    return block_ids


def test_claimed_blocks_belong_to_the_caller(reservations: Reservations, blocks: Blocks) -> None:
    reserved = reserve(reservations, 5)
    with reservations.copying("r.1", reserved.token, reserved.block_ids) as reservation:
        assert not reservation.revoked
    assert reservations.claim("r.1", reserved.token).block_ids == reserved.block_ids
    assert (reservations.num_open, blocks.counts().leased) == (0, 5)
    with pytest.raises(Stale):
        reservations.claim("r.1", reserved.token)
    reservations.cancel("r.1")
    assert blocks.counts().leased == 5
    blocks.release(reserved.block_ids)


def test_the_cached_prefix_is_pinned_and_comes_first(reservations: Reservations, blocks: Blocks) -> None:
    cached = cache(blocks, "a", "b")
    reserved = reserve(reservations, 4, hashes=("a", "b", "c"))
    assert (reserved.num_cached_blocks, reserved.cached_block_ids) == (2, cached)
    assert not blocks.can_allocate(13)
    with pytest.raises(BadRequest, match="not reserved"):
        with reservations.copying("r.1", reserved.token, cached):
            pass
    reservations.cancel("r.1")
    assert blocks.counts().cached == 2


def test_like_is_read_from_behind_the_cached_prefix(reservations: Reservations, blocks: Blocks) -> None:
    cache(blocks, "a", "b")
    scattered = blocks.allocate(14)
    blocks.release(scattered[0:4] + scattered[6:8] + scattered[10:12])
    reserved = reservations.reserve("r.1", 6, ["a", "b"], [4, 2], 10.0)
    assert reserved.empty_block_ids == scattered[0:4]
    reservations.cancel("r.1")
    blocks.release(scattered[4:6] + scattered[8:10] + scattered[12:])


def test_too_little_room_leaves_nothing_pinned(reservations: Reservations, blocks: Blocks) -> None:
    cache(blocks, "a", "b")
    with pytest.raises(OutOfBlocks):
        reserve(reservations, 17, hashes=("a", "b"))
    assert (blocks.counts().leased, blocks.counts().cached, reservations.num_open) == (0, 2, 0)


def test_opens_once_and_never_empty(reservations: Reservations) -> None:
    reserve(reservations, 2)
    with pytest.raises(Stale, match="already"):
        reserve(reservations, 2)
    with pytest.raises(BadRequest, match="at least one"):
        reserve(reservations, 0, name="r.2")
    assert reservations.num_open == 1


@pytest.mark.parametrize("token", ["", "0" * 32, "gefälscht"])
def test_a_wrong_token_opens_nothing(reservations: Reservations, token: str) -> None:
    reserved = reserve(reservations, 2)
    with pytest.raises(Stale, match="token"):
        reservations.claim("r.1", token)
    with pytest.raises(Stale, match="token"):
        reservations.extend("r.1", token, 10.0)
    with pytest.raises(Stale, match="token"):
        with reservations.copying("r.1", token, reserved.block_ids):
            pass


def test_expires_unless_extended(reservations: Reservations, blocks: Blocks, clock: Clock) -> None:
    reserved = reserve(reservations, 2)
    clock.now += 9.0
    reservations.extend("r.1", reserved.token, 10.0)
    clock.now += 9.0
    assert reservations.sweep() == []
    clock.now += 1.0
    assert reservations.sweep() == ["r.1"]
    with pytest.raises(Stale):
        reservations.extend("r.1", reserved.token, 10.0)
    with pytest.raises(Stale):
        reservations.claim("r.1", reserved.token)
    with pytest.raises(Stale):
        with reservations.copying("r.1", reserved.token, reserved.block_ids):
            pass
    assert blocks.counts().free == 16


def test_only_the_sweep_ends_what_has_expired(
    reservations: Reservations, blocks: Blocks, clock: Clock
) -> None:
    """A node that hears nobody does not sweep: what could not be renewed is good when it is back."""
    renewed, copied, claimed = (reserve(reservations, 2, name=name) for name in ("r.1", "r.2", "r.3"))
    clock.now += 31.0
    with reservations.copying("r.2", copied.token, copied.block_ids):
        pass
    assert reservations.claim("r.3", claimed.token) is claimed
    reservations.extend("r.1", renewed.token, 10.0)
    assert reservations.sweep() == ["r.2"]
    assert reservations.num_open == 1
    reservations.cancel("r.1")
    blocks.release(claimed.block_ids)


def test_blocks_under_a_copy_wait_for_the_last_copy(reservations: Reservations, blocks: Blocks) -> None:
    reserved = reserve(reservations, 4)
    first, second = reserved.block_ids[:2], reserved.block_ids[2:]
    with reservations.copying("r.1", reserved.token, first) as reservation:
        with reservations.copying("r.1", reserved.token, second):
            with pytest.raises(Stale, match="still copying"):
                reservations.claim("r.1", reserved.token)
            reservations.cancel("r.1")
            reservations.cancel("r.1")
            assert reservation.revoked
            assert (blocks.counts().quarantined, reservations.num_open) == (4, 0)
        assert blocks.counts().quarantined == 4
    assert blocks.counts().free == 16


def test_a_copy_that_fails_ends_too(reservations: Reservations, blocks: Blocks) -> None:
    reserved = reserve(reservations, 1)
    with pytest.raises(ConnectionError):
        with reservations.copying("r.1", reserved.token, reserved.block_ids):
            raise ConnectionError
    assert reservations.claim("r.1", reserved.token).num_copying == 0
    blocks.release(reserved.block_ids)


def test_the_secret_does_not_show_in_logs(reservations: Reservations) -> None:
    reserved = reserve(reservations, 1)
    assert len(reserved.token) == 32
    assert reserved.token not in repr(reserved)
