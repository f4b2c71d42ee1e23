"""Importing torch and the libraries on it, faster and silently."""

from __future__ import annotations

import atexit
import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

__all__ = ["fast_imports"]


@contextmanager
def fast_imports() -> Iterator[None]:
    """The garbage collector rests meanwhile, and until the program's end it leaves alone what was imported.

    Imports make about a million objects, all of them lasting; to walk them again and again takes a fifth of the time.
    What libraries have to say while they are imported (bitsandbytes, on some CPUs, that it lacks a kernel which it
    can't fetch here) is no person's business.
    """
    before = logging.root.manager.disable
    shown: AbstractContextManager[None] = nullcontext()
    if sys.stderr.isatty():
        from slimtune.cli.bar import busy  # loads rich, which few mistakes need

        shown = busy("starting")
    gc.disable()
    logging.disable(logging.WARNING)
    try:
        with shown:
            yield
    finally:
        logging.disable(before)
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # for the libraries that count what is left at the end
