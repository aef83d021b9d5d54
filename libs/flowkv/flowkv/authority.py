"""Certificates of a private authority: what `flowkv certs` writes. A service is known by its name in them."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flowkv_common.errors import CannotStart

# Those who show a certificate; `operator` is a person's, for the command line.
NAMES = ("gateway", "scheduler", "node", "nats", "operator")
# Those who are called by the name of their host. No other may pass for them there.
SERVERS = ("gateway", "nats")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_LABEL = re.compile("[A-Za-z0-9_-]{1,63}")  # between the dots of a name
CA_NAME = "FlowKV trial authority"
# Longer than a trial: for a new authority all services would need a new ca.pem.
CA_DAYS = 3650
# A host whose clock is behind must not see a certificate of the future.
CLOCK_TOLERANCE = datetime.timedelta(hours=1)


class Authority(NamedTuple):
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(folder: Path, hosts: Sequence[str] = (), days: int = 365) -> None:
    """Writes a certificate and a key for each of `NAMES`, signed by the authority in `folder`.

    Without `hosts` they are for those that they were for before. Makes the authority if there is none. Raises
    CannotStart if the one that is there can't be used, or if `hosts` has one that is neither a name nor an
    address.
    """
    for host in hosts:
        _alternative_name(host)
    folder.mkdir(parents=True, exist_ok=True)
    authority = _read_authority(folder) if (folder / "ca.pem").exists() else _make_authority(folder)
    for name in NAMES:
        key = ec.generate_private_key(ec.SECP256R1())
        names = [name]
        if name in SERVERS:
            names += [*LOCAL_HOSTS, *(hosts or _hosts_before(folder / f"{name}.pem"))]
        certificate = _sign(name, key.public_key(), names, days, authority)
        _write_key(folder / f"{name}.key", key)
        _write(folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _make_authority(folder: Path) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _certificate_for(CA_NAME, key.public_key(), CA_DAYS)
        .issuer_name(_common_name(CA_NAME))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_key(folder / "ca.key", key)
    _write(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return Authority(certificate, key)


def _read_authority(folder: Path) -> Authority:
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:  # TypeError: the key has a password
        raise CannotStart(f"the authority in {folder} can't be used: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CannotStart(f"{folder / 'ca.key'} is not the key of ca.pem: remove both for a new authority")
    return Authority(certificate, key)


def _sign(
    name: str, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], days: int, authority: Authority
) -> x509.Certificate:
    """A certificate for a service, which calls others and is called."""
    both_sides = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    ca_key = authority.key.public_key()
    known_as = x509.SubjectAlternativeName([_alternative_name(host) for host in hosts])
    return (
        _certificate_for(name, key, days)
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_sides), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key), critical=False)
        .add_extension(known_as, critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _certificate_for(name: str, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_common_name(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _hosts_before(path: Path) -> list[str]:
    """What the certificate there is for, beside its service and this host; none if there is none."""
    if not path.exists():
        return []
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names if str(name.value) not in (path.stem, *LOCAL_HOSTS)]


def _alternative_name(host: str) -> x509.GeneralName:
    """Raises CannotStart for what is neither a name nor an address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        labels = host.removeprefix("*.").split(".")
        if not all(_LABEL.fullmatch(label) for label in labels):
            what = "neither a name nor an address of a host: say no port, and ü as xn--..."
            raise CannotStart(f"--host is {host!r}: {what}") from None
        return x509.DNSName(host)


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    _write(path, key.private_bytes(encoding, form, serialization.NoEncryption()), mode=0o600)


def _write(path: Path, content: bytes, *, mode: int) -> None:
    """In one step: a service may read the file at any time."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with open(fresh, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)
    fresh.rename(path)
