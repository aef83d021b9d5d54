"""`flowkv certs`: who trusts whom by what it writes."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from flowkv.authority import LOCAL_HOSTS, NAMES, make_certificates
from flowkv.certs import main
from flowkv_common.errors import CannotStart


def shaken_hands(server: ssl.SSLContext, client: ssl.SSLContext, hostname: str) -> ssl.SSLObject:
    """The client's end of a handshake in memory. Raises `ssl.SSLError` for whoever doesn't trust."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=hostname),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(3):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert all(end.version() == "TLSv1.3" for end in ends)
    return ends[0]


def context(folder: Path, name: str, *, is_server: bool) -> ssl.SSLContext:
    side = ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT
    made = ssl.SSLContext(side)
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(folder / "ca.pem")
    made.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return made


@pytest.mark.parametrize("hostname", ["nats", "localhost", "127.0.0.1", "10.0.0.1", "kv.example"])
def test_each_service_trusts_the_others_by_all_their_names(tmp_path: Path, hostname: str) -> None:
    assert main([str(tmp_path), "--host", "10.0.0.1", "--host", "kv.example"]) == 0
    for name in NAMES:
        server = context(tmp_path, "nats", is_server=True)
        shaken_hands(server, context(tmp_path, name, is_server=False), hostname)
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken_hands(server, context(tmp_path, "node", is_server=False), "elsewhere.example")


@pytest.mark.parametrize("name", ["scheduler", "node", "operator"])
def test_only_gateway_and_nats_are_known_by_the_names_of_hosts(name: str, tmp_path: Path) -> None:
    make_certificates(tmp_path, ["10.0.0.1"])
    server, client = (context(tmp_path, name, is_server=is_server) for is_server in (True, False))
    shaken_hands(server, client, name)
    for hostname in ("localhost", "127.0.0.1", "10.0.0.1", "gateway"):
        with pytest.raises(ssl.SSLCertVerificationError):
            shaken_hands(server, client, hostname)


def test_another_authority_is_not_trusted(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    make_certificates(ours)
    make_certificates(others)
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken_hands(context(others, "node", is_server=True), context(ours, "node", is_server=False), "node")


def test_the_second_run_renews_certificates_and_keeps_the_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path, days=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_certificates(tmp_path, days=30)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] == before[name]} == {"ca.pem", "ca.key"}
    assert (
        after.keys()
        == before.keys()
        == {"ca.pem", "ca.key"} | {f"{name}.{end}" for name in NAMES for end in ("pem", "key")}
    )
    node = x509.load_pem_x509_certificate(after["node.pem"])
    assert (node.not_valid_after_utc - node.not_valid_before_utc).days == 30


def test_a_renewed_certificate_is_for_the_same_hosts_until_others_are_named(tmp_path: Path) -> None:
    def hosts() -> set[str]:
        certificate = x509.load_pem_x509_certificate((tmp_path / "nats.pem").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return {str(name.value) for name in names} - {"nats", *LOCAL_HOSTS}

    main([str(tmp_path), "--host", "10.0.0.1", "--host", "*.kv.example"])
    main([str(tmp_path)])
    assert hosts() == {"10.0.0.1", "*.kv.example"}
    main([str(tmp_path), "--host", "fd00::1"])
    assert hosts() == {"fd00::1"}


@pytest.mark.parametrize("host", ["", "10.0.0.1:4222", "nats://a", "a b", "a..b", "a" * 64, "bücher.example"])
def test_what_is_no_name_of_a_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(CannotStart, match="--host"):
        main([str(tmp_path / "certs"), "--host", host])
    assert not (tmp_path / "certs").exists()


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotStart, match=f"{tmp_path}/file: File exists"):
        main([str(tmp_path / "file")])


def test_only_the_owner_can_read_a_key(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert {mode for name, mode in modes.items() if name.endswith(".key")} == {0o600}


@pytest.mark.parametrize("harm", ["no key", "another's key", "noise"])
def test_an_authority_that_can_not_be_used_is_named(tmp_path: Path, harm: str) -> None:
    make_certificates(tmp_path)
    key = tmp_path / "ca.key"
    key.unlink()
    if harm == "another's key":
        key.write_bytes((tmp_path / "node.key").read_bytes())
    if harm == "noise":
        key.write_text("noise")
    with pytest.raises(CannotStart, match=str(tmp_path)):
        make_certificates(tmp_path)


@pytest.mark.parametrize("days", ["0", "3651", "10000000"])
def test_days_that_are_none_are_refused(tmp_path: Path, days: str) -> None:
    with pytest.raises(CannotStart, match=f"--days is {days}, it must be from 1 to 3650"):
        main([str(tmp_path), "--days", days])
