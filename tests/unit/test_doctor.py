"""`flowkv doctor` finds what is planted, on the bus that is heard and on this host, and how to mend it."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowkv.doctor import Finding
from flowkv.doctor.bus import check_rights
from flowkv.doctor.cluster import check_links, check_nodes, check_services
from flowkv.doctor.host import check_clocks, check_disks, check_model, check_stopped, describe_host
from flowkv.status import links
from flowkv_common.cluster_view import ClusterView, ServiceInfo
from flowkv_common.wire.limits import MAX_PAYLOAD_BYTES, payload_for
from flowkv_common.wire.nodes import NodeDescriptor
from tests.described_nodes import BLOCK_SIZE, MODEL, descriptor, report


def view_of(*nodes: NodeDescriptor, silent: str = "", **changes: Any) -> ClusterView:
    """Of nodes that have just reported, but for the one that is silent."""
    view = ClusterView()
    view.on_nodes({node.node.node_id: node for node in nodes})
    for node in nodes:
        if node.node.node_id != silent:
            view.on_report(report(node.node.node_id, node.role, **changes))
    return view


P0, D0 = descriptor("p0", "prefill"), descriptor("d0", "decode")


def wrong(findings: Iterable[Finding]) -> list[Finding]:
    """What is not good; each must say what to do."""
    found = [one for one in findings if one.level != "good"]
    assert all(one.mend for one in found)
    return found


def test_nothing_is_wrong_with_a_cluster_that_works() -> None:
    view = view_of(P0, D0, num_links=1, usual_connector="shm")
    view.on_service(ServiceInfo("scheduler", "s", "1.0.0", {"state": "leader"}))
    view.on_service(ServiceInfo("gateway", "g", "1.0.0", {"fingerprint": MODEL.fingerprint}))
    assert wrong([*check_services(view), *check_nodes(view, MAX_PAYLOAD_BYTES), *check_links(view)]) == []


def test_two_layouts() -> None:
    view = view_of(P0, descriptor("d0", "decode", block_size=2 * BLOCK_SIZE))
    apart, no_pair = wrong(check_nodes(view, MAX_PAYLOAD_BYTES))
    assert apart.level == "bad"
    assert f"block size {BLOCK_SIZE}" in apart.said
    assert "FLOWKV_BLOCK_SIZE" in apart.mend
    assert no_pair.said == "no two nodes fit together"


@pytest.mark.parametrize(("node", "missing"), [(P0, "decode"), (D0, "prefill")])
def test_no_pair(node: NodeDescriptor, missing: str) -> None:
    [found] = wrong(check_nodes(view_of(node), MAX_PAYLOAD_BYTES))
    assert f"no node serves {missing}" in found.said
    assert f"`flowkv {missing}`" in found.mend


def test_a_frozen_node() -> None:
    [frozen, _] = wrong(check_nodes(view_of(P0, D0, silent="d0"), MAX_PAYLOAD_BYTES))
    assert frozen.level == "bad"
    assert frozen.said.startswith("d0 (decode) is in the registry but says nothing")
    assert "kill -CONT 1`" in frozen.mend


@pytest.mark.parametrize(
    ("num_host_cores", "num_cores", "other_boot_id", "is_told"),
    [
        (3, 2.0, "1", True),
        (4, 2.0, "1", False),
        (1, 0.5, "1", False),  # a container's limit keeps them apart
        (3, 2.0, "2", False),
        (3, 2.0, "", False),
        (1, 0.0, "1", False),  # on GPUs
    ],
)
def test_nodes_that_share_cores(
    num_host_cores: int, num_cores: float, other_boot_id: str, is_told: bool
) -> None:
    p0, d0 = (
        msgspec.structs.replace(one, boot_id=boot_id, num_cores=num_cores, num_host_cores=num_host_cores)
        for one, boot_id in ((P0, "1"), (D0, other_boot_id))
    )
    found = wrong(check_nodes(view_of(p0, d0), MAX_PAYLOAD_BYTES))
    said = "p0, d0 compute on 4 cores of a host that has 3: they share them"
    assert [one.said for one in found] == [said] * is_told
    assert all("FLOWKV_NUM_THREADS" in one.mend for one in found)


def test_a_payload_that_cuts_windows() -> None:
    window = 4 * BLOCK_SIZE
    cut = msgspec.structs.replace(MODEL, max_model_len=window)
    view = view_of(descriptor("p0", "prefill", model=cut), descriptor("d0", "decode", model=cut))
    [found] = wrong(check_nodes(view, payload_for(window, BLOCK_SIZE)))
    assert f"to {window} tokens" in found.said
    assert "max_payload" in found.mend


def test_a_volume_for_sockets_that_is_missing() -> None:
    view = view_of(P0, D0, num_links=1, usual_connector="tcp")
    reason = "to d0 by tcp, not by shm: shm to /sockets/x: [Errno 2] No such file or directory"
    view.on_service(ServiceInfo("node", "p0", "1.0.0", {"state": "ready", "slower_links": reason}))
    told, seen = wrong(check_links(view))
    assert "No such file" in told.said
    # By its report alone.
    assert seen.said == "1 links (d0 to p0) are by tcp, though both sides have shm"
    assert {"FLOWKV_SOCKET_DIR" in one.mend for one in (told, seen)} == {True}


def test_between_two_hosts_tcp_is_right() -> None:
    """Whether two nodes are on one host is said by their kernels, not by the names that containers have."""
    both = ["shm", "tcp"]
    p0 = msgspec.structs.replace(P0, connectors=both, boot_id="1")
    reason = "to d0 by tcp, not by shm: shm to /sockets/x: [Errno 2] No such file or directory"
    for boot_id, num_wrong in (("1", 2), ("2", 0), ("", 2)):  # an older node does not tell
        d0 = msgspec.structs.replace(D0, connectors=both, boot_id=boot_id)
        view = view_of(p0, d0, num_links=1, usual_connector="tcp")
        view.on_service(ServiceInfo("node", "p0", "1.0.0", {"state": "ready", "slower_links": reason}))
        assert len(wrong(check_links(view))) == num_wrong
        if boot_id == "2":
            [found] = check_links(view)
            assert found.said == "2 links (p0 to d0, d0 to p0) are by tcp, the best between two hosts"
            assert not any("slower" in line for line in links(view.nodes()))


def test_links_that_encrypt_are_told_apart() -> None:
    """Those by shared memory have nothing to encrypt."""
    nodes = [msgspec.structs.replace(one, connectors=["shm", "tcp"], has_data_tls=True) for one in (P0, D0)]
    for connector, told in (("tcp", "tcp with TLS, though both sides have shm"), ("shm", "shm, the best")):
        [found] = check_links(view_of(*nodes, num_links=1, usual_connector=connector))
        assert f"are by {told}" in found.said


def test_many_links_are_one_line() -> None:
    nodes = [P0, *(descriptor(f"d{number}", "decode") for number in range(64))]
    slow = wrong(check_links(view_of(*nodes, num_links=64, usual_connector="tcp")))
    assert [one.said[:10] for one in slow] == ["4160 links"]


def test_a_gateway_that_does_not_serve_a_model_of_the_nodes() -> None:
    other = descriptor("o0", "prefill", model=msgspec.structs.replace(MODEL, name="n", fingerprint="g"))
    view = view_of(P0, other)
    for fingerprints, told in (
        ("another", ["g does not serve m, n, which nodes have"]),
        ("f", ["g does not serve n, which nodes have"]),
        ("f, g", []),
    ):
        view.on_service(ServiceInfo("gateway", "g", "1.0.0", {"fingerprint": fingerprints}))
        assert [one.said for one in wrong(check_services(view)) if one.about == "gateway"] == told


def test_a_user_without_rights() -> None:
    [found] = wrong(check_rights("scheduler", "nats: Permissions Violation for Subscription to $SRV.INFO"))
    assert "scheduler may not hear" in found.said
    assert wrong(check_rights("operator", None)) == []


# --- this host ---------------------------------------------------------------------------------------


def test_a_process_that_is_stopped() -> None:
    process = subprocess.Popen(["flowkv", "60"], executable="/bin/sleep")
    try:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert f"`kill -CONT {process.pid}`" in " ".join(one.mend for one in check_stopped(Path("/proc")))
        process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, process.pid, os.WCONTINUED)
        assert str(process.pid) not in " ".join(one.mend for one in check_stopped(Path("/proc")))
    finally:
        process.kill()
        process.wait(10)


def test_a_full_disk(tmp_path: Path) -> None:
    size = 100 << 30
    [found] = wrong(check_disks([tmp_path / "not" / "yet", tmp_path], lambda _: (size, size, 9 << 20)))
    assert "9 of 102400 MiB are free" in found.said
    assert "FLOWKV_CACHE" in found.mend
    assert wrong(check_disks([tmp_path], lambda _: (size, 0, size))) == []


@contextlib.contextmanager
def dated(ahead_s: float) -> Iterator[str]:
    """The URL of a service whose clock is ahead of ours."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + ahead_s)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/metrics"
        finally:
            server.shutdown()


