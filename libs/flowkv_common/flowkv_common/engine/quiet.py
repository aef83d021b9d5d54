"""`transformers` at a word: its tables and progress bars off, its errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without what `transformers` prints while it builds and loads a model."""
    verbosity, has_bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bar:
            transformers.logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error of somebody's code says, for a sentence of ours."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]
