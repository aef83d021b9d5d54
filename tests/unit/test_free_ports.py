"""Ports for processes that are about to start."""

from __future__ import annotations

import socket
from itertools import islice
from pathlib import Path

import pytest

from flowkv.local_cluster import free_ports

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not RANGE.exists(), reason="only Linux tells which ports its kernel gives")
def test_none_is_given_twice_or_is_one_that_the_kernel_gives_to_others() -> None:
    first, last = map(int, RANGE.read_text().split())
    ports = list(islice(free_ports(), 300))
    assert len(set(ports)) == 300
    assert not [port for port in ports if first <= port <= last]


def test_none_is_listened_on() -> None:
    port = next(free_ports())
    with socket.create_server(("127.0.0.1", port)):
        assert port not in free_ports()
    assert port in free_ports()
