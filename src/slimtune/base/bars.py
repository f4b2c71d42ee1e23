"""Upstream's progress bars, kept off the screen."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

__all__ = ["without_bars"]


@contextmanager
def without_bars() -> Iterator[None]:
    """While the body runs, Transformers shows no bar; its reader of GGUF has one of its own, which no switch turns off
    (``modeling_gguf_pytorch_utils.py``, 5.17 to 5.23)."""
    from transformers.utils import logging

    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar, shown = reader.tqdm, logging.is_progress_bar_enabled()
    reader.tqdm = partial(bar, disable=True)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
