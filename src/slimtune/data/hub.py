"""Rows of a data set on the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from slimtune.data.rows import Row
from slimtune.errors import UserError

__all__ = ["hub_fingerprint", "hub_rows"]

_BATCH = 1000
_RULE = "A hub id is owner/name or owner/name:split; a local file needs an existing path."


def hub_rows(name: str) -> Iterator[Row]:
    """The rows of ``owner/name`` or ``owner/name:split``; the split is ``train`` unless named.

    The rows are memory-mapped by ``datasets``, so memory doesn't grow with their number. No code of the data set runs.

    Raises:
        UserError: There is no such data set or split, or the hub can't be reached and the cache doesn't hold it.
    """
    from slimtune.data.tables import table_rows

    yield from table_rows(_load(name).with_format("arrow").iter(_BATCH), name)


def _load(name: str) -> Any:
    import datasets

    repo, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repo, split=split or "train")
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"the hub has no data {repo!r}, or shows it only to those who may see it",
            rule=_RULE,
            way_out="Check the id; where access is needed, give it by HF_TOKEN.",
        ) from None
    except Exception as error:  # noqa: BLE001 - datasets, the hub's client and fsspec raise dozens of types here
        if isinstance(error, ConnectionError) and str(error).startswith("Couldn't reach"):
            raise UserError(
                f"hub data {repo!r} isn't in the cache on this machine, and the hub wasn't reached",
                rule=_RULE,
                way_out="Check the id and the network; or download the file and give its path.",
            ) from None
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"hub data {name!r} can't be loaded: {first}",
            rule=_RULE,
            way_out="Check the id, the split and the network; or download the file and give its path.",
        ) from None


def hub_fingerprint(name: str) -> str:
    """What tells one state of a hub data set from another: the fingerprint that ``datasets`` gives it."""
    return str(_load(name)._fingerprint)
