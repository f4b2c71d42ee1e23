"""Tool calls read back from what a model wrote, in the form that its template writes them in.

As in :mod:`slimtune.data.dialect`, nothing is known of any template by its name: it is asked to write calls whose names
and values stand nowhere else, and the form is read off from where these come out. A form is taken only if it reads back
each of these replies as it was asked for. Five kinds are known:

- a JSON object with name and arguments in it (Hermes, Qwen, Llama, Mistral's older);
- the name, then the arguments as a JSON object (Mistral's newer, DeepSeek, Kimi, gpt-oss);
- the name, then an object whose keys stand bare and whose texts stand between marks (Gemma 4);
- the name, then each argument between marks of its own (GLM, MiniMax, Qwen3-Coder);
- Python's own notation (LFM2).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slimtune.data.conversation import RowRefused
from slimtune.data.template import TemplateRefused

__all__ = ["Call", "CallForm", "Frame", "Marked", "Read", "call_form"]

_DECODER = json.JSONDecoder()
_NAME = r"([\w.\-]+)"
_ID = "qzid00000"
_DEEPEST = 50


@dataclass(frozen=True)
class Call:
    """One call: a tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Read:
    """A reply taken apart."""

    text: str
    """What stands outside of calls."""
    calls: list[Call]


Schemas = Mapping[str, Mapping[str, Any]]
"""By tool and argument, the argument's JSON schema."""
Found = tuple[Call, int]
"""A call, and where it ends."""


@dataclass(frozen=True)
class Frame:
    """What stands around calls: ``before CALL``, for each one more ``between CALL``, then ``after``. In these, and in
    ``within``, stand :data:`ID` and :data:`NUMBER`."""

    before: str
    within: str | Marked
    """What stands between a call's name and its arguments as a JSON object, with which it ends; or the marks of each
    argument, and of the call's end."""
    between: str | None
    """None where the template writes one call alone."""
    after: str

    ID = "\0"
    """Stands for a call's id, nine letters and digits."""
    NUMBER = "\1"
    """Stands for a call's number, counted from 0."""


class _Kind(Protocol):
    def at(self, text: str, place: int, schemas: Mapping[str, Any]) -> Found | None:
        """The call that begins at ``place``."""


@dataclass(frozen=True)
class CallForm:
    """How a template writes calls."""

    opening: str
    """What stands before the first; empty if a reply begins with the call itself."""
    first: str
    """The character that a call begins with where ``opening`` is empty."""
    between: str
    """What stands between two calls; only its marks count, not its white space."""
    closing: str
    """What stands behind the last; a reply may end before it is through."""
    kind: _Kind
    lead: str
    """What stands before a reply of any kind, as the template writes it; what the prompt ends with is left out."""
    sample: str
    """Calls as the template writes them."""

    def frame(self) -> Frame | None:
        """What stands around calls; None unless each is a name and then its arguments, in JSON or between marks."""
        if self.lead.strip() and not self.opening:  # a call that begins behind something wouldn't be seen
            return None
        match self.kind:
            case Marked():
                before, end = self.lead + self.sample.partition(_ONE.name)[0], self.kind.end
                if not self.closing.startswith(end) or (self.between and not self.between.startswith(end)):
                    return None
                return Frame(before, self.kind, self.between[len(end) :] or None, self.closing[len(end) :])
            case _Object() | _NameThenObject():
                return self._around_json()
        return None

    def _around_json(self) -> Frame | None:
        first = _around(self.sample, _ONE)
        if first is None:
            return None
        before, within, after = first
        second = _around(after, _NUMBER)
        if second is None:
            return None if _NUMBER.name in after else Frame(self.lead + before, within, None, after)
        between, again, after = second
        if again != within:  # calls are counted, as Kimi's
            within, again = (re.sub(r"\d+", Frame.NUMBER, text) for text in (within, again))
        return Frame(self.lead + before, within, between, after) if again == within else None

    def begins(self, text: str) -> int | None:
        """Where calls begin in a reply, or None if none do so far."""
        if self.opening:
            place = text.find(self.opening)
            return place if place >= 0 else None
        start = len(text) - len(text.lstrip())
        return start if text[start : start + 1] == self.first else None

    def may_begin(self, text: str) -> int:
        """How many characters at the end of ``text`` may be the beginning of calls."""
        if not self.opening:
            return len(text) if not text.strip() else 0
        longest = min(len(text), len(self.opening) - 1)
        return next((size for size in range(longest, 0, -1) if text.endswith(self.opening[:size])), 0)

    def read(self, reply: str, tools: Sequence[Mapping[str, Any]] = ()) -> Read:
        """The reply taken apart. What isn't a whole call in this form stays text.

        Args:
            reply: What the model wrote, without its end mark.
            tools: The tools that it was shown: their schemas say of which type an argument is that has none in text.
        """
        begin = self.begins(reply)
        if begin is None:
            return Read(reply, [])
        calls: list[Call] = []
        schemas = {tool["function"]["name"]: _properties(tool["function"]) for tool in tools}
        end = place = begin + len(self.opening)
        while (found := self.kind.at(reply, _blank(reply, place), schemas)) is not None:
            if not _is_json(found[0].arguments):
                break
            call, end = found
            calls.append(call)
            following = _after(reply, end, self.between)
            if following is None:
                break
            place = following
        if not calls:
            return Read(reply, [])
        closed = _after(reply, end, self.closing)
        rest = reply[end if closed is None else closed :]
        if closed is None and self.closing.strip().startswith(rest.strip()):
            rest = ""
        return Read(reply[:begin].rstrip() + rest.rstrip(), calls)


