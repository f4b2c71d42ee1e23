"""Checkpoints: everything a run needs to go on bit by bit, in safetensors and JSON, never a pickle.

=============================  =======================================================================================
``adapter_model.safetensors``  the adapter, as PEFT writes it; with ``adapter_config.json`` a checkpoint loads as one
``optimizer.safetensors``      the optimizer's tensors
``random.safetensors``         the random generators (:mod:`slimtune.training.rng`)
``state.json``                 what of optimizer, schedule, guards and logs is no tensor, and the data's position
``trainer_state.json``         the Trainer's own state
``identity.json``              what must be the same to go on (:mod:`slimtune.run.identity`)
``SHA256SUMS``                 the manifest (:mod:`slimtune.run.durable`)
=============================  =======================================================================================

The training thread only starts the copies off the device (:class:`OffDevice`); a thread behind it waits for them,
looks for values that are no numbers, serialises, writes, syncs, reads back and prunes. A save that fails is told and
tried again; the older checkpoints stay.
"""

from __future__ import annotations

import errno
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from slimtune.ranks.group import Ranks
from slimtune.run.durable import (
    DamagedError,
    atomic_folder,
    discard,
    free_bytes,
    listed,
    remove_leftovers,
    verify,
    write_file,
)
from slimtune.run.screen import size_text

__all__ = ["Checkpoints", "OffDevice", "Snapshot", "from_plain", "read_checkpoint", "share_newest", "to_plain"]

STATE = "state.json"
TRAINER_STATE = "trainer_state.json"
IDENTITY = "identity.json"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_SLACK = 1 << 20
"""Bytes of room to leave beyond a checkpoint's own: folders, journals, the run's other files."""


class OffDevice:
    """The bytes of some tensors on their way to the CPU, as they are now.

    Whole storages are copied: hundreds of views of one flat tensor are one copy, and naming the flat tensor is enough
    to have them all. Copies off a GPU aren't waited for; what it is given to do afterwards, it does after them.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._copies: dict[int, Tensor] = {}
        on_gpu = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._copies:
                continue
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._copies[storage.data_ptr()] = _room_for(source).copy_(source, non_blocking=True)
            on_gpu |= source.is_cuda
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tensors in the copied storages held, contiguous; waits until all copies have come.

        Raises:
            KeyError: A tensor's storage wasn't copied.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return {name: self._view(tensor).contiguous() for name, tensor in tensors.items()}

    def _view(self, tensor: Tensor) -> Tensor:
        copy = self._copies[tensor.untyped_storage().data_ptr()].untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())


def _room_for(source: Tensor) -> Tensor:
    """Bytes on the CPU for a copy: pinned, so that nobody waits for it, if the system gives so many."""
    if source.is_cuda:
        with suppress(RuntimeError):
            return torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
    return torch.empty(source.shape, dtype=torch.uint8)


@dataclass
class Snapshot:
    """One moment of a run, copied off the device.

    ``tensors`` maps a file's stem (adapter_model, optimizer, random) to its tensors; ``texts`` maps a file's name to
    its bytes.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    texts: dict[str, bytes] = field(default_factory=dict)

    def nonfinite(self) -> str | None:
        """The name of a tensor that holds a NaN or an infinity, or None if none does."""
        return next((name for named in self.tensors.values() for name in nonfinite(named)), None)

    def files(self) -> dict[str, bytes]:
        """The files' names and contents."""
        made = {f"{stem}.safetensors": save(named, {"format": "pt"}) for stem, named in self.tensors.items()}
        return {**made, **self.texts}


@dataclass(frozen=True)
class SaveFailure:
    """A save that didn't come off."""

    step: int
    error: OSError


@dataclass(frozen=True)
class Refusal:
    """A save that would have written a value that is no number."""

    step: int
    name: str
    """The tensor's."""


