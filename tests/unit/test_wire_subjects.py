"""Namespaces: what subjects, buckets and services of one are called."""

from __future__ import annotations

import pytest

from flowkv_common.wire import subjects
from flowkv_common.wire.subjects import in_namespace, service_in_namespace

NAMES = [
    subjects.SCHEDULE,
    subjects.LOAD_ALL,
    subjects.at(subjects.NODE_CAP, "d0"),
    subjects.event("*", ">"),
    subjects.NODES_BUCKET,
    subjects.LEADER_BUCKET,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_namespace_is_the_first_word_of_a_name(name: str) -> None:
    assert in_namespace(name, "flowkv") == name
    moved = in_namespace(name, "team-a")
    assert moved == "team-a" + name.removeprefix("flowkv")
    assert in_namespace(name, "team-b") != moved


@pytest.mark.parametrize("name", ["_INBOX.x.1", "$SRV.PING", "$JS.API.INFO", "flowkvx.v1", "flowkv"])
def test_what_belongs_to_no_namespace_keeps_its_name(name: str) -> None:
    assert in_namespace(name, "team-a") == name


@pytest.mark.parametrize("namespace", ["team-a", "flowkv_b", "flowkv-b"])
def test_a_full_name_of_a_subject_stays_one(namespace: str) -> None:
    """People copy it from what `flowkv nats sub` prints."""
    full = in_namespace(subjects.LOAD_ALL, namespace)
    assert in_namespace(full, namespace) == full


def test_services_of_another_namespace_have_it_before_their_names() -> None:
    assert service_in_namespace("gateway", "flowkv") == "gateway"
    assert service_in_namespace("gateway", "team-a") == "team-a-gateway"
