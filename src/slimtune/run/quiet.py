"""Upstream's words go to the run's log, not to the screen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["upstream_to_log"]


@contextmanager
def upstream_to_log(file: Path | None) -> Iterator[None]:
    """Send all Python logging and warnings to ``file`` (or nowhere) and hide upstream's progress bars.

    Everything is put back at the end, so a program that uses slimtune as a library keeps its own logging.
    """
    # Imported here, as they take a second to load and `slimtune --help` needs neither.
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging as transformers_logging

    handler: logging.Handler = logging.NullHandler() if file is None else logging.FileHandler(file, encoding="utf-8")
    # On a full disk the log has gaps; logging's own way is a traceback on the screen for every line.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    named = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    saved = [(logger, logger.handlers[:], logger.propagate) for logger in [root, *named]]
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        for logger in named:
            if logger.handlers:
                logger.handlers, logger.propagate = [], True
        root.handlers = [handler]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        datasets_logging.disable_progress_bar()
        try:
            yield
        finally:
            for logger, handlers, propagate in saved:
                logger.handlers, logger.propagate = handlers, propagate
            logging.captureWarnings(False)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
            datasets_logging.enable_progress_bar()
            handler.close()