class Checkpoints:
    """The checkpoints of one run, written by a thread behind the training.

    Args:
        folder: Holds the ``checkpoint-<step>`` folders.
        keep: Whole checkpoints to keep, at least two; the one at :attr:`best_step` is kept beside them.
        tell: Called with one line for the person when a checkpoint is found damaged.
        beat: Called with ``"a save"`` whenever a save makes progress.
        rest: Called with ``"a save"`` when a save is over.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        *,
        tell: Callable[[str], None] = lambda line: None,
        beat: Callable[[str], None] = lambda activity: None,
        rest: Callable[[str], None] = lambda activity: None,
    ) -> None:
        self.folder, self.keep, self.tell, self.beat, self.rest = folder, max(2, keep), tell, beat, rest
        self.best_step: int | None = None
        self.last_saved: int | None = None
        """Step of the newest checkpoint that was read back whole."""
        self.failure: SaveFailure | None = None
        """The last save's failure; None once a save succeeds."""
        self.refused: Refusal | None = None
        """A snapshot that was not written, as it isn't sound."""
        self._thread: threading.Thread | None = None
        self._turn, self._writing = threading.Lock(), False
        self._next: tuple[int, Callable[[], Snapshot]] | None = None
        self._fault: BaseException | None = None
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)

    # -- writing

    def save(self, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Make and write the snapshot of ``step`` behind the training; waits for a save that is under way."""
        self.wait()
        self.beat("a save")
        self._writing = True
        self._thread = threading.Thread(target=self._save_all, args=(step, snapshot), name="checkpoint", daemon=True)
        self._thread.start()

    def save_later(self, step: int, snapshot: Callable[[], Snapshot]) -> bool:
        """Have a snapshot written once the save that is under way is over, in place of one that waits for that, unless
        that is the best's. Nothing is waited for.

        Returns:
            Whether it will be; if not, it is for :meth:`save`.
        """
        with self._turn:
            taken = self._next is not None and self._next[0] == self.best_step
            if self._writing and not taken:
                self._next = step, snapshot
            return self._writing and not taken

    def wait(self) -> int | None:
        """Wait until no save is under way, and tell the step of the newest checkpoint that was read back whole.

        A fault of the code itself (not of the disk) comes up here.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        return self.last_saved

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._writing

    @property
    def last_good(self) -> Path | None:
        """The newest checkpoint that was read back whole, if it is still there."""
        path = None if self.last_saved is None else self.path(self.last_saved)
        return path if path is not None and path.is_dir() else None

    def path(self, step: int) -> Path:
        """The folder of the checkpoint at ``step``."""
        return self.folder / f"checkpoint-{step}"

    def _save_all(self, step: int, snapshot: Callable[[], Snapshot]) -> None:
        due: tuple[int, Callable[[], Snapshot]] | None = (step, snapshot)
        while due is not None:
            self._save(*due)
            with self._turn:
                due, self._next = self._next, None
                self._writing = due is not None

    def _save(self, step: int, snapshot: Callable[[], Snapshot]) -> None:
        try:
            made = snapshot()
            bad = made.nonfinite()
            if bad is not None:
                self.refused = Refusal(step, bad)
                return
            self._write(made)
            self.last_saved, self.failure = step, None
            self._prune()
        except OSError as error:
            self.failure = self.failure if self.last_saved == step else SaveFailure(step, error)
        except BaseException as fault:  # noqa: BLE001 - carried to the training thread by wait()
            self._fault = fault
        finally:
            self.rest("a save")

    def _write(self, snapshot: Snapshot) -> None:
        files = snapshot.files()
        self.folder.mkdir(exist_ok=True)  # somebody may have deleted it
        needed, free = sum(map(len, files.values())) + _SLACK, free_bytes(self.folder)
        if free < needed:
            room = f"{size_text(needed)} are needed, and the disk has {size_text(free)} free"
            raise OSError(errno.ENOSPC, room, str(self.folder))
        with atomic_folder(self.path(snapshot.step)) as folder:
            for name, data in files.items():
                write_file(folder / name, data)
                self.beat("a save")

    def _prune(self) -> None:
        """Remove what is older than the newest ``keep``; runs only after a new one was read back."""
        steps = [step for step in self.steps() if self.last_saved is None or step <= self.last_saved]
        for step in steps[self.keep :]:
            if step != self.best_step:
                discard(self.path(step))

    # -- reading

    def steps(self) -> list[int]:
        """Steps that have a checkpoint folder, newest first; whole or not."""
        found = [_NAME.fullmatch(path.name) for path in self.folder.iterdir() if not path.is_symlink()]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def newest_valid(self) -> Path | None:
        """The newest checkpoint whose every file is as it was written, or None if there is none.

        A damaged one is told, with the file, and moved aside under the name ``damaged-checkpoint-<step>``.
        """
        for step in self.steps():
            path = self.path(step)
            try:
                verify(path)
            except DamagedError as damage:
                self.tell(f"checkpoint {path} is damaged: {damage}; the one before it is taken")
                aside = path.with_name(f"damaged-{path.name}")
                if aside.exists():
                    discard(aside)
                path.rename(aside)
                continue
            self.last_saved = step
            return path
        return None


def share_newest(ranks: Ranks, folder: Path, tell: Callable[[str], None]) -> None:
    """Give the other ranks, in their ``folder``, the newest whole checkpoint that rank 0 has in its own."""

    def newest() -> tuple[str, dict[str, bytes]] | None:
        path = Checkpoints(folder, tell=tell).newest_valid()
        return None if path is None else (path.name, {name: (path / name).read_bytes() for name in listed(path)})

    found = None if ranks.alone else ranks.from_first(newest)
    if found is None or ranks.first:
        return
    name, files = found
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / name) as copy:
        for file, data in files.items():
            write_file(copy / file, data)


def read_checkpoint(path: Path) -> Snapshot:
    """Read a checkpoint that :meth:`Checkpoints.newest_valid` gave, onto the CPU.

    Raises:
        DamagedError: A file isn't what this version of slimtune writes.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    texts: dict[str, bytes] = {}
    for file in sorted(path.iterdir()):
        try:
            if file.suffix == ".safetensors":
                tensors[file.stem] = load_file(file)
            elif file.suffix == ".json":
                texts[file.name] = file.read_bytes()
        except (OSError, SafetensorError) as error:
            raise DamagedError(file.name, f"can't be read ({error})") from None
    match = _NAME.fullmatch(path.name)
    return Snapshot(int(match[1]) if match else 0, tensors, texts)


def to_plain(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a state dict into JSON and tensors (not copies); :func:`from_plain` puts them together again.

    Takes dicts with any JSON-able keys, lists, tuples, numbers, strings, booleans, None and tensors. A tensor that
    stands in several places stays one.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = f"{len(names):06d}"
                tensors[names[id(value)]] = value.detach()
            return {"tensor": names[id(value)]}
        if isinstance(value, Mapping):
            return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [plain(item) for item in value]}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} can't be saved without pickle")

    return plain(tree), tensors


def from_plain(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state dict that :func:`to_plain` split."""
    if isinstance(plain, list):
        return [from_plain(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {from_plain(key, tensors): from_plain(item, tensors) for key, item in value}
    return tuple(from_plain(item, tensors) for item in value)


def json_bytes(value: Any) -> bytes:
    """``value`` as JSON text; NaN and infinities as Python writes them, which Python reads back."""
    return json.dumps(value, ensure_ascii=False).encode()


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating tensors that hold a NaN or an infinity."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
