"""How many cores a node keeps busy, as the files of the kernel say."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowkv_node.cores import busy_cores

V2 = {"proc/self/cgroup": "0::/pod/engine\n"}
V1 = {"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/abc\n0::/\n"}


def v2(folder: str, limit: str) -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}/cpu.max": f"{limit}\n"}


def v1(folder: str, quota_us: int) -> dict[str, str]:
    of_folder = f"sys/fs/cgroup/cpu/{folder}"
    return {f"{of_folder}/cpu.cfs_quota_us": f"{quota_us}\n", f"{of_folder}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "num_cores"),
    [
        pytest.param({}, 4.0, id="no cgroups"),
        pytest.param({**V2, **v2("pod/engine", "max 100000")}, 4.0, id="v2, no limit"),
        pytest.param({**V2, **v2("pod/engine", "40000 100000")}, 0.4, id="v2"),
        pytest.param({**V2, **v2("pod/engine", "600000 100000")}, 4.0, id="more than there are threads"),
        pytest.param(
            {**V2, **v2("pod/engine", "max 100000"), **v2("pod", "5000 10000")}, 0.5, id="v2, around it"
        ),
        pytest.param({**V2, **v2("other", "5000 10000")}, 4.0, id="of another"),
        pytest.param({**V1, **v1("docker/abc", -1)}, 4.0, id="v1, no limit"),
        pytest.param({**V1, **v1("docker/abc", 250000)}, 2.5, id="v1"),
        pytest.param({**V1, **v1("", 150000), **v1("docker/abc", 250000)}, 1.5, id="v1, around it"),
    ],
)
def test_cores_are_threads_but_for_a_containers_limit(
    tmp_path: Path, files: dict[str, str], num_cores: float
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert busy_cores(4, tmp_path) == num_cores


def test_a_node_on_a_gpu_keeps_none_busy(tmp_path: Path) -> None:
    assert busy_cores(0, tmp_path) == 0.0
