"""One event, one line: readable on a terminal, JSON when the output goes to a file or a collector."""

from __future__ import annotations

import logging
import sys
import time

import msgspec


class _JsonLines(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "service": self.service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def setup(service: str, level: int = logging.INFO) -> None:
    """Send all logs of this process to stderr, with the service's name on each line."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter(f"%(asctime)s {service:<12} %(levelname)-7s %(message)s"))
    else:
        handler.setFormatter(_JsonLines(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # One line per HTTP request is the proxy's business, not ours.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
