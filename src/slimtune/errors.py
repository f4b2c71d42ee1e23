"""Every error that a person can cause, with the exit code that the command line ends with.

Exit codes: 0 done · 1 a fault of slimtune's own · 2 something the person can mend · 3 a guard stopped the run ·
75 stopped on request, with a checkpoint to go on from (BSD's EX_TEMPFAIL).
"""

from __future__ import annotations

import re

__all__ = ["GuardStop", "SlimtuneError", "StopRequested", "UserError", "shown"]

_MOST = 4_000
"""Characters of one part of a message: files and fields may hold megabytes, and a message repeats what they hold."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What makes a terminal do something, or show text in another order than it stands in."""


def shown(text: str, most: int = _MOST) -> str:
    """Text that somebody else wrote, as it may stand in a terminal: cut, and its control characters written out."""
    cut = text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", cut)


class SlimtuneError(Exception):
    """Base of slimtune's own errors. One message says the value, the rule it breaks, and the way out.

    Args:
        what: What is wrong, with the value and where it stands (file, line, field).
        rule: The rule that the value breaks.
        way_out: What the person can do now.
    """

    exit_code = 1

    def __init__(self, what: str, *, rule: str = "", way_out: str = "") -> None:
        self.what, self.rule, self.way_out = what, rule, way_out = shown(what), shown(rule), shown(way_out)
        super().__init__("\n".join(line for line in (what, rule, way_out) if line))


class UserError(SlimtuneError):
    """Something that the person can mend: an input, an option, a missing file, too little room."""

    exit_code = 2


class GuardStop(SlimtuneError):
    """A guard stopped the run to keep its result sound: a non-finite value, divergence, no room for a checkpoint."""

    exit_code = 3


class StopRequested(SlimtuneError):
    """The run was asked to stop (a signal, a watchdog) and left a checkpoint to go on from."""

    exit_code = 75