# -- the kinds --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    path: tuple[str, ...]
    """Keys to the object that holds name and arguments."""
    name: str
    arguments: str

    def at(self, text: str, place: int, schemas: Mapping[str, Any]) -> Found | None:
        decoded = _object(text, place)
        if decoded is None:
            return None
        made, end = decoded
        for key in self.path:
            inner = made.get(key)
            if not isinstance(inner, dict):
                return None
            made = inner
        name, arguments = made.get(self.name), _plain(made.get(self.arguments))
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return Call(name, arguments), end


@dataclass(frozen=True)
class _NameThenObject:
    between: re.Pattern[str]

    def at(self, text: str, place: int, schemas: Mapping[str, Any]) -> Found | None:
        name = re.compile(_NAME).match(text, place)
        mark = self.between.match(text, name.end()) if name else None
        decoded = _object(text, mark.end()) if mark else None
        if name is None or decoded is None:
            return None
        return Call(name[1], decoded[0]), decoded[1]


@dataclass(frozen=True)
class _Bare:
    quote: str
    """What stands before and behind a text."""

    def at(self, text: str, place: int, schemas: Mapping[str, Any]) -> Found | None:
        name = re.compile(_NAME).match(text, place)
        read = None if name is None or not text.startswith("{", name.end()) else self._value(text, name.end(), 0)
        return None if name is None or read is None else (Call(name[1], read[0]), read[1])

    def _value(self, text: str, at: int, depth: int) -> tuple[Any, int] | None:
        """The value that begins at ``at``, and its end."""
        if depth > _DEEPEST:
            return None
        if text.startswith(self.quote, at):
            begin = at + len(self.quote)
            end = text.find(self.quote, begin)
            return None if end < 0 else (text[begin:end], end + len(self.quote))
        if text[at : at + 1] in ("{", "["):
            return self._several(text, at, depth)
        plain = re.compile(r"[^,{}\[\]]+").match(text, at)
        try:
            return None if plain is None else (json.loads(plain[0]), plain.end())
        except ValueError:
            return None

    def _several(self, text: str, at: int, depth: int) -> tuple[Any, int] | None:
        """The object or the list that begins at ``at``, and its end."""
        closing = {"{": "}", "[": "]"}[text[at]]
        made: list[tuple[str, Any]] = []
        at += 1
        while not text.startswith(closing, at):
            key, colon, _ = text[at:].partition(":") if closing == "}" else ("", "", "")
            read = self._value(text, at + len(key) + len(colon), depth + 1)
            if read is None:
                return None
            made.append((key.strip(), read[0]))
            at = read[1]
            if text.startswith(",", at):
                at += 1
            elif not text.startswith(closing, at):
                return None
        return (dict(made) if closing == "}" else [value for _, value in made]), at + 1


@dataclass(frozen=True)
class Marked:
    """Each argument between marks: ``name before_key KEY key_end VALUE value_end``, with ``next_key`` from one value to
    the next key."""

    before_key: str
    """What stands between name and first key."""
    key_end: str
    value_end: str
    next_key: str
    none: str
    """What stands between the name of a call without arguments and its end."""
    end: str

    def at(self, text: str, place: int, schemas: Mapping[str, Any]) -> Found | None:
        """The call that begins at ``place``."""
        name = re.compile(_NAME).match(text, place)
        if name is None:
            return None
        types = schemas.get(name[1], {})
        arguments: dict[str, Any] = {}
        at = _after(text, name.end(), self.before_key)
        if at is None:
            end = _after(text, name.end(), self.none)
            closed = None if end is None else _after(text, end, self.end)
            return None if end is None or closed is None else (Call(name[1], {}), end)
        while True:
            key_end = text.find(self.key_end.strip(), at)
            if key_end < 0:
                return None
            key, at = text[at:key_end].strip(), key_end + len(self.key_end.strip())
            value_end = text.find(self.value_end.strip(), at)
            if value_end < 0:
                return None
            value = text[at:value_end]
            arguments[key] = _typed(_unwrapped(value, self.key_end, self.value_end), types.get(key))
            following = _after(text, value_end, self.next_key)
            if following is None:
                return Call(name[1], arguments), value_end + len(self.value_end.strip())
            at = following


