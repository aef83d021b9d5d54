"""What a connection shows NATS, read from URLs and files."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from flowkv.authority import make_certificates
from flowkv_common.bus.access import Access, Login, Servers
from flowkv_common.config import NatsSettings, load_settings
from flowkv_common.errors import CannotStart


def read(url: str) -> Servers:
    return Access(NatsSettings(nats_url=url)).read_servers()


@pytest.mark.parametrize(
    ("url", "bare", "login"),
    [
        ("nats://a", "nats://a:4222", Login()),
        ("a:1", "nats://a:1", Login()),
        ("tls://[::1]:1", "tls://[::1]:1", Login()),
        ("nats://me:secret@a:1", "nats://a:1", Login(user="me", password="secret")),
        ("nats://me:a%40b%2Fc@a", "nats://a:4222", Login(user="me", password="a@b/c")),
        ("nats://t0ken@a", "nats://a:4222", Login(token="t0ken")),
    ],
)
def test_a_url_without_its_secrets(url: str, bare: str, login: Login) -> None:
    assert read(url) == Servers((bare,), (login,))


def test_a_list_and_which_login_is_for_which_server() -> None:
    servers = read(" nats://u:one@a:1 , nats://u:two@b:2,")
    assert servers.urls == ("nats://a:1", "nats://b:2")
    assert servers.where == "a:1, b:2"
    assert servers.login_at("b", 2) == Login("u", "two")
    assert servers.login_at("told-by-another", 3) == Login("u", "one")


def test_the_order_is_the_same_each_time_until_other_servers_are_named(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(",".join(f"nats://s{number}" for number in range(20)))
    access = Access(NatsSettings(nats_url_file=str(file)))
    first = access.in_our_order(access.read_servers())
    assert first == access.in_our_order(access.read_servers())
    assert sorted(first) == sorted(access.read_servers().urls)
    file.write_text("nats://me:secret@other")
    assert access.in_our_order(access.read_servers()) == ["nats://other:4222"]


@pytest.mark.parametrize("url", ["", " , "])
def test_no_server_at_all(url: str) -> None:
    with pytest.raises(CannotStart, match="names no NATS server"):
        read(url)


@pytest.mark.parametrize(
    "url",
    ["nats://:1", "nats://u:secret@host:port", "nats://[::1", "http://u:secret@a:4222", "nats:a", "ws://a"],
)
def test_no_address_of_a_server(url: str) -> None:
    with pytest.raises(CannotStart, match="^'[^']*' is no address of NATS: say nats://host:4222") as caught:
        read(f"nats://good,{url}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("password", ["sec/ret", "1/secret", "sec#ret", "sec?ret", "1#", "sec@r/et"])
def test_a_password_that_a_url_can_not_hold_is_told_how_to_be_written(password: str) -> None:
    with pytest.raises(
        CannotStart, match="before 'host:4222' can't stand in a URL: write / as %2F"
    ) as caught:
        read(f"nats://me:{password}@host:4222")
    assert password not in str(caught.value)


def test_a_certificate_needs_its_key() -> None:
    with pytest.raises(SystemExit, match="FLOWKV_NATS_CERT and FLOWKV_NATS_KEY: one needs the other"):
        load_settings(NatsSettings, ["--nats-cert", "a.pem"], {})


def test_an_even_number_of_replicas_is_refused() -> None:
    with pytest.raises(SystemExit, match="FLOWKV_NATS_REPLICAS is 2: choose 1, 3 or 5"):
        load_settings(NatsSettings, ["--nats-replicas", "2"], {})


def test_a_key_with_a_password_is_refused_and_not_asked_for(tmp_path: Path) -> None:
    key, cert = tmp_path / "node.key", tmp_path / "node.pem"
    make_certificates(tmp_path)
    plain = serialization.load_pem_private_key(key.read_bytes(), password=None)
    form = serialization.PrivateFormat.PKCS8
    locked = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(plain.private_bytes(serialization.Encoding.PEM, form, locked))
    with pytest.raises(CannotStart, match="can't show NATS who we are: .SSL. PEM lib"):
        Access(NatsSettings(nats_cert=str(cert), nats_key=str(key)))
