"""Folders that appear whole or not at all, and files that survive a full disk.

A folder is written beside its place under a hidden name, each file is synced, ``SHA256SUMS`` lists them all, everything
is read back from the disk, and one rename makes it visible; then the parent is synced. Whoever looks sees no folder or
a whole one, after a kill or a power cut as well. ``SHA256SUMS`` is in ``sha256sum``'s own format, so
``sha256sum -c SHA256SUMS`` checks a checkpoint without slimtune.

All file operations go through :mod:`os`, one system call each, so that the tests can stop a save after any of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from slimtune.errors import UserError

__all__ = [
    "SUMS",
    "DamagedError",
    "JsonLines",
    "atomic_folder",
    "check_new",
    "check_writable",
    "discard",
    "free_bytes",
    "listed",
    "remove_leftovers",
    "replace_file",
    "verify",
    "write_file",
]

SUMS = "SHA256SUMS"
_PARTIAL = ".partial"
_DISCARDED = ".discarded"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")
_CHUNK = 1 << 20


class DamagedError(Exception):
    """A folder that isn't what was written: the file that differs, and how."""

    def __init__(self, file: str, reason: str) -> None:
        self.file, self.reason = file, reason
        super().__init__(f"{file} {reason}")


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into; at the end it becomes ``final``, whole and synced.

    A ``final`` that exists is replaced. If the body or the commit fails, the hidden folder is removed and ``final`` is
    what it was.

    Raises:
        OSError: A write, sync or rename failed, or what was read back differs from what was written.
    """
    partial = final.with_name(f".{final.name}{_PARTIAL}")
    _remove(partial)
    os.mkdir(partial)  # noqa: PTH102 - one system call, see the module's docstring
    try:
        yield partial
        _seal(partial)
        try:
            verify(partial)
        except DamagedError as damage:
            raise OSError(errno.EIO, f"read back differently: {damage.reason}", str(final / damage.file)) from None
        if final.exists():
            discard(final)
        os.rename(partial, final)  # noqa: PTH104
        _sync_folder(final.parent)
    except BaseException:
        with suppress(OSError):
            _remove(partial)
        raise


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a new file and sync it to the disk. Who may read it is the umask's to say, as of every file here."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(descriptor, view[:_CHUNK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Write a file whole: readers see the old one or the new one, and after a failure the old one.

    Raises:
        OSError: It can't be written; the error names the file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        write_file(temporary, text.encode())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.filename is None:  # a write knows only a number
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def check_new(output: Path) -> None:
    """See that what is made may be written to ``output``.

    Raises:
        UserError: It exists and is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists and is not empty", way_out="Choose another folder (-o).")


def check_writable(folder: Path) -> None:
    """See that a file can be made in ``folder``, or in the one that it would be made in, before hours are spent.

    Raises:
        UserError: It can't.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        what = f"nothing can be written into {there}: {error.strerror}"
        raise UserError(what, way_out="Choose another place (-o).") from None


def verify(folder: Path) -> None:
    """Check every file of ``folder`` against its ``SHA256SUMS``; nothing may be missing, added, linked or changed.

    Raises:
        DamagedError: Names the first file that differs.
    """
    sums = _read_sums(folder)
    present = {entry.name for entry in os.scandir(folder)} - {SUMS}
    for name in sorted(present - sums.keys()):
        raise DamagedError(name, f"is not listed in {SUMS}")
    for name, expected in sums.items():
        try:
            actual = _sha256(folder / name)
        except FileNotFoundError:
            raise DamagedError(name, "is missing") from None
        except OSError as error:
            raise DamagedError(name, f"can't be read ({error.strerror})") from None
        if actual != expected:
            raise DamagedError(name, f"has SHA-256 {actual[:12]}…, written was {expected[:12]}…")


def listed(folder: Path) -> frozenset[str]:
    """Names of the files that ``SHA256SUMS`` lists; none if it is missing or damaged."""
    try:
        return frozenset(_read_sums(folder))
    except DamagedError:
        return frozenset()


def discard(folder: Path) -> None:
    """Remove a folder so that a kill half-way leaves no partial folder under its name; finish what one has left."""
    hidden = folder.with_name(f".{folder.name}{_DISCARDED}")
    _remove(hidden)
    if folder.is_dir():
        os.rename(folder, hidden)  # noqa: PTH104
        _remove(hidden)


def remove_leftovers(parent: Path) -> None:
    """Remove what a killed process left in ``parent``: hidden folders that were being written or removed."""
    for path in parent.glob(".*"):
        if path.name.endswith((_PARTIAL, _DISCARDED)):
            _remove(path)


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user can still write to the file system of ``path``."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


class JsonLines:
    """An append-only file of JSON objects, one a line, that never holds a torn line of this process.

    While the disk is full or failing, records wait in memory in their order and are written as soon as a write
    succeeds; :attr:`error` says what failed last, or is None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self._waiting: list[bytes] = []
        self._end_torn_line()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record. Values must be JSON; NaN and infinities are refused."""
        self._waiting.append(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            self.error = error
        else:
            self.error = None

    def _write(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            while self._waiting:
                whole = os.fstat(descriptor).st_size
                line = self._waiting[0]
                try:
                    if os.write(descriptor, line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(descriptor, whole)
                    raise
                del self._waiting[0]
        finally:
            os.close(descriptor)

    def _end_torn_line(self) -> None:
        """Cut off a last line that a killed process didn't finish."""
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.truncate(self.path, whole)


def _seal(folder: Path) -> None:
    files = sorted(folder.iterdir())
    write_file(folder / SUMS, "".join(f"{_sha256(path)}  {path.name}\n" for path in files).encode())
    mode = stat.S_IMODE((folder / SUMS).stat().st_mode)
    for path in files:
        if stat.S_IMODE(path.stat().st_mode) != mode:  # safetensors lets the owner alone read what it writes
            path.chmod(mode)
        _sync_file(path)
    _sync_folder(folder)


def _read_sums(folder: Path) -> dict[str, str]:
    try:
        text = _read_regular(folder / SUMS).decode("utf-8")
    except FileNotFoundError:
        raise DamagedError(SUMS, "is missing") from None
    except UnicodeDecodeError:
        raise DamagedError(SUMS, "is damaged") from None
    except OSError as error:
        raise DamagedError(SUMS, f"can't be read ({error.strerror})") from None
    lines = text.splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    if not lines or not text.endswith("\n") or not all(matches):
        raise DamagedError(SUMS, "is damaged")
    return {match[2]: match[1] for match in matches if match}


def _open_regular(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def _read_regular(path: Path) -> bytes:
    with os.fdopen(_open_regular(path), "rb") as file:
        return file.read()


def _sha256(path: Path) -> str:
    with os.fdopen(_open_regular(path), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    """Sync a file and drop it from the page cache, so that reading it back reads the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if not folder.is_dir() or folder.is_symlink():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            os.unlink(path)  # noqa: PTH108
    os.rmdir(folder)  # noqa: PTH106