class _Json(ast.NodeTransformer):
    """JSON's words inside of Python's notation."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(words[node.id]), node) if node.id in words else node


@dataclass(frozen=True)
class _Python:
    def at(self, text: str, place: int, schemas: Mapping[str, Any]) -> Found | None:
        end = _closing_bracket(text, place)
        if end is None:
            return None
        try:
            made = ast.parse(text[place:end], mode="eval").body
            if not isinstance(made, ast.Call) or not isinstance(made.func, ast.Name) or made.args:
                return None
            arguments = {each.arg: ast.literal_eval(_Json().visit(each.value)) for each in made.keywords if each.arg}
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return None
        return (Call(made.func.id, arguments), end) if len(arguments) == len(made.keywords) else None


# -- finding a template's form ----------------------------------------------------------------------------------------

Write = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]
"""(messages, tools) to what a model has to write as the last message."""

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "qzdoes",
            "parameters": {
                "type": "object",
                "properties": {
                    "qzarg": {"type": "string", "description": "qzabout"},
                    "qzmore": {"type": "string", "description": "qzabout"},
                    "qzcount": {"type": "integer", "description": "qzabout"},
                },
            },
        },
    }
    for name in ("qztool", "qzother")
]
_ONE = Call("qztool", {"qzarg": "qzvalue"})
_TWO = Call("qztool", {"qzarg": "qzvalue", "qzmore": "qzsecond"})
_NONE = Call("qztool", {})
_NUMBER = Call("qzother", {"qzcount": 7, "qzarg": 'qz "said", {it}'})


def call_form(write: Write, ends: Sequence[str]) -> CallForm | None:
    """The form in which a template writes calls; None if it isn't one that can be read back.

    Args:
        write: Asks the template.
        ends: The marks that end replies.
    """

    def written(*calls: Call) -> str | None:
        message = {"role": "assistant", "content": "", "tool_calls": [_as_message(*each) for each in enumerate(calls)]}
        text = _asked(write, message, ends)
        # Some templates write the first of several calls alone.
        return text if text is not None and all(call.name in text for call in calls) else None

    plain = _asked(write, {"role": "assistant", "content": "qzreply"}, ends)
    asked = ([_ONE], [_TWO], [_NONE], [_NUMBER], [_ONE, _NUMBER])
    one, two, none, number, both = (written(*calls) for calls in asked)
    if plain is None or one is None or two is None:
        return None
    # What comes before every reply alike (the end of a thought that the prompt opened) doesn't open calls.
    before = plain.partition("qzreply")[0]
    common = len(before) if one.startswith(before) else 0
    for found in _forms(one[common:], two[common:], none, (both or "")[common:], before[:common]):
        pairs = zip(asked, (one, two, none, number, both), strict=True)
        if all(text is None or found.read(text[common:], _TOOLS).calls == calls for calls, text in pairs):
            return found
    return None


def _forms(one: str, two: str, none: str | None, both: str, lead: str) -> Iterator[CallForm]:
    """What could be the form, by a reply with one argument, one with two, one with none, and one with two calls."""

    def form(start: int, end: int, kind: _Kind) -> CallForm:
        opening, closing = one[:start], one[end:]
        between = ""
        if both.startswith(one[:end]):
            other = both.find("qzother", end)
            second = max(both.rfind("{", end, other), end) if isinstance(kind, _Object) else other
            between = both[end:second] if second >= 0 else ""
        return CallForm(opening.strip(), one[start : start + 1], between, closing, kind, lead, both or one)

    name = one.find("qztool")
    if name < 0:
        return
    for start in (place.start() for place in re.finditer(r"\{", one)):
        decoded = _object(one, start)
        if decoded is None:
            continue
        made, end = decoded
        if (path := _path(made)) is not None:
            yield form(start, end, _Object(*path))
        elif made == _ONE.arguments and name < start:
            mark = one[name + len("qztool") : start]
            pattern = re.sub(r"\d+", r"\\d+", re.escape(mark.replace(_ID, "\0"))).replace("\0", r"[\w.\-]*")
            kind = _NameThenObject(re.compile(pattern.replace(r"\ ", r"\s*").replace("\\\n", r"\s*")))
            yield form(name, end, kind)
    if (bare := re.compile(r"\{qzarg:(\S+)qzvalue\1\}").match(one, name + len("qztool"))) is not None:
        yield form(name, bare.end(), _Bare(bare[1]))
    if name >= 0 and (marked := _marks(two, none)) is not None:
        end = one.rfind("qzvalue") + len("qzvalue")
        close = marked.value_end.strip()
        yield form(name, end + one[end:].find(close) + len(close), marked)
    if (bracket := _closing_bracket(one, name)) is not None:
        yield form(name, bracket, _Python())


def _around(text: str, call: Call) -> tuple[str, str, str] | None:
    """What stands before, within and after a call of which the name comes first and the arguments are a JSON object."""
    name = text.find(call.name)
    behind = name + len(call.name)
    for start in (place.start() for place in re.finditer(r"\{", text) if name >= 0 and place.start() > name):
        decoded = _object(text, start)
        if decoded is not None and decoded[0] == call.arguments:
            parts = (text[:name], text[behind:start], text[decoded[1] :])
            before, within, after = (re.sub(rf"{_ID[:-1]}\d", Frame.ID, part) for part in parts)
            return before, within, after
    return None


def _marks(two: str, none: str | None) -> Marked | None:
    words = ("qztool", "qzarg", "qzvalue", "qzmore", "qzsecond")
    places = [two.find(word) for word in words]
    if min(places) < 0 or places != sorted(places) or none is None:
        return None
    gaps = [two[at + len(word) : after] for word, at, after in zip(words, places, [*places[1:], len(two)], strict=True)]
    before_key, key_end, next_key, key_again, last = gaps
    value_end = _common(next_key, last).rstrip("< \n")
    if key_end != key_again or not value_end.strip() or not before_key.strip() or not key_end.strip():
        return None
    behind = none.partition("qztool")[2]
    whole_end = last[len(value_end) :]
    nothing = behind.removesuffix(whole_end) if behind.endswith(whole_end) else behind
    return Marked(before_key, key_end, value_end, next_key, nothing, whole_end)


def _path(made: dict[str, Any], path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], str, str] | None:
    """Where name and arguments are in an object that holds both."""
    name = next((key for key, value in made.items() if value == "qztool"), None)
    arguments = next((key for key, value in made.items() if _plain(value) == _ONE.arguments), None)
    if name is not None and arguments is not None:
        return path, name, arguments
    inner = ((key, value) for key, value in made.items() if isinstance(value, dict))
    return next((found for key, value in inner if (found := _path(value, (*path, key))) is not None), None)


def _asked(write: Write, message: dict[str, Any], ends: Sequence[str]) -> str | None:
    try:
        text = write([{"role": "user", "content": "qzuser"}, message], _TOOLS)
    except (RowRefused, TemplateRefused):
        return None
    end = next((mark for mark in ends if text.rstrip().endswith(mark)), "")
    return text.rstrip().removesuffix(end)


def _as_message(number: int, call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"{_ID[:-1]}{number}", "type": "function", "function": function}


# -- text -------------------------------------------------------------------------------------------------------------


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return (function.get("parameters") or {}).get("properties") or {}


def _blank(text: str, place: int) -> int:
    """The next place that isn't white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _after(text: str, place: int, mark: str) -> int | None:
    """Where ``mark`` ends that begins at ``place``, whatever white space is around its words; None if it doesn't."""
    for word in mark.split():
        place = _blank(text, place)
        if not text.startswith(word, place):
            return None
        place += len(word)
    return place


