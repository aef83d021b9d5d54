"""Who may come in: the names a gateway goes by, and the keys of its clients."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flowkv_common.config import GatewaySettings, listed
from flowkv_common.errors import CannotStart, FlowKVError
from flowkv_gateway.errors import ForeignHost, Unauthorized
from flowkv_gateway.watched import Watched

KEY_NAME = "flowkv.key_name"
"""The scope's entry with the name of the request's key; "" where none is needed."""

# The same for all gateways of a version: a browser could not open the pages with a key.
_PAGE_PATHS = frozenset(("/", "/docs", "/openapi.json"))
_HEALTH_PATHS = frozenset(("/health", "/health/live", "/health/ready", "/ping", "/metrics"))


class KeyFile:
    """The keys in a file with a `name key` per line; several keys may have one name.

    It is looked at with every request, so a change needs no restart. A broken file changes nothing.
    """

    def __init__(self, path: str) -> None:
        """Raises CannotStart if the file can't be used."""
        try:
            self._names = Watched(lambda: _read_keys(Path(path)), path)
        except (OSError, ValueError) as error:
            raise CannotStart(f"FLOWKV_API_KEYS_FILE {path}: {error}") from None

    def name_of(self, key: bytes) -> str | None:
        """The name of a key, None if it is unknown; how long that takes tells nothing of the keys."""
        digest = hashlib.sha256(key).digest()
        found = None
        for known, name in self._names.content().items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def _read_keys(path: Path) -> dict[bytes, str]:
    """Digest of a key -> its name. Raises OSError, or ValueError, which never repeats a key."""
    names: dict[bytes, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise ValueError(f"line {number} must be a name and a key")
        name, key = words
        if names.setdefault(hashlib.sha256(key.encode()).digest(), name) != name:
            raise ValueError(f"line {number} has a key that is there under another name")
    if not names:
        raise ValueError("it holds no key")
    return names


class Guard:
    """ASGI middleware: lets in requests for a host that is ours and, where there are keys, with one of them.

    The name of the key is in the scope as `KEY_NAME`.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: GatewaySettings,
        on_error: Callable[[Request, FlowKVError], Awaitable[Response]],
    ) -> None:
        """Raises CannotStart if the file of keys can't be used."""
        self._app = app
        self._on_error = on_error
        self._keys = KeyFile(settings.api_keys_file) if settings.api_keys_file else None
        self._keyless_paths = _PAGE_PATHS | (_HEALTH_PATHS if settings.open_health else frozenset())
        hosts = listed(settings.allowed_hosts.lower())
        self._takes_any_host = "*" in hosts or not (hosts or is_local(settings.host))
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            if not self._takes_any_host:
                self._check_host(headers.get("host", ""))
            scope[KEY_NAME] = ""
            if self._keys is not None and scope["path"] not in self._keyless_paths:
                scope[KEY_NAME] = _name_of_client(headers, self._keys)
        except FlowKVError as error:
            response = await self._on_error(Request(scope), error)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, header: str) -> None:
        """Raises ForeignHost for a name that is not ours.

        A web page can give its own name our address, and then read our answers. An address it can't give.
        """
        host = _host_in(header)
        if not host or host == "localhost" or _is_address(host) or host in self._hosts:
            return
        if any(pattern.startswith("*.") and host.endswith(pattern[1:]) for pattern in self._hosts):
            return
        raise ForeignHost(f"This gateway does not go by the name {host!r}; FLOWKV_ALLOWED_HOSTS can add it.")


def _name_of_client(headers: Headers, keys: KeyFile) -> str:
    """Raises Unauthorized. OpenAI's clients send a bearer token, Anthropic's `x-api-key`."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    for key in filter(None, given):
        if name := keys.name_of(key.encode("latin-1")):
            return name
    if any(given):
        raise Unauthorized("The API key is not known here.")
    raise Unauthorized("An API key is needed: send `Authorization: Bearer KEY`, or `x-api-key: KEY`.")


def _host_in(header: str) -> str:
    """The host of a `Host` header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_local(host: str) -> bool:
    """Whether only this host can reach what listens there."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
