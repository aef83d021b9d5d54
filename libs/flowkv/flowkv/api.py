"""The HTTP API of a cluster, or of any OpenAI server, as commands ask it: where it is, and one request."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from flowkv.terminal import connected
from flowkv_common.errors import FlowKVError, Internal, Unavailable, from_wire
from flowkv_common.health import gateway_entry
from flowkv_common.wire.messages import Refusal

DEFAULT_URL = "http://127.0.0.1:8000"
# A whole answer, or the next piece of a streamed one.
TIMEOUT_S = 600.0


def add_api_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default="", help=f"of the API; else as the gateway tells, else {DEFAULT_URL}"
    )
    parser.add_argument("--key", default="", help="for the API; else the first of FLOWKV_API_KEYS_FILE")


async def find_url(options: argparse.Namespace) -> str:
    """The one given, else that of a gateway which NATS knows."""
    if options.url:
        return str(options.url).rstrip("/").removesuffix("/v1")
    from flowkv_common.cluster_view import until_complete, viewing

    try:
        async with connected(options) as bus, viewing(bus) as view:
            await until_complete(view, 1.0)
            urls = [one.metadata.get("url", "") for one in view.services("gateway")]
    except FlowKVError:
        urls = []
    return reachable(next(filter(None, urls), DEFAULT_URL))


def reachable(url: str) -> str:
    """Of a service that listens on all addresses: through this host."""
    return url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")


def headers_with(key: str) -> dict[str, str]:
    """Those of a request in JSON. Raises OSError if the file of keys can't be read."""
    key = key or gateway_entry(os.environ).key
    return {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}


@contextmanager
def asked(
    url: str, path: str, body: Mapping[str, Any] | None = None, *, key: str = "", timeout_s: float = TIMEOUT_S
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET, or with a `body` to a POST, whatever its status. Raises Unavailable."""
    address = urlsplit(url)
    host = address.hostname or ""
    if address.scheme == "https":
        context = ssl.create_default_context()
        if host in ("127.0.0.1", "::1", "localhost"):  # the certificate is for the name that clients use
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, address.port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, address.port, timeout=timeout_s)
    try:
        method, payload = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, f"{address.path.rstrip('/')}{path}", payload, headers_with(key))
        yield connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"the API at {url} does not answer: {error or type(error).__name__}") from None
    finally:
        connection.close()


def raise_for_status(response: http.client.HTTPResponse) -> None:
    """Raises the error that the answer tells of, in its own words."""
    if response.status == 200:
        return
    payload = response.read()
    try:
        message = str(json.loads(payload)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = payload[:300].decode(errors="replace")
    raise from_wire(Refusal(code=response.status, message=f"{response.status}: {message}"))


def first_model(url: str, key: str) -> str:
    """The name of the first model that the API lists."""
    with asked(url, "/v1/models", key=key, timeout_s=10.0) as response:
        raise_for_status(response)
        try:
            return str(json.loads(response.read())["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise Internal(f"{url}/v1/models lists no model: {error!r}") from None
