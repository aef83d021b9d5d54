"""What a node's command line refuses before anything is loaded."""

from __future__ import annotations

import pytest

from flowkv.node import main


def test_an_unknown_role_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["flowkv_decode", "decoder", "--model-path", "/m"])
    with pytest.raises(SystemExit, match="unknown role 'decoder': choose one of prefill, decode, mixed"):
        main("decode")
