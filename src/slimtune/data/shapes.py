"""Shapes that published files have, brought to the few that :mod:`slimtune.data.conversation` reads.

A shape is told by the names of a row's columns and the kinds of their values, never by what a text says. Where names
leave a choice (two columns that may be the reply, a passage beside the question under a name that isn't known), nothing
is guessed: the row is refused, and the message has the ``--map`` to try.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from slimtune.data.blocks import has_blocks, unfolded
from slimtune.data.rows import RowRefused, from_text, kind_of, listed

__all__ = ["MEDIA", "Standard", "check_media", "standard_row", "unknown_shape"]

MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_PLACEHOLDER = re.compile(r"<(image|video|audio)>")

_TURN_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "turns", "chat", "data")
_QUESTIONS = ("question", "query", "problem", "instruction", "prompt", "input")
_REPLIES = (
    "output", "answer", "response", "solution", "completion", "reply", "target", "generated_solution", "long_answer",
)  # fmt: skip
_OTHER_PAIRS = (
    ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("human", "bot"), ("user", "bot"), ("q", "a"),
    ("inputs", "targets"), ("source", "target"), ("input_text", "output_text"),
    ("user_message", "assistant_message"),
)  # fmt: skip
"""Columns of question and reply whose names mean that only together."""
_EXTRA = ("input", "context", "passage", "article", "document")
_CHOICES = ("choices", "options", "b")
"""Columns of a multiple-choice question, which the question alone doesn't ask."""
_THOUGHTS = ("reasoning_content", "thinking", "complex_cot", "chain_of_thought")
_SYSTEM = ("system", "system_prompt", "system_message", "systemInstruction", "system_instruction")
_SYSTEMS = frozenset(_SYSTEM)
_BESIDE = frozenset({*_SYSTEM, "tools", "functions", "toolConfig", "chat_template_kwargs"})
"""Columns that are read beside the turns."""
_BESIDE_MESSAGES = _BESIDE | {"messages"}
_ALPACA = frozenset({"instruction", "input", "output", "system", "history"})

_COLUMNS_COMPARED = 1_000
"""A row of a broken file may have as many columns as it has words."""

_WHO = ("role", "from", "speaker", "author", "sender")
_SAID = ("content", "value", "text", "message", "utterance", "parts")
_PAIR_TURNS = (
    ("human", "assistant"), ("user", "assistant"), ("input", "output"), ("prompt", "response"), ("question", "answer"),
    ("query", "response"), ("instruction", "output"), ("human", "gpt"), ("user", "bot"), ("prompt", "completion"),
)  # fmt: skip


def check_media(value: Mapping[str, Any]) -> None:
    """Refuse a row whose columns hold pictures, sound or films: a model of text alone can't be shown them.

    Raises:
        RowRefused: It has such a column with something in it.
    """
    for name in () if MEDIA.isdisjoint(value) else sorted(value.keys() & MEDIA):
        if not value[name] or (isinstance(value.get("text"), str) and not _PLACEHOLDER.search(value["text"])):
            continue  # of raw text it is one more column that isn't read
        raise RowRefused(name, f"a column of {name.rstrip('s')}s; only text is trained on", "media")


class Standard(NamedTuple):
    """A row whose columns are named as its shape wants them."""

    shape: str
    row: Mapping[str, Any]
    read: frozenset[str]
    """The columns, as the file names them, that the shape is made of or may have beside."""
    fields: Mapping[str, str] = {}
    """Field of ``row`` to the file's column, where messages were made of columns."""


def standard_row(value: Mapping[str, Any], repairs: list[str]) -> Standard | None:
    """The row as one of the shapes that are read; None where no known shape fits.

    Args:
        value: A row.
        repairs: Takes the names of the rules that had to mend it.

    Raises:
        RowRefused: It is a known shape that can't be trained on as it is.
    """
    for name in _TURN_LISTS:
        if name in value and (made := _turn_list(name, value, repairs)) is not None:
            _check_answered(name, value)
            return made
    if "prompt" in value and "completion" in value:
        lists = {name: _turns(name, value[name]) for name in ("prompt", "completion") if _are_turns(value[name])}
        row, thought = (_with_system(value), set()) if lists else _with_thought(_with_system(value))
        return Standard("prompt-completion", {**row, **lists}, _BESIDE | thought | {"prompt", "completion"})
    if "instruction" in value and "output" in value:
        if not isinstance(value["instruction"], str):
            _refused(value)
        row, thought = _with_thought(_with_system(value))
        passage = next((name for name in _EXTRA if name in value), "input")
        read = _ALPACA | _BESIDE | thought | {passage}
        return Standard("alpaca", {**row, "input": value.get(passage)}, read, {"input": passage})
    for special in _SPECIAL:
        if (made := special(value)) is not None:
            return made
    return _pair(value) or _raw(value)


