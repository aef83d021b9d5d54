"""nats-py's client, mended: silence is noticed, what is cancelled ends, servers and secrets change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import nats.errors
from nats.aio.client import DEFAULT_FLUSH_TIMEOUT, PING_PROTO, Client, Srv
from nats.aio.subscription import Subscription as NatsSubscription
from nats.aio.transport import TcpTransport

from flowkv_common.bus.access import Access, Servers

# The server is asked for a sign of life this often. Every wait that ends in a verdict on others is longer
# than DEAF_AFTER_PINGS of these, so that a process that is cut off knows it first (docs/architecture.md,
# rule 8).
PING_EVERY_S = 0.25
DEAF_AFTER_PINGS = 4
# Then another connection is tried. Another server is worth trying sooner than the same one again.
HANG_UP_AFTER_PINGS = 20
CHANGE_SERVER_AFTER_PINGS = 8

T = TypeVar("T")

log = logging.getLogger(__name__)


class NothingToShow(OSError):
    """A file of ours can't be read, or holds nothing of use: half written, or taken away."""


class NoTls(OSError):
    """The server can't show that it is the one that we look for."""


class Refused(nats.errors.NoServersError):
    """NATS has refused us for so long that we give up. nats-py then closes the connection for good."""

    def __init__(self, why: Exception | None, refused_for_s: float) -> None:
        self._text = f"it has refused us for {refused_for_s:.0f} s: {why}"

    def __str__(self) -> str:
        return self._text


