"""Regular expressions of an adapter's config, tried on a model's names before PEFT matches them, within a time.

Python's matching can't be interrupted, holds the interpreter's lock, and no look at an expression tells how long it
takes. So another process matches first, all that PEFT will (0.21: ``tuners_utils.py``, ``utils/other.py``); it is
killed if it isn't done in time. What ended there ends here, for the names are the same.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from slimtune.errors import UserError

__all__ = ["check_patterns"]

_SECONDS = 5.0
"""For all of a config's patterns on all of a model's names; the slowest of real ones (Unsloth's) takes 0.1."""
_PLAIN = re.compile(r"[\w.-]*")
_FORMS = {
    "target_modules": ["fullmatch", "{}"],
    "exclude_modules": ["fullmatch", "{}"],
    "modules_to_save": ["match", r"(^|.*\.){}($|\..*)"],
    "layers_pattern": ["match", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."],
    "rank_pattern": ["match", r"(.*\.)?({})$"],
    "alpha_pattern": ["match", r"(.*\.)?({})$"],
}
"""How PEFT matches each field's expressions; a list of ``target_modules`` or ``exclude_modules`` it takes as names."""

_MATCH = """
import json, re, sys
forms, names = json.load(sys.stdin)
for field, how, pattern in forms:
    print(field, flush=True)
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        sys.exit(f"is no valid regular expression ({error})")
    for name in names:
        getattr(compiled, how)(name)
"""


def check_patterns(where: str, settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """See that matching an adapter's patterns with a model's modules ends.

    Args:
        where: The file that the patterns stand in, for the message.
        settings: PEFT's config.
        names: Of the model's modules and parameters.

    Raises:
        UserError: A pattern is no valid expression, or its matching takes too long.
    """
    forms = [
        [field, _FORMS[field][0], _FORMS[field][1].replace("{}", pattern)]
        for field in _FORMS
        for pattern in _patterns(field, settings.get(field))
        if not _PLAIN.fullmatch(pattern)
    ]
    if not forms:
        return
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _MATCH],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, problem = child.communicate(json.dumps([forms, list(names)]), timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        said, _ = child.communicate()
        problem = f"is still being matched after {_SECONDS:g} s"
    if child.returncode != 0:
        field = (said.split() or ["a field"])[-1]
        raise UserError(
            f"{where}: a pattern in {field} {(problem.strip().splitlines() or ['can not be matched'])[-1]}",
            rule="A pattern is tried on the model's names first, within a time.",
            way_out="Name the modules in a list instead.",
        )


def _patterns(field: str, value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    return () if value is None or field in ("target_modules", "exclude_modules") else list(value)