def _raw(value: Mapping[str, Any]) -> Standard | None:
    """Raw text, unless a column beside it may be what asks or answers."""
    if "text" not in value or any(value.get(name) for name in (*_QUESTIONS, *_REPLIES, "summary", "code")):
        return None
    return Standard("text", value, frozenset({"text"}))


def _with_system(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with a system text beside its turns under the name ``system``, and the tools of Bedrock and of
    OpenAI's older files as ``tools``."""
    if isinstance(config := value.get("toolConfig"), Mapping):
        value = {**value, "tools": config.get("tools")}
    if value.get("functions") and not value.get("tools"):
        value = {**value, "tools": value["functions"]}
    name = None if _SYSTEMS.isdisjoint(value) else next((name for name in _SYSTEM if value.get(name)), None)
    if name is None or (name == "system" and isinstance(value[name], str)):
        return value
    return {**value, "system": _text_of(value[name])}


def _with_thought(value: Mapping[str, Any]) -> tuple[Mapping[str, Any], set[str]]:
    """The row with the thought of its reply as ``reasoning_content``, and the name of the column that held it."""
    name = next((name for name in _THOUGHTS if value.get(name)), None)
    return ({**value, "reasoning_content": value[name]}, {name}) if name else (value, set())


def _text_of(value: Any) -> Any:
    """Text of an object or list that wraps one: Gemini's parts, Bedrock's list."""
    if isinstance(value, Mapping):
        return _text_of(value.get("parts", value.get("text", value.get("content"))))
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "text" in part for part in value):
        return "".join(str(part["text"]) for part in value)
    return value


# -- lists of turns ---------------------------------------------------------------------------------------------------


def _turn_list(name: str, value: Mapping[str, Any], repairs: list[str]) -> Standard | None:
    """The row whose turns stand in the list ``name``."""
    turns = value[name]
    if name == "messages" and _all_plain(turns):
        return Standard("messages", _with_system(value), _BESIDE_MESSAGES)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = from_text(name, turns, repairs)
        value = {**value, name: turns}
    if has_blocks(turns):
        turns = unfolded(turns)
        value = {**value, name: turns}
    read = _BESIDE | {name}
    if _has_other_turns(turns, texts=name != "messages"):
        return Standard("messages", {**_with_system(value), "messages": _turns(name, turns)}, read)
    if name == "messages" and not _is_sharegpt(turns):
        return Standard("messages", _with_system(value), read)
    if name in ("messages", "conversations", "conversation"):
        return Standard("sharegpt", _with_system(value), read)
    if not isinstance(turns, list) or not turns:
        return None
    if not all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns):
        return None
    return Standard("sharegpt", {**_with_system(value), "conversations": turns}, read)


def _check_answered(name: str, value: Mapping[str, Any]) -> None:
    """Refuse turns that end with a question where a column beside them may be its reply.

    Raises:
        RowRefused: It may be.
    """
    last = value[name][-1] if isinstance(value[name], list) and value[name] else None
    who = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
    reply = next((name for name in _REPLIES if isinstance(value.get(name), str) and value[name].strip()), None)
    if who in ("user", "human") and reply is not None:
        what = f"the turns end with a question, and {reply!r} may be its reply: {_flag('question', name)} takes it so"
        raise RowRefused(name, what)


def _all_plain(turns: Any) -> bool:
    """Whether all turns have a role and text, as those of most files: no other form needs to be looked for."""
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(type(turn) is dict and "role" in turn and type(turn.get("content")) is str for turn in turns)
    )


