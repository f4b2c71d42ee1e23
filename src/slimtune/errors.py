"""Every error that a person can cause, with the exit code that the command line ends with.

Exit codes: 0 done · 1 a fault of slimtune's own · 2 something the person can mend · 3 a guard stopped the run ·
4 the run is done, and the model worse than it was · 75 stopped on request, with a checkpoint to go on from (BSD's
EX_TEMPFAIL).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Sequence

from slimtune.width import aligned
from slimtune.words import told, told_cell

__all__ = [
    "GuardStop",
    "SlimtuneError",
    "StopRequested",
    "UserError",
    "by_the_system",
    "check_utf8",
    "is_panic",
    "shown",
    "written_out",
]

_MOST = 4_000
"""Characters of one part of a message: files and fields may hold megabytes, and a message repeats what they hold."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What makes a terminal do something, or show text in another order than it stands in; and bytes of a file's name that
are no UTF-8, which nothing can print."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_NO_PLACE = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})
_NO_HANDLE = frozenset({errno.EMFILE, errno.ENFILE})
_OS_ERROR = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")
"""How Rust's libraries (safetensors, tokenizers) end the plain exceptions that they raise."""


def written_out(text: str) -> str:
    """Text that somebody else wrote, as it may stand in a terminal or on a page: its control characters written out."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def shown(text: str, most: int = _MOST) -> str:
    """As :func:`written_out`, and cut."""
    return written_out(text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)")


class SlimtuneError(Exception):
    """Base of slimtune's own errors. One message says the value, the rule it breaks, and the way out.

    Args:
        what: What is wrong, with the value and where it stands (file, line, field).
        rule: The rule that the value breaks.
        way_out: What the person can do now.
        table: Rows of what it is about, which stand below ``what``.
    """

    exit_code = 1
    told = False
    """Another rank of the run shows it to the person."""
    last: Callable[[], None] | None = None
    """What is done once it has been said, by the command or at the process's end: other ranks may wait for this one."""

    def __init__(self, what: str, *, rule: str = "", way_out: str = "", table: Iterable[Sequence[str]] = ()) -> None:
        self.what, self.rule, self.way_out = what, rule, way_out = shown(what), shown(rule), shown(way_out)
        self.table = [[shown(cell) for cell in row] for row in table]
        super().__init__("\n".join(filter(None, (what, *aligned(self.table), rule, way_out))))

    def said(self) -> list[str]:
        """What a person is shown, in the language that is spoken: what, its table, rule, way out."""
        table = aligned([told_cell(cell) for cell in row] for row in self.table)
        return [text for text in (told(self.what), *table, told(self.rule), told(self.way_out)) if text]


class UserError(SlimtuneError):
    """Something that the person can mend: an input, an option, a missing file, too little room."""

    exit_code = 2


class GuardStop(SlimtuneError):
    """A guard stopped the run to keep its result sound: a non-finite value, divergence, no room for a checkpoint."""

    exit_code = 3


class StopRequested(SlimtuneError):
    """The run was asked to stop (a signal, a watchdog) and left a checkpoint to go on from."""

    exit_code = 75


def check_utf8(what: str, name: str) -> None:
    """See that a name can stand in a run's files, which are UTF-8.

    Raises:
        UserError: Its bytes are none.
    """
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise UserError(
            f"{what} {name} is no UTF-8",
            rule="A run's files hold the names of its files.",
            way_out="Rename it, or give a link of another name.",
        )


def by_the_system(error: BaseException) -> UserError | None:
    """What a disk refuses, wherever it does, as the person's to mend: no code can be right or wrong about it.

    None if ``error`` is nothing of that kind.
    """
    file, number, said = "", None, str(error)
    if isinstance(error, OSError):
        file, number, said = str(error.filename or ""), error.errno, error.strerror or said
    elif found := _OS_ERROR.search(said):
        number = int(found[1] or found[2])
    is_named = bool(file) or not isinstance(error, OSError)  # what sockets refuse has no file
    if number in _NO_ROOM:
        way_out = "Make room, or take another disk."
    elif number in _NOT_ALLOWED and is_named:
        way_out = "Choose a place that you may read and write, or change whose it is."
    elif number in _NO_PLACE and is_named:
        way_out = "Check the path."
    elif number in _NO_HANDLE:
        way_out = "Allow more open files: ulimit -n"
    else:
        return None
    return UserError(f"{file}: {said}" if file else f"a file can't be written: {said}", way_out=way_out)


def is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up, as tokenizers' does over a file that it can't follow. PyO3 makes that no
    :class:`Exception`, and its class can't be imported."""
    return type(error).__name__ == "PanicException"