def _object(text: str, place: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object that begins at ``place``, and its end."""
    place = _blank(text, place)
    if not text.startswith("{", place):
        return None
    try:
        made, end = _DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None
    return (made, end) if isinstance(made, dict) else None


def _plain(value: Any) -> Any:
    """Arguments that are JSON in a text, decoded."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


def _unwrapped(value: str, before: str, after: str) -> str:
    """A value without the white space that its marks bring."""
    value = value.removeprefix(before[len(before.rstrip()) :])
    lead = after[: len(after) - len(after.lstrip())]
    return value.removesuffix(lead)


def _typed(value: str, schema: Any) -> Any:
    """A value that stands there as text, in the type that its schema says."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return value
    spelled = {"True": True, "False": False, "None": None}
    if value in spelled:
        return spelled[value]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _common(one: str, other: str) -> str:
    """The longest beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _is_json(arguments: dict[str, Any]) -> bool:
    """Whether a client can be given them: Python's notation, and Python's reader of JSON, take more than JSON has."""
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _closing_bracket(text: str, place: int) -> int | None:
    """Where the first bracket from ``place`` on is closed, as Python counts them; one pass, whatever a model wrote."""
    depth, quote = 0, ""
    while place < len(text):
        char = text[place]
        if quote:
            place += char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth <= 0:
                return place + 1 if depth == 0 else None
        place += 1
    return None
