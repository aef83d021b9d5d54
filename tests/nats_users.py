"""A NATS server with users, any of whom it can come to refuse."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.nats_server import NatsServer


class Users(NamedTuple):
    """The server, and the password of each user as it has it."""

    server: NatsServer
    config: Path
    passwords: dict[str, str]

    def url(self, user: str) -> str:
        return self.server.url.replace("//", f"//{user}:{self.passwords[user]}@")

    def refuse(self, user: str) -> None:
        """It gets another password."""
        self.passwords[user] += "-another"
        self.write()
        self.server.reload()

    def write(self) -> None:
        users = [{"user": user, "password": word} for user, word in self.passwords.items()]
        self.config.write_text(json.dumps({"authorization": {"users": users}}))


@contextlib.contextmanager
def server_with_users(*names: str) -> Iterator[Users]:
    with tempfile.TemporaryDirectory(prefix="flowkv-users-") as folder:
        config = Path(folder) / "nats.conf"
        users = Users(NatsServer("-c", str(config)), config, dict.fromkeys(names, "secret"))
        users.write()
        with users.server:
            yield users
