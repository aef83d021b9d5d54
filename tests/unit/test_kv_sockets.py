"""Where nodes listen is one thing, how peers reach them another."""

from __future__ import annotations

import contextlib
from pathlib import Path

from local_cluster import free_port

from flowkv_common.kv.connectors.sockets import Place, bind_tcp, bind_unix


async def test_a_wildcard_is_bound_and_a_name_is_told() -> None:
    port = free_port()
    listener, address = await bind_tcp(Place(host="0.0.0.0", port=port, reached_at="node-7"))
    with listener:
        assert address == f"node-7:{port}"
        assert listener.getsockname() == ("0.0.0.0", port)


def test_unix_sockets_lie_in_the_shared_folder_and_only_their_user_may_enter(tmp_path: Path) -> None:
    with contextlib.ExitStack() as lifetime:
        listener, address = bind_unix(Place(socket_dir=str(tmp_path)), lifetime)
        with listener:
            folder = Path(address).parent
            assert folder.parent == tmp_path
            assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
