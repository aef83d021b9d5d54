"""Who may come in: keys, limits, names of the host, origins of web pages, TLS."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import ssl
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from flowkv.authority import make_certificates
from flowkv_common.config import GatewaySettings
from flowkv_common.errors import CannotStart
from flowkv_common.health import Entry, gateway_entry, problem
from flowkv_gateway.access import KeyFile
from flowkv_gateway.http import TlsContext
from flowkv_gateway.tokenizer import Tokenizer
from tests.gateway_support import MODEL, Gateway, serving, text_chunks
from tests.waiting import soon

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "say hello"}]}
PATH = "/v1/chat/completions"
ALICE, BOB = {"authorization": "Bearer sk-alice"}, {"x-api-key": "sk-bob"}
ORIGIN = "https://chat.example"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# who and what\nalice sk-alice\n\nbob   sk-bob\nbob sk-next\n")
    return file


def write(file: Path, text: str) -> None:
    file.write_text(text)


async def post(gateway: Gateway, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return await gateway.http.post(PATH, json={**CHAT, **fields}, headers=headers)


# --- keys ------------------------------------------------------------------------------------------


async def test_a_key_is_needed(tokenizer: Tokenizer, keys_file: Path) -> None:
    async with serving(tokenizer, api_keys_file=str(keys_file)) as gateway:
        for headers in (
            {},
            {"authorization": "Bearer sk-no"},
            {"x-api-key": "sk"},
            {"authorization": "sk-alice"},
        ):
            refused = await post(gateway, headers)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert "sk-" not in error["message"]
        for headers in (ALICE, BOB, {"x-api-key": "sk-next"}, {"authorization": "bearer  sk-bob"}):
            assert (await post(gateway, headers)).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            await gateway.client.models.list()
        assert [one.id async for one in gateway.client.with_options(api_key="sk-bob").models.list()] == [
            MODEL
        ]
        assert (await gateway.http.get("/nope")).status_code == 401, (
            "what there is, is shown to clients alone"
        )
        assert await gateway.metric('flowkv_gateway_errors_total{status="401"}') == 6


async def test_paths_of_anthropics_api_have_its_errors(tokenizer: Tokenizer, keys_file: Path) -> None:
    async with serving(tokenizer, api_keys_file=str(keys_file)) as gateway:
        for headers, status, kind in (({}, 401, "authentication_error"), (ALICE, 404, "not_found_error")):
            refused = await gateway.http.get("/v1/messages/none", headers=headers)
            assert refused.status_code == status
            message = refused.json()["error"]["message"]
            assert message
            assert refused.json() == {"type": "error", "error": {"type": kind, "message": message}}


@pytest.mark.parametrize(("is_open", "status"), [(True, 200), (False, 401)])
async def test_health_without_a_key(
    tokenizer: Tokenizer, keys_file: Path, is_open: bool, status: int
) -> None:
    async with serving(tokenizer, api_keys_file=str(keys_file), open_health=is_open) as gateway:
        for path in ("/health", "/health/live", "/health/ready", "/ping", "/metrics"):
            assert (await gateway.http.get(path)).status_code == status
            assert (await gateway.http.get(path, headers=ALICE)).status_code == 200
        assert (await gateway.http.get("/health/deep")).status_code == 401
        entry = gateway_entry({"FLOWKV_API_KEYS_FILE": str(keys_file)})
        assert await asyncio.to_thread(problem, gateway.port, "/health", entry) is None


async def test_a_change_of_the_file_counts_at_once(
    tokenizer: Tokenizer, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tokenizer, api_keys_file=str(keys_file)) as gateway:
        write(keys_file, "alice sk-new-alice\n")
        assert (await post(gateway, BOB)).status_code == 401
        assert (await post(gateway, {"x-api-key": "sk-new-alice"})).status_code == 200
        for broken in ("alice sk-secret too-much\n", "\n# none\n", "a sk-secret\nb sk-secret\n"):
            write(keys_file, broken)
            assert (await post(gateway, {"x-api-key": "sk-new-alice"})).status_code == 200
        os.unlink(keys_file)
        for _ in range(3):
            assert (await post(gateway, {"x-api-key": "sk-new-alice"})).status_code == 200
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 4, "each is told of once"
    assert "sk-" not in "".join(errors)


@pytest.mark.parametrize("text", ["", "alice\n", "alice sk-a\nbob sk-a\n", "alice sk a\n"])
def test_no_start_with_a_broken_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(CannotStart, match="FLOWKV_API_KEYS_FILE"):
        KeyFile(str(file))
    with pytest.raises(CannotStart, match="No such file"):
        KeyFile(str(tmp_path / "nowhere"))


async def test_the_log_tells_who_asked(
    tokenizer: Tokenizer, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(tokenizer, api_keys_file=str(keys_file)) as gateway:
        await post(gateway, {**ALICE, "x-request-id": "mine"}, user="u-1")
        await post(gateway, BOB, user="u-1", safety_identifier="u-2")
        await post(gateway, BOB, user=3)
        await post(gateway)
    lines = [record.__dict__["fields"] for record in caplog.records if hasattr(record, "fields")]
    assert [line["key"] for line in lines] == ["alice", "bob", "bob", ""]
    assert [line.get("user") for line in lines] == ["u-1", "u-2", None, None]
    assert (lines[0]["x_request_id"], lines[2]["field"], lines[3]["status"]) == ("mine", "user", 401)
    assert all(line["x_request_id"].startswith("req-") for line in lines[1:])


# --- limits of a key -------------------------------------------------------------------------------


async def test_a_key_has_its_number_of_open_requests(tokenizer: Tokenizer, keys_file: Path) -> None:
    async with serving(tokenizer, api_keys_file=str(keys_file), key_max_requests=2) as gateway:
        gate = asyncio.Event()
        gateway.dispatch.script = [gate, *text_chunks(tokenizer, "hi")]
        async with asyncio.TaskGroup() as tasks:
            open_ones = [tasks.create_task(post(gateway, ALICE)) for _ in range(2)]
            while len(gateway.dispatch.asked) < 2:
                gateway.dispatch.was_asked.clear()
                await soon(gateway.dispatch.was_asked.wait())
            for stream in (False, True):
                refused = await post(gateway, ALICE, stream=stream)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            bobs = tasks.create_task(post(gateway, BOB))
            gate.set()
        assert [one.result().status_code for one in (*open_ones, bobs)] == [200] * 3
        assert (await post(gateway, ALICE)).status_code == 200


async def test_a_key_has_its_tokens_per_minute(tokenizer: Tokenizer, keys_file: Path) -> None:
    settings: dict[str, Any] = {"api_keys_file": str(keys_file), "key_tokens_per_minute": 6}
    async with serving(tokenizer, **settings) as gateway:
        used = (await post(gateway, ALICE)).json()["usage"]["total_tokens"]
        refused = await post(gateway, ALICE)
        assert refused.status_code == 429
        # Six a minute: ten seconds each, until there is one again.
        wait_s = 10 * (used - 6 + 1)
        assert wait_s - 5 <= int(refused.headers["retry-after"]) <= wait_s
        assert (await post(gateway, BOB)).status_code == 200


# --- hosts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        ({}, "evil.example:8000", 403),
        ({}, "localhost:8000", 200),
        ({}, "127.0.0.1", 200),
        ({}, "[::1]:8000", 200),
        ({}, "localhost.evil.example", 403),
        ({"host": "0.0.0.0"}, "any.example", 200),
        ({"host": "::1"}, "any.example", 403),
        ({"host": "0.0.0.0", "allowed_hosts": "api.example"}, "any.example", 403),
        ({"host": "0.0.0.0", "allowed_hosts": "api.example"}, "10.0.0.7:8000", 200),
        ({"allowed_hosts": "api.example, *.chat.example"}, "API.example.:443", 200),
        ({"allowed_hosts": "api.example, *.chat.example"}, "a.chat.example", 200),
        ({"allowed_hosts": "api.example, *.chat.example"}, "chat.example", 403),
        ({"allowed_hosts": "*"}, "evil.example", 200),
    ],
)
async def test_hosts(tokenizer: Tokenizer, settings: dict[str, Any], host: str, status: int) -> None:
    async with serving(tokenizer, **settings) as gateway:
        response = await post(gateway, {"host": host})
        assert response.status_code == status
        if status == 403:
            assert response.json()["error"]["type"] == "permission_error"


# --- web pages -------------------------------------------------------------------------------------


async def test_pages_of_allowed_origins(tokenizer: Tokenizer, keys_file: Path) -> None:
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    settings: dict[str, Any] = {
        "api_keys_file": str(keys_file),
        "allowed_origins": f"https://other.example, {ORIGIN}",
    }
    async with serving(tokenizer, **settings) as gateway:
        allowed = await gateway.http.options(PATH, headers={"origin": ORIGIN, **preflight})
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        refused = await gateway.http.options(PATH, headers={"origin": "https://evil.example", **preflight})
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        for headers, stream, status in (
            (ALICE, False, 200),
            (ALICE, True, 200),
            ({}, False, 401),
            ({**ALICE, "host": "evil.example"}, False, 403),
        ):
            response = await post(gateway, {"origin": ORIGIN, **headers}, stream=stream)
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, ORIGIN)
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        gateway.dispatch.script = [RuntimeError()]
        assert (await post(gateway, {"origin": ORIGIN, **ALICE})).headers[
            "access-control-allow-origin"
        ] == ORIGIN
        foreign = await post(gateway, {"origin": "https://evil.example", **ALICE})
        assert "access-control-allow-origin" not in foreign.headers


async def test_no_origin_is_allowed_unless_it_was_set(tokenizer: Tokenizer) -> None:
    async with serving(tokenizer) as gateway:
        asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
        assert (await gateway.http.options(PATH, headers=asked)).status_code == 405
        assert "access-control-allow-origin" not in (await post(gateway, {"origin": ORIGIN})).headers


# --- TLS -------------------------------------------------------------------------------------------


def new_certificate(folder: Path, name: str = "gateway") -> dict[str, Any]:
    """The settings of a gateway with a certificate of an authority of its own."""
    make_certificates(folder)
    return {"tls_cert": str(folder / f"{name}.pem"), "tls_key": str(folder / f"{name}.key")}


def trusting(settings: dict[str, Any]) -> ssl.SSLContext:
    """What a client has that trusts the authority of this certificate."""
    return ssl.create_default_context(cafile=str(Path(settings["tls_cert"]).with_name("ca.pem")))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return new_certificate(tmp_path_factory.mktemp("tls"))


async def test_tls(tokenizer: Tokenizer, certificate: dict[str, Any]) -> None:
    async with serving(tokenizer, **certificate) as gateway:
        url = f"https://127.0.0.1:{gateway.port}"
        ours = trusting(certificate)
        async with httpx.AsyncClient(base_url=url, verify=ours, trust_env=False) as client:
            assert (await client.post(PATH, json=CHAT)).status_code == 200
            events = (await client.post(PATH, json={**CHAT, "stream": True})).text
            assert events.endswith("data: [DONE]\n\n")
        async with httpx.AsyncClient(
            base_url=url, verify=ssl.create_default_context(), trust_env=False
        ) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get("/health")
        with pytest.raises(httpx.RemoteProtocolError):
            await gateway.http.get(f"http://127.0.0.1:{gateway.port}/health")
        assert await asyncio.to_thread(problem, gateway.port, "/health", Entry(has_tls=True)) is None
        assert await asyncio.to_thread(problem, gateway.port, "/health") is not None
        command = [sys.executable, "-m", "flowkv_common.health", str(gateway.port)]
        environ = {**os.environ, "FLOWKV_TLS_CERT": certificate["tls_cert"]}
        check = partial(subprocess.run, command, env=environ, capture_output=True, text=True, timeout=10)
        assert (await asyncio.to_thread(check)).stdout == "well\n"


@pytest.mark.parametrize("intruder", ["another authority's", "another service's"])
async def test_clients_trust_no_server_that_is_not_the_gateway(
    tokenizer: Tokenizer, certificate: dict[str, Any], tmp_path: Path, intruder: str
) -> None:
    if intruder == "another authority's":
        shown = new_certificate(tmp_path)
    else:
        shown = {name: path.replace("gateway.", "node.") for name, path in certificate.items()}
    async with serving(tokenizer, **shown) as gateway:
        url = f"https://127.0.0.1:{gateway.port}"
        async with httpx.AsyncClient(base_url=url, verify=trusting(certificate), trust_env=False) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get("/health")


async def test_a_renewed_certificate_counts_for_new_connections(
    tokenizer: Tokenizer, certificate: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths: dict[str, Any] = {name: str(tmp_path / name) for name in certificate}
    for name, path in certificate.items():
        shutil.copy(path, paths[name])
    (tmp_path / "new").mkdir()
    renewed = new_certificate(tmp_path / "new")
    async with serving(tokenizer, **paths) as gateway:

        def client(settings: dict[str, Any]) -> httpx.AsyncClient:
            url = f"https://127.0.0.1:{gateway.port}"
            return httpx.AsyncClient(base_url=url, verify=trusting(settings), trust_env=False)

        async with client(certificate) as early:
            assert (await early.get("/health")).status_code == 200
            shutil.copy(renewed["tls_cert"], paths["tls_cert"])  # its key is not there yet
            async with client(certificate) as between:
                assert (await between.get("/health")).status_code == 200
            shutil.copy(renewed["tls_key"], paths["tls_key"])
            async with client(renewed) as late:
                assert (await late.get("/health")).status_code == 200
            assert (await early.get("/health")).status_code == 200, "open connections stay"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1


def test_no_start_without_a_key_that_fits(certificate: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="FLOWKV_TLS_CERT"):
        TlsContext(certificate["tls_cert"], str(tmp_path / "nowhere"))
    with pytest.raises(CannotStart, match="FLOWKV_TLS_KEY"):
        TlsContext(certificate["tls_cert"], certificate["tls_cert"])


@pytest.mark.parametrize(
    "settings",
    [
        {"tls_cert": "cert.pem"},
        {"tls_key": "key.pem"},
        {"key_max_requests": 1},
        {"key_tokens_per_minute": -1},
    ],
)
def test_settings_that_need_others(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="FLOWKV_"):
        GatewaySettings(model_path="unused", **settings)
