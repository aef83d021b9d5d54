"""Fixtures of tests on live nodes."""

from __future__ import annotations

import pytest
from drive import load_tiny
from tiny_models import make_tiny_model

from flowkv_engine.engine.model import LoadedModel


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny model, loaded once for all tests."""
    return load_tiny(make_tiny_model(tmp_path_factory.mktemp("model")))
