"""One composed system for all tests here. Without an engine they fail: nothing passes that has not run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.composed import Composed, docker


@pytest.fixture(scope="session")
def images() -> None:
    """Both images, built from the working tree."""
    docker("info")
    Composed("flowkv-test").compose("build", "--quiet")


@pytest.fixture(scope="session")
def composed(images: None) -> Iterator[Composed]:
    """One project for all tests; each brings it to the scale that it needs."""
    with Composed("flowkv-test") as composed:
        composed.up()
        yield composed