def _is_sharegpt(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "from" in first and "role" not in first


def _has_other_turns(turns: Any, *, texts: bool = True) -> bool:
    """Whether it is a list of turns of another form than role and content, or from and value.

    Args:
        turns: The list.
        texts: Turns may be texts: who speaks is told by their order.
    """
    if not isinstance(turns, list) or not turns:
        return False
    if all(isinstance(turn, Mapping) for turn in turns):
        if all("role" in turn and "content" in turn for turn in turns):  # what most files have, told at once
            return False
        return any(form(turns[0]) for form in (_pair_of, _spoken, _single))
    if all(isinstance(turn, str) for turn in turns):
        return texts
    return all(isinstance(turn, list) and len(turn) == 2 and isinstance(turn[0], str) for turn in turns)


def _turns(name: str, turns: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The turns as messages."""
    made: list[Mapping[str, Any]] = []
    for number, turn in enumerate(turns):
        if isinstance(turn, str):
            made.append({"role": ("user", "assistant")[number % 2], "content": turn})
        elif isinstance(turn, list):
            made += _asked_and_replied(*turn)
        elif (pair := _pair_of(turn)) is not None:
            if turn.get("system"):
                made.append({"role": "system", "content": turn["system"]})
            asked, replied = _asked_and_replied(turn[pair[0]], turn[pair[1]])
            made += [asked, {**_rest(turn, *pair, "system"), **replied}]
        elif (spoken := _spoken(turn)) is not None:
            made.append({**_rest(turn, *spoken), "role": turn[spoken[0]], "content": turn[spoken[1]]})
        elif (single := _single(turn)) is not None:
            made.append({"role": single, "content": turn[single]})
        elif "from" in turn and "value" in turn:
            made.append({**turn, "role": turn["from"], "content": turn["value"]})
        else:
            made.append(turn)
    return made


def _rest(turn: Mapping[str, Any], *read: str) -> dict[str, Any]:
    """What else a turn has."""
    return {key: item for key, item in turn.items() if key not in read}


def _are_turns(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _asked_and_replied(asked: Any, reply: Any) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]


def _pair_of(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a turn that holds a question and its reply."""
    if "role" in turn or "from" in turn:
        return None
    return next((pair for pair in _PAIR_TURNS if pair[0] in turn and pair[1] in turn), None)


def _spoken(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a turn that say who speaks and what, where they aren't role and content or from and value."""
    who = next((name for name in _WHO if name in turn), None)
    said = next((name for name in _SAID if name in turn), None)
    if who is None or said is None or (who, said) in (("role", "content"), ("from", "value")):
        return None
    return who, said


def _single(turn: Mapping[str, Any]) -> str | None:
    """The role of a turn of one key, the role's name."""
    name = next(iter(turn)) if len(turn) == 1 else ""
    return name if name in ("user", "assistant", "system", "human", "gpt", "bot") else None


# -- one question, one reply ------------------------------------------------------------------------------------------


def _pair(value: Mapping[str, Any]) -> Standard | None:
    """Messages of a row with one column for the question and one for the reply, under any names that are known."""
    names = {str(key).lower().strip(): key for key in value if value[key] is not None}
    if any(name in names for name in _CHOICES):
        return None
    found = _question_and_reply(names)
    if found is None:
        return None
    question, reply = found
    read = {names[question], names[reply], "tools", "history"}
    asked = value[names[question]]
    for name in _EXTRA:
        if name not in names or name == question or not (extra := value[names[name]]):
            continue
        if not isinstance(extra, str) or not isinstance(asked, str):
            raise RowRefused(str(names[name]), f"{kind_of(extra)} where text belongs", "not-text")
        asked = f"{asked}\n{extra}" if extra.strip() else asked
        read.add(names[name])
    messages: list[Mapping[str, Any]] = []
    history = value.get("history") or []
    if not isinstance(history, list):
        raise RowRefused("history", f"{kind_of(history)} where a list belongs")
    for number, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRefused(f"history[{number}]", "must be a pair: what the user said, what the assistant replied")
        messages += _asked_and_replied(*pair)
    fields = {}
    if _are_turns(asked):
        messages += _turns(names[question], asked)
    else:
        fields[f"messages[{len(messages)}].content"] = str(names[question])
        messages.append({"role": "user", "content": asked})
    fields[f"messages[{len(messages)}].content"] = str(names[reply])
    answer = {"role": "assistant", "content": value[names[reply]]}
    if (thought := next((names[name] for name in _THOUGHTS if name in names and value[names[name]]), None)) is not None:
        answer["reasoning_content"] = value[thought]
        read.add(thought)
    row: dict[str, Any] = {"messages": [*messages, answer], "tools": value.get("tools")}
    if (system := next((names[name] for name in _SYSTEM if name in names), None)) is not None:
        row["system"] = value[system]
        read.add(system)
    return Standard("question-answer", row, frozenset(read), fields)


def _question_and_reply(names: Mapping[str, Any]) -> tuple[str, str] | None:
    """The two columns' names in small letters, if there are just these two that it may be."""
    questions = [name for name in _QUESTIONS if name in names]
    if len(questions) > 1 and "input" in questions:
        questions.remove("input")
    replies = [name for name in _REPLIES if name in names]
    if replies == ["answer", "solution"]:
        replies = ["solution"]  # MATH and its kin: the answer is the solution's last line
    if len(questions) == len(replies) == 1:
        return questions[0], replies[0]
    pairs = [pair for pair in _OTHER_PAIRS if pair[0] in names and pair[1] in names]
    return pairs[0] if len(pairs) == 1 and not (questions and replies) else None


# -- shapes of single publishers --------------------------------------------------------------------------------------


def _moss(value: Mapping[str, Any]) -> Standard | None:
    """MOSS: ``chat`` of turn_1, turn_2, …, each of Human, Inner Thoughts, Commands, Tool Responses and MOSS; in its
    older files ``plain_text`` of ``[Human]: …<eoh> [MOSS]: …<eoa>``."""
    chat, plain = value.get("chat"), value.get("plain_text")
    if isinstance(plain, str) and "<eoh>" in plain:
        said = re.findall(r"\[(Human|MOSS)\]: (.*?)<eo[ah]>", plain, re.DOTALL)
        older = [{"role": "user" if who == "Human" else "assistant", "content": text} for who, text in said]
        return Standard("moss", {"messages": older, "system": value.get("prefix")}, frozenset({"plain_text", "prefix"}))
    if not isinstance(chat, Mapping) or "turn_1" not in chat or not _are_turns(list(chat.values())):
        return None
    messages = []
    for name in sorted(chat, key=lambda name: int(re.sub(r"\D", "", str(name)) or 0)):
        turn = {str(key).lower(): item for key, item in chat[name].items()}
        if _bare(turn.get("commands")):
            raise RowRefused(f"chat.{name}.Commands", "a call in MOSS's own notation, which isn't read", "tools")
        thought = _bare(turn.get("inner thoughts"))
        reply = {"role": "assistant", "content": _bare(turn.get("moss"))}
        messages.append({"role": "user", "content": _bare(turn.get("human"))})
        messages.append({**reply, **({"reasoning_content": thought} if thought else {})})
    row = {"messages": messages, "system": value.get("meta_instruction")}
    return Standard("moss", row, frozenset({"chat", "meta_instruction"}))


def _bare(text: Any) -> Any:
    """A text of MOSS's without the marks around it (``<|Human|>: …<eoh>``); empty where it says None."""
    if not isinstance(text, str):
        return text
    bare = re.sub(r"^<\|[^|]*\|>:\s*|\s*<eo[a-z]>\s*$", "", text.strip())
    return "" if bare == "None" else bare


def _tree(value: Mapping[str, Any]) -> Standard | None:
    """OASST: a tree of replies. The best-ranked reply is taken at each turn; a tree is one conversation."""
    node = value.get("prompt")
    if not isinstance(node, Mapping) or "replies" not in node:
        if {"message_id", "parent_id", "text", "role"} <= value.keys():
            what = "one message of a tree in each row; the file of whole trees (…trees.jsonl) is read"
            raise RowRefused("", what)
        return None
    messages = []
    while node is not None:
        role = "user" if node.get("role") == "prompter" else node.get("role")
        messages.append({"role": role, "content": node.get("text")})
        replies = node.get("replies")
        replies = replies if _are_turns(replies) else []
        replies = [reply for reply in replies if not reply.get("deleted")]
        node = min(replies, key=_rank, default=None)
    return Standard("tree", {"messages": messages}, frozenset({"prompt"}))


def _rank(reply: Mapping[str, Any]) -> float:
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) and rank == rank else float("inf")


def _instances(value: Mapping[str, Any]) -> Standard | None:
    """Self-instruct: ``instruction`` and ``instances`` of input and output, of which there is one."""
    instances = value.get("instances")
    if "instruction" not in value or not _are_turns(instances):
        return None
    if len(instances) > 1:
        raise RowRefused("instances", f"{len(instances)} examples of one instruction; give each a row of its own")
    row = {"instruction": value["instruction"], **instances[0]}
    return Standard("alpaca", row, frozenset({"instruction", "instances"})) if "output" in row else None


def _contents(value: Mapping[str, Any]) -> Standard | None:
    """Gemini and Vertex AI: ``contents`` of role and parts, ``systemInstruction``."""
    turns = value.get("contents")
    if not isinstance(turns, list) or not _has_other_turns(turns):
        return None
    row = {**_with_system(value), "messages": unfolded(_turns("contents", turns))}
    return Standard("messages", row, _BESIDE | {"contents"})


def _calls(value: Mapping[str, Any]) -> Standard | None:
    """xLAM: ``query``, ``tools``, and ``answers`` that are the calls."""
    if not {"query", "answers", "tools"} <= value.keys():
        return None
    reply = {"role": "function_call", "content": value["answers"]}
    messages = [{"role": "user", "content": value["query"]}, reply]
    row = {"messages": messages, "tools": value["tools"]}
    return Standard("question-answer", row, frozenset({"query", "answers", "tools"}))


def _refused(value: Mapping[str, Any]) -> None:
    """Shapes that are known, and why they can't be trained on."""
    if isinstance(value.get("input_ids"), list):
        raise RowRefused("input_ids", "the row is token ids already; give the text that they were made from")
    if isinstance(value.get("segments"), list):
        what = "segments with a mask of their own (axolotl's input_output); give the turns as messages"
        raise RowRefused("segments", what)
    if {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys():
        what = "one turn of a conversation in each row"
        raise RowRefused("", f"{what}; write a conversation a row, its turns in a list 'messages'")
    names = {str(name).lower() for name in value}
    if "question" in names and names & set(_CHOICES):
        what = "a multiple-choice question; write the choices into the question, and give the reply as text"
        raise RowRefused("", f"its columns ({listed(value)}) make {what}")
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], str)]
    if len(lists) > 1 and len({len(value[key]) for key in lists}) == 1:
        raise RowRefused("", f"its columns ({listed(value)}) hold lists: a whole table in one row; write a row a line")
    if value and all(isinstance(item, Mapping) and "0" in item for item in value.values()):
        what = f"its columns ({listed(value)}) hold numbered cells: pandas wrote the table by columns"
        raise RowRefused("", f"{what}; write it by to_json(…, orient='records', lines=True)")


