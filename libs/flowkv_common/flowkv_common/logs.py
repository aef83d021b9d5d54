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
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class _Lines(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What a line was given by `extra={"fields": {...}}`, to be read by machines."""
    fields: dict[str, object] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value not in (None, "")}


def setup(service: str, level: int = logging.INFO) -> None:
    """Send all logs of this process to stderr, with the service's name on each line."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(_Lines(f"%(asctime)s {service:<12} %(levelname)-7s %(message)s"))
    else:
        handler.setFormatter(_JsonLines(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # One line per HTTP request is the proxy's business, not ours.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