def test_a_clock_that_is_a_day_off() -> None:
    with dated(0.0) as right, dated(86400.0) as ahead:
        [found] = wrong(check_clocks({"p0": right, "d0": ahead}, {}))
        assert wrong(check_clocks({"p0": right}, {"NATS": 2.0})) == []
    assert found.said.startswith("that of d0 is 86")
    assert "ahead of ours" in found.said
    assert "NTP" in found.mend
    [behind] = wrong(check_clocks({}, {"the NATS server": -86400.0}))
    assert behind.said == "that of the NATS server is 86400 s behind ours"


def write_model(folder: Path) -> Path:
    """The files of a model, whole: one tensor of 8 bytes."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return folder


def test_a_model_that_is_whole(tmp_path: Path) -> None:
    assert wrong(check_model(write_model(tmp_path / "m"))) == []


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors", b"1234", "is cut off: it has 4 bytes"),
        ("model.safetensors", struct.pack("<Q", 1 << 40) + b"{}", "is cut off, or no file of safetensors"),
        ("model.safetensors", struct.pack("<Q", 2) + b"{]", "has a broken header"),
        ("config.json", b"{", "can't be read"),
        ("tokenizer.json", None, "has no tokenizer.json"),
    ],
)
def test_a_model_that_is_broken(tmp_path: Path, file: str, content: bytes | None, said: str) -> None:
    path = write_model(tmp_path / "m") / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    [found] = wrong(check_model(path.parent))
    assert said in found.said
    assert "fetch it again" in found.mend


def test_a_model_whose_last_bytes_or_shards_are_missing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert f"it has {len(whole) - 1} bytes of {len(whole)}" in wrong(check_model(folder))[0].said
    weights.unlink()
    index = {"weight_map": {"w": "one.safetensors", "v": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "one.safetensors").write_bytes(whole)
    [missing] = wrong(check_model(folder))
    assert "two.safetensors is missing" in missing.said
    assert "there is no" in wrong(check_model(tmp_path / "nothing"))[0].said


def test_a_report_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWKV_NATS_URL", "nats://me:secret@a:1,nats://b:2")
    host = describe_host()
    assert host["FLOWKV_NATS_URL"] == "nats://a:1,nats://b:2"
    assert "secret" not in json.dumps(host)
