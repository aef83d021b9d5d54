"""This host: processes that are stopped, clocks, disks, memory, limits, the model's files, GPUs."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import resource
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from flowkv.doctor import Finding, bad, good, look
from flowkv_common.config import listed
from flowkv_common.errors import CannotStart
from flowkv_common.fingerprint import weight_files

HTTP_TIMEOUT_S = 2.0
# Dates in HTTP are whole seconds, and an answer of a busy host may take some more.
MAX_CLOCK_DIFFERENCE_S = 10.0
# Logs and compiled kernels need little; a model to be converted needs its size again.
MIN_FREE_BYTES = 1 << 30
MIN_FREE_SHARE = 0.02
# Of a node of the default model (docs/operations.md#size).
NODE_BYTES = 3 << 29
# A gateway has one per client, and a node some per peer.
MIN_DESCRIPTORS = 4096
GGUF_MAGIC = b"GGUF"


def check_host(
    model: str, cache: Path, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage
) -> Iterator[Finding]:
    """`model`: a folder or a file, or several with commas between; empty for none.

    `usage`: total, used and free bytes of a path's disk.
    """
    yield from check_stopped(Path("/proc"))
    yield from check_disks([cache, Path.cwd(), Path(tempfile.gettempdir())], usage)
    yield from check_memory(Path("/proc/meminfo"))
    yield from check_limits()
    for one in listed(model):
        yield from check_model(Path(one).expanduser())
    yield from check_gpu()


def check_stopped(proc: Path) -> Iterator[Finding]:
    """Processes of FlowKV that were stopped (SIGSTOP, Ctrl-Z): they keep their memory and do nothing."""
    for status in proc.glob("[0-9]*/status"):
        try:
            is_stopped = "\nState:\tT" in status.read_text()
            command = status.with_name("cmdline").read_bytes().split(b"\0") if is_stopped else []
        except OSError:
            continue  # it has ended
        words = [word.decode(errors="replace") for word in command]
        if any(word == "flowkv" or word.startswith("flowkv_") or word.endswith("/flowkv") for word in words):
            pid = status.parent.name
            yield bad(
                "processes", f"{pid} is stopped: {' '.join(words[1:6])}", f"let it go on: `kill -CONT {pid}`"
            )


def check_disks(paths: Sequence[Path], usage: Callable[[Path], tuple[int, int, int]]) -> Iterator[Finding]:
    seen = set()
    for path in paths:
        path = next(each for each in (path, *path.parents) if each.exists())
        total, _, free = usage(path)
        if (device := path.stat().st_dev) in seen:
            continue
        seen.add(device)
        if free < min(MIN_FREE_BYTES, MIN_FREE_SHARE * total):
            said = f"that of {path} is full: {free >> 20} of {total >> 20} MiB are free"
            mend = (
                "free some, or put things elsewhere: models with FLOWKV_CACHE, sockets with FLOWKV_SOCKET_DIR"
            )
            yield bad("disks", said, mend)
        else:
            yield good("disks", f"{path}: {free >> 20} MiB are free")


def check_memory(meminfo: Path) -> Iterator[Finding]:
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    if "MemAvailable" not in fields:
        return
    available = int(fields["MemAvailable"].split()[0]) << 10
    said = f"{available >> 20} MiB are available"
    if available < NODE_BYTES:
        yield look(
            "memory", said, "a node of the default model takes 1536 MiB: set FLOWKV_KV_CACHE_BYTES lower"
        )
    else:
        yield good("memory", said)


def check_limits() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MIN_DESCRIPTORS:  # -1 is no limit
        said = f"a process may open {soft} files and connections"
        yield look("limits", said, f"before you start a gateway: `ulimit -n {MIN_DESCRIPTORS}`")


# --- clocks ------------------------------------------------------------------------------------------


def check_clocks(urls: Mapping[str, str], others: Mapping[str, float]) -> Iterator[Finding]:
    """`urls`: of services that answer HTTP, by name; `others`: clocks, in seconds ahead of ours.

    FlowKV itself sends durations only. Certificates, logs and metrics need clocks that agree.
    """
    ahead = dict(others)
    for name, url in urls.items():
        if (difference := seconds_ahead(url)) is not None:
            ahead[name] = difference
    wrong = {name: seconds for name, seconds in ahead.items() if abs(seconds) > MAX_CLOCK_DIFFERENCE_S}
    for name, seconds in wrong.items():
        said = f"that of {name} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} ours"
        yield bad("clocks", said, "set both by NTP (`timedatectl set-ntp true`): TLS and logs need it")
    if ahead and not wrong:
        yield good("clocks", f"{len(ahead)} were asked, and agree with ours")


def seconds_ahead(url: str) -> float | None:
    """By the `Date` of its answer; None if it can't be reached from here."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=HTTP_TIMEOUT_S)
    try:
        connection.request("GET", "/health/live")
        date = connection.getresponse().headers["date"]
        return parsedate_to_datetime(date).timestamp() - time.time() if date else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def seconds_ahead_of(stamp: str) -> float:
    """Of a time as NATS writes it, with nanoseconds."""
    return datetime.fromisoformat(f"{stamp[:19]}+00:00").timestamp() - time.time()


