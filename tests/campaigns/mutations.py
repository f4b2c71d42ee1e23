"""What can stand in a config file that no program of its kind would write: one change at a time, seeded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

__all__ = ["mutate"]

_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**7, 10**30, -(10**30), 0.5, 1e308, float("inf"), float("nan"), "", "x", "0",
    "\u001b[31mred\u0007", "<script>alert(1)</script>", "../../etc/passwd", "é\u202e", "a" * 100_000, "{{ 1/0 }}",
    [], {}, [None], [[]], [0], ["q_proj", 3], {"a": None}, {"": {}}, [1] * 20_000, "auto", "Infinity", "bfloat16",
]  # fmt: skip
"""Each is put in the place of whatever stood there."""


def mutate(file: Path, random: Random) -> str:
    """Change one thing in a JSON or YAML file, as data or as text. Gives what was done."""
    if random.random() < 0.12:
        return _as_text(file, random)
    text = file.read_text(encoding="utf-8")
    is_yaml = file.suffix == ".yaml"
    lines = file.suffix == ".jsonl"
    rows = text.splitlines() if lines else [text]
    at = random.randrange(len(rows))
    value = yaml.safe_load(rows[at]) if is_yaml else json.loads(rows[at])
    done, value = _changed(value, random)
    rows[at] = yaml.safe_dump(value, allow_unicode=True) if is_yaml else json.dumps(value, ensure_ascii=False)
    file.write_text("\n".join(rows) + "\n" * lines, encoding="utf-8")
    return done


def _as_text(file: Path, random: Random) -> str:
    data = file.read_bytes()
    at = random.randrange(max(1, len(data)))
    kinds = {
        "cut": data[:at],
        "empty": b"",
        "bytes": data[:at] + bytes(random.randrange(256) for _ in range(4)) + data[at:],
        "not UTF-8": data[:at] + b"\xff\xfe" + data[at:],
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "null": b"null",
        "list": b"[1, 2]",
        "text": b'"x"',
    }
    kind = random.choice(sorted(kinds))
    file.write_bytes(kinds[kind])
    return f"{kind} at {at}"


def _changed(value: Any, random: Random) -> tuple[str, Any]:
    """The value with one place in it replaced, taken out, doubled or renamed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return "all", random.choice(_VALUES)
    # As likely to be one at the top as one of the thousands deep in a vocabulary.
    top = [place for place in places if len(place) <= 2]
    place = random.choice(top if random.random() < 0.6 else places)
    inside: Any = value
    for key in place[:-1]:
        inside = inside[key]
    kind, last = random.choice(["replace"] * 6 + ["remove", "add", "nest"]), place[-1]
    if kind == "replace":
        inside[last] = copy.deepcopy(random.choice(_VALUES))
        told = repr(inside[last])
    elif kind == "remove":
        del inside[last]
        told = ""
    elif kind == "nest":
        inside[last] = [inside[last]]
        told = ""
    else:
        told = repr(random.choice(_VALUES))
        if isinstance(inside, dict):
            inside[f"{last}_x"] = random.choice(_VALUES)
        else:
            inside.append(copy.deepcopy(random.choice(_VALUES)))
    return f"{kind} {'.'.join(map(str, place))} {told[:60]}", value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))