class BarrierClient(Client):
    """nats-py's client as FlowKV needs it.

    What nats-py 2.16 does otherwise:

    - It writes a PING straight to the socket, while SUB, UNSUB and PUB may still wait in its buffer. The PONG
      then proves nothing: `flush` returns before the server knows of a subscription, and `drain` before the
      last messages have come, which are then dropped.
    - It notices after half a minute that a server is stopped, or that a network drops packets.
    - An error in its read loop ends the loop and is only logged; the PONG of a cancelled flush is one.
    - It drops a cancel that comes while it flushes.
    - A server that ends a connection, as when a password changes, ends the client for good. A password, the
      public half of an nkey and a certificate are read once.
    - An attempt to reconnect that fails in a way that it does not foresee is its last one: so does one with a
      `.creds` file that is half written.
    - What is published while it is cut off it keeps, and says after the reconnect: also questions for whose
      answers nobody waits any more.
    - To a server that offers no TLS it says its password in the clear, whatever TLS it was told to use.
    """

    def __init__(self, on_heard_again: Callable[[], None], access: Access) -> None:
        """`on_heard_again` is called when a connection that stands is not silent any more."""
        super().__init__()
        self._on_heard_again = on_heard_again
        self._num_silent_pings = 0
        self._access = access
        self.known_servers = Servers((), ())  # as last read
        self._refused_since: float | None = None

    @property
    def is_hearing(self) -> bool:
        """Connected, and the server has said something lately."""
        return bool(self.is_connected) and self._num_silent_pings < DEAF_AFTER_PINGS

    @property
    def server(self) -> str:
        """For log lines: the URL may hold a password."""
        url = self.connected_url
        return f"{url.hostname}:{url.port}" if url else "?"

    @property
    def has_other_servers(self) -> bool:
        """Whether there is another server of the cluster to go to."""
        return len(self._server_pool) > 1

    async def open(self, **options: Any) -> None:
        """`connect` as our access says, until it has worked; `options` are `connect`'s."""
        self.known_servers = self._access.read_servers()
        urls = self._access.in_our_order(self.known_servers)
        # The order is ours: a server that was left comes last.
        await self.connect(urls, dont_randomize=True, **options)

    def forget(self, subscription: NatsSubscription) -> None:
        """Drop a subscription without a word to the server, which may be gone.

        One that could not be drained stays in nats-py's books, and the next reconnect brings it back to life.
        """
        subscription._stop_processing()
        self._remove_sub(subscription._id)

    # --- in the place of nats-py's own ------------------------------------------------------------

    async def close(self) -> None:
        if not self.is_connected:
            # What is buffered has nowhere to go, and Python 3.13.0 can't write to a transport that is closed.
            self._pending.clear()
            self._pending_data_size = 0
        await super().close()

    async def flush(self, timeout: float = DEFAULT_FLUSH_TIMEOUT) -> None:
        await _cancellable(super().flush(timeout))  # type: ignore[arg-type]

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        return await _cancellable(super()._flush_pending(force_flush))

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        await self._flush_pending(force_flush=True)
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()  # its flush was cancelled
        await super()._process_pong()
        self._hear()

    async def _process_err(self, err_msg: str) -> None:
        """The server says no, and most often hangs up. The next attempt may mend what it minds."""
        error = nats.errors.Error("nats: " + err_msg.strip("'"))
        self._err = error
        await self._error_cb(error)
        if not any(mild in err_msg.lower() for mild in ("permissions violation", "maximum subscriptions")):
            await self._process_op_err(error)

    async def _read_loop(self) -> None:
        await super()._read_loop()
        if self.is_connected:  # it has failed: the connection stands, and nobody reads it
            await self._process_op_err(nats.errors.StaleConnectionError())

    async def _ping_interval(self) -> None:
        """Until cancelled: one beat after the other, each with a ping on its way.

        Silence is counted in beats, not on the clock: a process that was held up itself has missed one.
        """
        self._num_silent_pings = 0
        while True:
            num_heard = self._num_heard()
            if not self._pongs and self._transport is not None:
                # Straight to the socket, where it waits for nobody; what waits outlives the connection.
                self._pongs.append(asyncio.get_running_loop().create_future())
                self._transport.write(PING_PROTO)
            await asyncio.sleep(PING_EVERY_S)
            if self._num_heard() != num_heard:
                self._hear()
                continue
            self._num_silent_pings += 1
            if self._num_silent_pings == DEAF_AFTER_PINGS:
                log.warning("NATS at %s says nothing any more", self.server)
            patience = CHANGE_SERVER_AFTER_PINGS if self.has_other_servers else HANG_UP_AFTER_PINGS
            if self._num_silent_pings >= patience:
                self._drop_socket()
                await self._process_op_err(nats.errors.StaleConnectionError())
                return

    async def _attempt_reconnect(self) -> None:
        self._drop_socket()  # nats-py would wait until TLS has said goodbye to a server that is gone
        await super()._attempt_reconnect()

    async def _select_next_server(self) -> None:
        """One attempt at the next server. nats-py calls it until one has worked.

        Raises Refused when we give up.
        """
        self._check_patience()
        await self._follow_servers()
        server = self._server_pool.pop(0)
        self._server_pool.append(server)
        wait_s = self.options["reconnect_time_wait"]
        if server.last_attempt is not None and time.monotonic() < server.last_attempt + wait_s:
            await asyncio.sleep(wait_s)
        self._current_server = server
        await self._connect_to_server(server)

    async def _connect_to_server(self, s: Srv) -> None:
        self._drop_socket()  # of the attempt before, if that has failed
        self._show_access(s)
        with _costing_one_attempt():
            await super()._connect_to_server(s)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Before TLS, and before a password is said: a server without TLS is not the one that we look for."""
        if initial_connection and self._wants_tls():
            if not (info.get("tls_required") or info.get("tls_available")):
                raise NoTls("the server has no TLS, and FLOWKV_NATS_CA, _CERT or tls:// ask for it")
            info["tls_required"] = True  # nats-py looks there; TLS that is only offered will do
        await super()._process_info(info, initial_connection)

    async def _process_connect_init(self) -> None:
        try:
            with _costing_one_attempt():
                await super()._process_connect_init()
        except (OSError, nats.errors.Error) as error:
            self._note_refusal(error)
            raise
        self._refused_since = None
        self._drop_old_questions()
        if (writer := self._writer()) and writer.get_extra_info("ssl_object"):
            # Else asyncio logs a warning at the end of each such connection.
            writer.transport.get_protocol()._over_ssl = True  # type: ignore[attr-defined]

    # --- how --------------------------------------------------------------------------------------

    async def _follow_servers(self) -> None:
        """The pool is what the settings say now, and what those servers tell of others."""
        try:
            servers = self._access.read_servers()
        except (OSError, ValueError) as error:  # half written, or taken away for a moment
            await self._error_cb(error)
            return
        if servers.urls != self.known_servers.urls:
            if self.is_closed:  # nats-py between two attempts, before the first has worked
                return
            self.set_server_pool(self._access.in_our_order(servers))
        self.known_servers = servers

    def _show_access(self, s: Srv) -> None:
        """Put what the files hold now where nats-py looks for it. Raises NothingToShow."""
        login = self.known_servers.login_at(s.uri.hostname, s.uri.port)
        self.options["user"], self.options["password"], self.options["token"] = login
        try:
            if (tls := self._access.read_tls()) is not None:
                self.options["tls"] = tls
            credentials = self._access.read_credentials()
        except (OSError, ValueError) as error:
            nothing = NothingToShow(f"can't read what NATS is to be shown: {error}")
            self._note_refusal(nothing)
            raise nothing from error
        self._auth_configured = any(login) or any(credentials)
        if any(credentials):
            self._user_credentials, self._nkeys_seed_str = credentials
            self._setup_nkeys_connect()

    def _note_refusal(self, error: Exception) -> None:
        if _is_refusal(error) and self._refused_since is None:
            self._refused_since = asyncio.get_running_loop().time()
            log.warning("NATS at %s refuses us: %s", self._where_tried(), error)

    def _check_patience(self) -> None:
        """Raises Refused when the first and the last refusal since we were connected lie far apart."""
        if not self.is_reconnecting or self._refused_since is None:
            return
        refused_for_s = asyncio.get_running_loop().time() - self._refused_since
        if refused_for_s >= self._access.nats.nats_give_up_s and _is_refusal(self._err):
            raise Refused(self._err, refused_for_s)

    def _drop_old_questions(self) -> None:
        """Of what waited for a server: who asked has given up, and perhaps asked another."""
        own_answers = bytes(self._resp_sub_prefix or b"")
        if not own_answers:
            return  # nothing was ever asked

        def is_wanted(command: bytes) -> bool:
            operation, *words = command.partition(b"\r\n")[0].split(b" ")
            if operation not in (b"PUB", b"HPUB") or not words[1].startswith(own_answers):
                return True
            return words[1].removeprefix(own_answers).decode() in self._resp_map

        self._pending = list(filter(is_wanted, self._pending))
        self._pending_data_size = sum(map(len, self._pending))

    def _wants_tls(self) -> bool:
        is_said = self._current_server is not None and self._current_server.uri.scheme == "tls"
        return is_said or self._access.has_certificates

    def _where_tried(self) -> str:
        uri = self._current_server.uri if self._current_server is not None else None
        return f"{uri.hostname}:{uri.port}" if uri else "?"

    def _drop_socket(self) -> None:
        """At once: a close would wait until all is sent, which a silent server does not take."""
        if (writer := self._writer()) is not None:
            writer.transport.abort()

    def _writer(self) -> asyncio.StreamWriter | None:
        return self._transport._io_writer if isinstance(self._transport, TcpTransport) else None

    def _num_heard(self) -> int:
        return int(self.stats["in_msgs"]) + int(self._pongs_received)

    def _hear(self) -> None:
        was_deaf = self._num_silent_pings >= DEAF_AFTER_PINGS
        self._num_silent_pings = 0
        if was_deaf:
            log.info("NATS at %s is heard again", self.server)
            self._on_heard_again()


def _is_refusal(error: Exception | None) -> bool:
    """Whether a server has answered, and does not want us or is not whom we want; else it is out of reach."""
    return isinstance(error, ssl.SSLError | NothingToShow | NoTls) or "auth" in str(error).lower()


@contextlib.contextmanager
def _costing_one_attempt() -> Iterator[None]:
    """Any error in the block is an OSError or one of nats-py's: after others it would not try again."""
    try:
        yield
    except (OSError, nats.errors.Error):
        raise
    except Exception as error:  # as of a name that is no host's
        raise OSError(f"{type(error).__name__}: {error}") from error


async def _cancellable(wait: Awaitable[T]) -> T:
    """`wait`, but a cancel that it swallows is raised all the same."""
    task = asyncio.current_task()
    assert task is not None
    num_cancels = task.cancelling()
    result = await wait
    if task.cancelling() > num_cancels:
        raise asyncio.CancelledError
    return result