_SPECIAL: tuple[Callable[[Mapping[str, Any]], Standard | None], ...] = (_moss, _tree, _instances, _contents, _calls)


# -- what to try ------------------------------------------------------------------------------------------------------


def unknown_shape(value: Mapping[str, Any]) -> RowRefused:
    """The refusal of a row of no known shape: its columns, and the ``--map`` to try.

    Raises:
        RowRefused: It is a known shape that can't be trained on, with that reason.
    """
    _refused(value)
    what = f"its columns ({listed(value)}) make no known shape"
    for name, item in itertools.islice(value.items(), _COLUMNS_COMPARED):
        near = _near(str(name)[:40].lower())
        if near is not None and near != name and isinstance(item, list) == (near in ("conversations", "messages")):
            return RowRefused("", f"{what}: did you mean {near!r} by {name!r}?")
    lists = [name for name, item in value.items() if _are_turns(item)]
    if lists:
        return RowRefused("", f"{what}; if {lists[0]!r} holds the turns, try {_flag('messages', lists[0])}")
    texts = {str(name).lower().strip(): name for name, item in value.items() if isinstance(item, str) and item.strip()}
    texts.pop("id", None)
    if len(texts) == 1:
        return RowRefused("", f"{what}; as raw text: {_flag('text', *texts.values())}")
    for name in _SYSTEM:
        texts.pop(name.lower(), None)  # neither question nor reply
    if not texts:
        return RowRefused("", what)
    if len(texts) == 1 and (said := next(iter(texts))) in _TURN_LISTS:
        turns = f"{texts[said]!r} is one text of several turns; write them as a list 'messages' of role and content"
        return RowRefused("", f"{what}: {turns}")
    asked = next((texts.pop(name) for name in _QUESTIONS if name in texts), None)
    reply = next((texts.pop(name) for name in _REPLIES if name in texts), None)
    extra = next((texts.pop(name) for name in _EXTRA if name in texts), None) if asked or reply else None
    left = list(texts.values())
    if len(left) == (asked is None) + (reply is None):
        asked, reply = asked or left.pop(0), reply or left.pop(0)
    flags = [_flag("instruction", asked or "COLUMN"), _flag("output", reply or "COLUMN")]
    flags += [_flag("input", extra)] if extra else []
    raw = "; as raw text: --format text" if "text" in value else ""
    return RowRefused("", f"{what}; say which columns hold question and reply: {' '.join(flags)}{raw}")


@functools.lru_cache(4096)
def _near(name: str) -> str | None:
    """The known column that somebody may have meant; kept, as every row of a file has the same names."""
    known = ["instruction", "output", "conversations", "messages", "prompt", "completion", "text"]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)


def _flag(field: str, column: Any) -> str:
    return f"--map {shlex.quote(f'{field}={column}')}"
