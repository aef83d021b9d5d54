"""What a connection shows NATS: where the servers are, who we are, and our certificate.

All of it is read from its files anew for each attempt to connect. So a secret changes without a restart: the
server refuses the old one, the next attempt shows the new one.
"""

from __future__ import annotations

import importlib.util
import random
import re
import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from nats.aio.client import RawCredentials

from flowkv_common.config import NatsSettings, listed
from flowkv_common.errors import CannotStart

DEFAULT_PORT = 4222
# The parts of a `.creds` file, each on a line of its own.
_JWT = re.compile(r"BEGIN NATS USER JWT-+\n(\S+)\n")
_SEED = re.compile(r"BEGIN USER NKEY SEED-+\n(\S+)\n")
_BARE_SEED = re.compile(r"\s*(\S+)\s*")


class Login(NamedTuple):
    """A user and a password, or a token, or nothing."""

    user: str | None = None
    password: str | None = None
    token: str | None = None


class Servers(NamedTuple):
    """The servers of one cluster. `urls` hold no secrets; `logins` has one per URL, at the same place."""

    urls: tuple[str, ...]
    logins: tuple[Login, ...]

    @property
    def where(self) -> str:
        """For log lines and errors."""
        return ", ".join(urlsplit(url).netloc for url in self.urls)

    def login_at(self, host: str | None, port: int | None) -> Login:
        """For a server of this cluster: its own, for one that we only know from another server the first."""
        for url, login in zip(self.urls, self.logins, strict=True):
            if (urlsplit(url).hostname, urlsplit(url).port) == (host, port):
                return login
        return self.logins[0]


class Access:
    """How one process reaches NATS, by its settings."""

    def __init__(self, nats: NatsSettings) -> None:
        """Raises CannotStart when a file is missing now, or what would read it: later that may pass."""
        self.nats = nats
        self.has_certificates = bool(nats.nats_ca or nats.nats_cert)
        if nats.nats_credentials and importlib.util.find_spec("nkeys") is None:
            raise CannotStart("FLOWKV_NATS_CREDENTIALS needs a package: pip install 'flowkv[nkeys]'")
        try:
            servers = self.read_servers()
            self.read_credentials()
            self.read_tls()
        except CannotStart:
            raise
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise CannotStart(f"can't show NATS who we are: {error}") from None
        # Not all services go to the first server.
        self._order = list(range(len(servers.urls)))
        random.shuffle(self._order)

    def read_servers(self) -> Servers:
        """As the settings or their file say now. Raises OSError, ValueError, CannotStart if there is none."""
        text = self.nats.nats_url
        if self.nats.nats_url_file:
            text = Path(self.nats.nats_url_file).read_text()
        urls = [_parse(one) for one in listed(text)]
        if not urls:
            raise CannotStart(f"{self.nats.nats_url_file or 'FLOWKV_NATS_URL'} names no NATS server")
        return Servers(tuple(map(_bare, urls)), tuple(map(_login, urls)))

    def in_our_order(self, servers: Servers) -> list[str]:
        """The URLs, shuffled once per process."""
        if len(servers.urls) != len(self._order):
            self._order = random.sample(range(len(servers.urls)), len(servers.urls))
        return [servers.urls[place] for place in self._order]

    def read_tls(self) -> ssl.SSLContext | None:
        """The authority that we believe, and our certificate; None where no file says. Raises OSError."""
        if not self.has_certificates:
            return None
        context = ssl.create_default_context(cafile=self.nats.nats_ca or None)
        if self.nats.nats_cert:
            # Without a password OpenSSL would ask for one at the terminal, and hold the process up.
            context.load_cert_chain(self.nats.nats_cert, self.nats.nats_key, password="")
        return context

    def read_credentials(self) -> tuple[RawCredentials | None, str | None]:
        """What a `.creds` file holds, or the seed of an nkey, as nats-py takes it; None where no file says.

        Raises OSError, and ValueError for a file that is only half written.
        """
        path = self.nats.nats_credentials
        if not path:
            return None, None
        text = Path(path).read_text()
        jwt = _JWT.search(text)
        seed = _SEED.search(text) if jwt else _BARE_SEED.fullmatch(text)
        if seed is None or not _is_seed(seed[1]):
            raise ValueError(f"{path} holds no credentials of a user, nor the seed of an nkey")
        return (RawCredentials(text), None) if jwt else (None, seed[1])


def _parse(url: str) -> SplitResult:
    """Raises CannotStart for what is no address of a server. It never repeats a password."""
    where = url.rpartition("@")[2]
    try:
        parsed = urlsplit(url if "://" in url else f"nats://{url}")
        is_cut = "@" in parsed.path + parsed.query + parsed.fragment
        host = parsed.hostname if is_cut or parsed.port != 0 else None
    except ValueError:
        is_cut, host = False, None
    if is_cut:
        escapes = "write / as %2F, ? as %3F and # as %23"
        raise CannotStart(f"the user or password before {where!r} can't stand in a URL: {escapes}")
    if not host or parsed.scheme not in ("nats", "tls"):
        raise CannotStart(f"{where!r} is no address of NATS: say nats://host:4222, or tls://host:4222")
    return parsed


def _bare(url: SplitResult) -> str:
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    return f"{url.scheme}://{host}:{url.port or DEFAULT_PORT}"


def _login(url: SplitResult) -> Login:
    if not url.username:
        return Login()
    if url.password is None:
        return Login(token=unquote(url.username))
    return Login(user=unquote(url.username), password=unquote(url.password))


def _is_seed(text: str) -> bool:
    nkeys = importlib.import_module("nkeys")
    try:
        nkeys.from_seed(bytearray(text, "ascii")).wipe()
    except (nkeys.NkeysError, ValueError):
        return False
    return True
