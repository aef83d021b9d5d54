"""A KV cache that would get the process killed is refused before its memory is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkv_common.config import NodeSettings
from flowkv_common.wire.messages import PoolLayout
from flowkv_node import memory
from flowkv_node.memory import Free, NoRoomForPool, free_memory, make_pool

MIB = 1 << 20
LAYOUT = PoolLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=8, dtype="float32")
NO_LIMIT_V1 = str(2**63 - 4096)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def host(mib: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {mib * 1024} kB\n"}


def v2(folder: str, limit: int | str, usage: int, droppable: int = 0) -> dict[str, str]:
    """In MiB."""
    limit = limit * MIB if isinstance(limit, int) else limit
    counts = f"anon 5\nactive_file {droppable * MIB}\ninactive_file {droppable * MIB}\nshmem 7\n"
    return {
        f"sys/fs/cgroup/{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{folder}/memory.current": f"{usage * MIB}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": counts,
    }


def v1(folder: str, limit: int | str, usage: int, droppable: int = 0) -> dict[str, str]:
    """In MiB."""
    limit = limit * MIB if isinstance(limit, int) else limit
    counts = f"active_file 0\ntotal_active_file {droppable * MIB}\ntotal_inactive_file {droppable * MIB}\n"
    return {
        f"sys/fs/cgroup/memory/{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"sys/fs/cgroup/memory/{folder}/memory.usage_in_bytes": f"{usage * MIB}\n",
        f"sys/fs/cgroup/memory/{folder}/memory.stat": counts,
    }


OWN_V2 = {"proc/self/cgroup": "0::/pod/engine\n"}
OWN_V1 = {"proc/self/cgroup": "5:devices:/\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "free_mib", "limit"),
    [
        pytest.param(host(100), 100, "the host's memory", id="no cgroups"),
        pytest.param({**host(900), **OWN_V2, **v2("pod/engine", 300, 50)}, 250, "cgroup/pod/engine", id="v2"),
        pytest.param(
            {**host(900), **OWN_V2, **v2("pod/engine", 300, 250, droppable=40)},
            130,
            "cgroup/pod/engine",
            id="v2, file pages can be dropped",
        ),
        pytest.param(
            {**host(900), **OWN_V2, **v2("pod/engine", "max", 50), **v2("pod", 200, 150)},
            50,
            "cgroup/pod",
            id="v2, limited from outside",
        ),
        pytest.param(
            {**host(900), "proc/self/cgroup": "0::/\n", **v2(".", 300, 50)},
            250,
            "sys/fs/cgroup",
            id="v2, in a container",
        ),
        pytest.param(
            {**host(100), **OWN_V2, **v2("pod/engine", 300, 50)}, 100, "the host's memory", id="host is less"
        ),
        pytest.param(
            {**host(900), **OWN_V1, **v1("docker/abc", 300, 90, droppable=20), **v1(".", NO_LIMIT_V1, 500)},
            250,
            "memory/docker/abc",
            id="v1",
        ),
        pytest.param(
            {**host(900), **OWN_V1, **v1(".", 300, 90)},
            210,
            "cgroup/memory",
            id="v1, in a container",
        ),
    ],
)
def test_what_is_free_is_the_least_of_all_limits(
    tmp_path: Path, files: dict[str, str], free_mib: int, limit: str
) -> None:
    found = free_memory(write(tmp_path, files))
    assert found is not None
    assert found.num_bytes == free_mib * MIB
    assert found.limit.endswith(limit)


def test_a_system_that_tells_nothing_limits_nothing(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert free_memory(write(tmp_path, {"proc/self/cgroup": "0::/x\n"})) is None


def test_this_system_tells_it() -> None:
    found = free_memory()
    assert found is not None
    assert 0 < found.num_bytes < 1 << 50


@given(free=st.integers(-MIB, MIB), num_blocks=st.integers(1, 64))
def test_a_pool_is_made_only_where_all_of_it_fits(free: int, num_blocks: int) -> None:
    settings = NodeSettings(model_path="m", kv_cache_bytes=num_blocks * LAYOUT.block_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda: Free(free, "a limit"))
        if num_blocks * LAYOUT.block_bytes <= free:
            with make_pool(settings, LAYOUT, torch.device("cpu")) as pool:
                assert pool.num_blocks == num_blocks
        else:
            with pytest.raises(NoRoomForPool, match="left of a limit: set FLOWKV_KV_CACHE_BYTES"):
                make_pool(settings, LAYOUT, torch.device("cpu"))
