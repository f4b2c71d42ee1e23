"""The installed libraries' versions that serving was tried with, and names that they may have or not.

uvicorn has no timeout for a request's head, so :mod:`slimtune.serve.connection` reaches into it;
:mod:`slimtune.serve.upstream` says what is reached into of Transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from slimtune.errors import UserError

__all__ = ["TRIED", "check_installed", "check_uvicorn", "lacks"]

TRIED = {"transformers": "5.17 to 5.24", "uvicorn": "0.41 to 0.54"}
"""By library, the versions that the tests passed with."""

_UVICORN = {
    "uvicorn.protocols.http.h11_impl": {
        "H11Protocol": "connection_made connection_lost data_received on_response_complete",
    },
    "uvicorn": {"Server": "startup on_tick shutdown handle_exit"},
}


def check_installed(verb: str, *libraries: str) -> None:
    """Look for the libraries that come with ``slimtune[serve]``.

    Raises:
        UserError: One of them isn't there.
    """
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise UserError(
            f"{verb} needs what isn't installed: {', '.join(missing)}",
            way_out="Install them: pip install 'slimtune[serve]'",
        )


def check_uvicorn() -> None:
    """Look for what is needed of uvicorn.

    Raises:
        UserError: The installed version doesn't have it.
    """
    if (missing := lacks("uvicorn", _UVICORN)) is not None:
        raise UserError(
            missing,
            rule=f"It was tried with {TRIED['uvicorn']}.",
            way_out="Install one of these: pip install 'uvicorn<=0.54'",
        )


def lacks(library: str, names: dict[str, dict[str, str]]) -> str | None:
    """The first of the names that a library doesn't have, in words; None if it has all.

    Args:
        library: Its distribution.
        names: By module and class, its attributes.
    """
    for module, classes in names.items():
        for name, attributes in classes.items():
            try:
                found = getattr(import_module(module), name)
            except (ImportError, AttributeError):
                return f"{library} {version(library)} has no {module}.{name}"
            for attribute in attributes.split():
                if not hasattr(found, attribute):
                    return f"{library} {version(library)} has no {name}.{attribute}"
    return None
