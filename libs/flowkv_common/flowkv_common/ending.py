"""How a service ends that can't start or go on: by one line in its log, where that says it all."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

from flowkv_common.errors import CannotStart, Unavailable

log = logging.getLogger(__name__)

# An address that others have, or that this host does not have, or that this user may not have.
_ADDRESS_ERRORS = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)


@contextlib.contextmanager
def reason_in_one_line(service: str) -> Iterator[None]:
    """Around all that `service` does. Raises SystemExit(1); what nobody expected keeps its traceback."""
    try:
        yield
    except (CannotStart, Unavailable) as error:
        _end(service, error)
    except OSError as error:
        if error.errno not in _ADDRESS_ERRORS:
            raise
        _end(service, error)


def _end(service: str, error: Exception) -> None:
    log.error("%s ended: %s", service, error)
    raise SystemExit(1) from None
