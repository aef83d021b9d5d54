"""What fits into one message: NATS carries so many bytes, and long sequences fill them. Pure."""

from __future__ import annotations

# Of the servers that we start. NATS advises against more.
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024

# For all of a message but its longest lists. Most of it is for the largest `logit_bias` that a gateway takes:
# 1,024 entries of at most 36 bytes.
_OTHER_BYTES = 48 * 1024
# Base64 makes 16 characters of the 12 bytes of 3 ids (`TokenIds`).
_IDS, _BYTES_OF_IDS = 3, 16
# 32 hex digits, quotes and a comma. Beside its hash a block may be a run of its own: a digit and a comma.
_HASH_BYTES = 35
_BLOCK_BYTES = _HASH_BYTES + 2


def window_that_fits(max_payload: int, block_size: int) -> int:
    """Tokens of the longest sequence whose every message has at most `max_payload` bytes; 0 if none has."""
    num_blocks = max(0, max_payload - _OTHER_BYTES) // _BLOCK_BYTES
    return min(ids_that_fit(max_payload), num_blocks * block_size)


def ids_that_fit(max_payload: int) -> int:
    """Token ids of a sequence, prompt and output together, in one message of at most `max_payload` bytes."""
    return max(0, max_payload - _OTHER_BYTES) * _IDS // _BYTES_OF_IDS


def payload_for(window: int, block_size: int) -> int:
    """The least `max_payload` for a window of `window` tokens: the inverse of `window_that_fits`."""
    num_blocks = -(-window // block_size)
    return _OTHER_BYTES + max(-(-window * _BYTES_OF_IDS // _IDS), num_blocks * _BLOCK_BYTES)


def hashes_that_fit(max_payload: int) -> int:
    """Block hashes in one message of at most `max_payload` bytes."""
    return max(0, max_payload - _OTHER_BYTES) // _HASH_BYTES
