"""Certificates for tests, made once: this process and those that it starts trust each other by them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from flowkv.authority import make_certificates
from flowkv_engine.transport.tls import Tls

_FOLDER = "TEST_CERTIFICATES"


def trial_certificates() -> Path:
    """The folder, as `flowkv certs` writes it."""
    if (folder := os.environ.get(_FOLDER)) is None:
        folder = os.environ[_FOLDER] = tempfile.mkdtemp(prefix="flowkv-certificates-")
        atexit.register(shutil.rmtree, folder)
        make_certificates(Path(folder))
    return Path(folder)


def tls_of(folder: Path, name: str = "node") -> Tls:
    """What a node has whose certificate is that of `name`."""
    return Tls(cert=f"{folder}/{name}.pem", key=f"{folder}/{name}.key", ca=f"{folder}/ca.pem")


def trial_tls() -> Tls:
    return tls_of(trial_certificates())
