"""Documents on disk: token ids and supervised mask in flat files that are memory-mapped.

A store is a folder that is written once, then only read, so training's memory doesn't grow with the data:

========================  ==========  ==============================================
file                      dtype       holds
========================  ==========  ==============================================
``ids.bin``               int32       the ids of all documents, one after another
``supervised.bin``        bool        for each id, whether it is a target
``starts.bin``            int64       where each document begins; one more at the end
``places.bin``            int64 × 4   for each document: source, file, line or row, unit
``hashes.bin``            uint64      a hash of each document's ids
``files.json``            a list      the files' names, by their numbers in places
========================  ==========  ==============================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from slimtune.data.sources import Place
from slimtune.data.tokens import Ids

__all__ = ["DocumentStore", "DocumentWriter", "Documents", "Together"]

Mask = npt.NDArray[np.bool_]

_FILES = {"ids": np.int32, "supervised": np.bool_, "starts": np.int64, "places": np.int64, "hashes": np.uint64}
_UNITS = ("line", "row")
_PART = 2**20


class DocumentWriter:
    """Appends documents to a store's files; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in _FILES}
        self._folder = folder
        self._names: dict[str, int] = {}
        self._end = 0
        self._files["starts"].write(np.zeros(1, np.int64).tobytes())

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for file in self._files.values():
            file.close()
        (self._folder / "files.json").write_text(json.dumps(list(self._names)), encoding="utf-8")

    def add(self, ids: Ids, supervised: Mask, source: int, place: Place) -> None:
        """Append one document: ids int32 [tokens], supervised bool [tokens]."""
        raw = ids.tobytes()
        self._end += ids.shape[0]
        self._files["ids"].write(raw)
        self._files["supervised"].write(supervised.tobytes())
        self._files["starts"].write(np.int64(self._end).tobytes())
        file = self._names.setdefault(place.file, len(self._names))
        at = np.array([source, file, place.number, _UNITS.index(place.unit)], np.int64)
        self._files["places"].write(at.tobytes())
        self._files["hashes"].write(hashlib.blake2b(raw, digest_size=8).digest())


class DocumentStore:
    """All documents of a folder, memory-mapped.

    Args:
        folder: What a :class:`DocumentWriter` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: list[str] = json.loads((folder / "files.json").read_text(encoding="utf-8"))
        self.ids = _mapped(folder / "ids.bin", np.int32)
        self.supervised = _mapped(folder / "supervised.bin", np.bool_)
        self.starts = _mapped(folder / "starts.bin", np.int64)
        self.places = _mapped(folder / "places.bin", np.int64).reshape(-1, 4)
        self.hashes = _mapped(folder / "hashes.bin", np.uint64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def place(self, document: int) -> Place:
        """Where the row of a document stands."""
        file, number, unit = (int(value) for value in self.places[document][1:])
        return Place(self._names[file], number, _UNITS[unit])


class Documents:
    """The documents that one part of a run (training, evaluation) goes over: a store and the chosen numbers in it.

    A number may come twice (a source of weight 2). Lengths are in tokens.
    """

    rounds = 1
    """How often :attr:`rows` stand in it."""

    def __init__(self, store: DocumentStore, chosen: npt.NDArray[np.int64]) -> None:
        self.store, self.chosen = store, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def rows(self) -> Documents:
        """Those of the data itself, once."""
        return self

    @property
    def weights(self) -> npt.NDArray[np.float64] | None:
        """How much each counts, [documents]; None: all alike."""
        return None

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each document, int32 [documents]."""
        starts, made = self.store.starts, np.empty(len(self), np.int32)
        for part in _parts(len(self)):
            made[part] = starts[self.chosen[part] + 1] - starts[self.chosen[part]]
        return made

    def __getitem__(self, at: int) -> tuple[Ids, Mask]:
        """(ids int32 [tokens], supervised bool [tokens]) of a document; views into the mapped files."""
        document = int(self.chosen[at])
        start, end = int(self.store.starts[document]), int(self.store.starts[document + 1])
        return self.store.ids[start:end], self.store.supervised[start:end]

    def place(self, at: int) -> Place:
        """Where the row of a document stands: file and line."""
        return self.store.place(int(self.chosen[at]))

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are targets."""
        return int(self._supervised()[self.chosen].sum(dtype=np.int64))

    @property
    def targets(self) -> npt.NDArray[np.int32]:
        """Tokens of each document that a loss has a term for, int32 [documents]: nothing predicts its first."""
        first = self.store.supervised[self.store.starts[:-1]]
        made: npt.NDArray[np.int32] = (self._supervised() - first)[self.chosen]
        return made

    def _supervised(self) -> npt.NDArray[np.int32]:
        """Supervised tokens of each document of the store."""
        starts, totals = self.store.starts, np.zeros(len(self.store), np.int32)
        for part in _parts(len(self.store)):
            begins, end = starts[part], starts[part.stop]
            totals[part] = np.add.reduceat(self.store.supervised[begins[0] : end], begins - begins[0], dtype=np.int32)
        return totals


class Together(Documents):
    """The data's documents so many times, and behind them those of another store once.

    Args:
        rows: The data's.
        others: What is learnt beside them.
        rounds: How often the rows stand in it.
        weight: How much one of the others counts, where a row counts 1.
    """

    def __init__(self, rows: Documents, others: Documents, rounds: int, weight: float) -> None:
        super().__init__(rows.store, rows.chosen)
        self._rows, self._others, self.rounds = rows, others, rounds
        self._weights = np.repeat([1.0, weight], [rounds * len(rows), len(others)])

    def __len__(self) -> int:
        return self.rounds * len(self._rows) + len(self._others)

    @property
    def rows(self) -> Documents:  # noqa: D102 - the base says it
        return self._rows

    @property
    def weights(self) -> npt.NDArray[np.float64]:  # noqa: D102 - the base says it
        return self._weights

    @property
    def lengths(self) -> npt.NDArray[np.int32]:  # noqa: D102 - the base says it
        return np.concatenate([np.tile(self._rows.lengths, self.rounds), self._others.lengths])

    def __getitem__(self, at: int) -> tuple[Ids, Mask]:
        part, at = self._part(at)
        return part[at]

    def place(self, at: int) -> Place:  # noqa: D102 - the base says it
        part, at = self._part(at)
        return part.place(at)

    @property
    def supervised_tokens(self) -> int:  # noqa: D102 - the base says it
        return self.rounds * self._rows.supervised_tokens + self._others.supervised_tokens

    @property
    def targets(self) -> npt.NDArray[np.int32]:  # noqa: D102 - the base says it
        return np.concatenate([np.tile(self._rows.targets, self.rounds), self._others.targets])

    def _part(self, at: int) -> tuple[Documents, int]:
        """Where a document stands: in which of the two, and its number there."""
        behind = at - self.rounds * len(self._rows)
        return (self._others, behind) if behind >= 0 else (self._rows, at % len(self._rows))


def _parts(documents: int) -> Iterator[slice]:
    """Documents to look at together, so that what is made of millions of them on the way stays small."""
    return (slice(at, min(at + _PART, documents)) for at in range(0, documents, _PART))


def _mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