# --- the model ---------------------------------------------------------------------------------------


def check_model(path: Path) -> Iterator[Finding]:
    """Whether all its files are there, whole and readable; weights are not read."""
    mend = "fetch it again: remove the folder, then `flowkv up --model` with its hub id"
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(4) == GGUF_MAGIC
        if is_gguf:
            yield good("model", f"{path} is a GGUF file")
        else:
            yield bad("model", f"{path} is no GGUF file", "give a folder, or a file in GGUF")
        return
    if not path.is_dir():
        yield bad("model", f"there is no {path}", "give the folder that has config.json in it")
        return
    broken = list(_broken_files(path))
    for said in broken:
        yield bad("model", said, mend)
    if not broken:
        yield good("model", f"{path} is whole")


def _broken_files(folder: Path) -> Iterator[str]:
    for name in ("config.json", "tokenizer.json"):
        try:
            json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            yield f"{folder} has no {name}"
        except (OSError, ValueError) as error:
            yield f"{folder / name} can't be read: {error}"
    try:
        files = weight_files(folder)
    except CannotStart as error:
        yield str(error)
        return
    if not files:
        yield f"{folder} has no weights"
    for file in files:
        if not file.is_file():
            yield f"{file} is missing, which the index of weights names"
        elif file.suffix == ".safetensors" and (said := _broken_safetensors(file)):
            yield f"{file} {said}"


def _broken_safetensors(file: Path) -> str:
    """What is wrong with it, empty if nothing is. The header says where the last tensor ends."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            return f"is cut off: it has {size} bytes"
        (num_header,) = struct.unpack("<Q", start)
        if num_header > size:
            return "is cut off, or no file of safetensors"
        try:
            header = json.loads(opened.read(num_header))
            end = max(
                (each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"),
                default=0,
            )
        except (ValueError, LookupError, TypeError) as error:
            return f"has a broken header: {error}"
    whole = 8 + num_header + int(end)
    return "" if size == whole else f"is cut off: it has {size} bytes of {whole}"


# --- GPUs --------------------------------------------------------------------------------------------


def check_gpu() -> Iterator[Finding]:
    if (tool := shutil.which("nvidia-smi")) is None:
        yield good("GPU", "none here: nodes run on CPUs, and KV moves by shm or tcp")
        return
    try:
        query = [tool, "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield bad(
            "GPU", f"nvidia-smi fails: {error}", "mend the driver; in a container start it with `--gpus all`"
        )
        return
    for line in done.stdout.strip().splitlines():
        yield good("GPU", line)
    if importlib.util.find_spec("cupy") is None:
        mend = "pip install 'flowkv[gpu]' (`gpu12` for torch builds of CUDA 12)"
        yield look("GPU", "cupy is missing: no KV by cuda_ipc or nccl", mend)
    elif importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nccl") is None:
        yield look(
            "GPU",
            "no NCCL of torch's was found: between hosts KV goes by tcp",
            "install a CUDA build of torch",
        )


def describe_host() -> dict[str, str]:
    """What a bug report needs of the machine and of our variables, without secrets."""
    import platform

    from flowkv_common import __version__

    variables = {
        name: _without_secrets(value) for name, value in os.environ.items() if name.startswith("FLOWKV_")
    }
    return {
        "flowkv": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(os.cpu_count()),
        **variables,
    }


def _without_secrets(value: str) -> str:
    """URLs without their users and passwords."""
    return ",".join(
        f"{one.partition('//')[0]}//{one.rpartition('@')[2]}" if "//" in one and "@" in one else one
        for one in value.split(",")
    )
