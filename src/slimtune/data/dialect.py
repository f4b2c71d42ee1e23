"""What one chat template can do, found out by asking it, once: which turns it shows and in which form it takes them,
what it puts around thoughts, and what ends a reply.

The questions hold words that stand nowhere else (``qz…``), and the answers are read off from where these words come
out. Nothing is known of any template by its name.

:meth:`Dialect.reply` is what the mask is made of. The model is asked with a prompt, and has to write what the template
shows of the reply when it is the last turn: from the prompt's end to the end mark. Three things can be in the way:

- The prompt opens a thought, or writes an empty one, that the template leaves out of the reply's turn. What the prompt
  holds more, and what the turn holds instead of it, are known from the questions.
- The template closes a reply by the mark of the next speaker, which isn't there while nobody has spoken. The model
  stops with that mark, so it is written.
- The template shows the system turn only in prompts (Mistral Nemo).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from slimtune.data.conversation import SYSTEM_ROLES, Message, RowRefused
from slimtune.data.fit import (
    CallStyle,
    ThoughtStyle,
    call_as_text,
    inner_text,
    merged,
    same_in_a_row,
    system_into_user,
    systems_joined,
    tools_as_text,
    with_calls,
    with_parts,
    with_thought,
)
from slimtune.data.guard import Guard
from slimtune.data.template import ChatTemplate, TemplateRefused, common_length
from slimtune.data.tokens import TokenEncoder
from slimtune.errors import UserError

__all__ = ["Dialect", "Reply"]

Tools = list[dict[str, Any]] | None

_ASK: Message = {"role": "user", "content": "qzuser"}
_ANSWER: Message = {"role": "assistant", "content": "qzreply"}
_NEXT: Message = {"role": "user", "content": "qznext"}
_THOUGHTFUL: Message = {**_ANSWER, "reasoning_content": "qzthought"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "qztool",
        "description": "qzdoes",
        "parameters": {"type": "object", "properties": {"qzarg": {"type": "string", "description": "qzabout"}}},
    },
}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00000", "type": "function", "function": {"name": "qztool", "arguments": {"qzarg": "qzvalue"}}}
    ],
}
_RESULT: Message = {"role": "tool", "content": "qzresult", "name": "qztool", "tool_call_id": "call00000"}

_TAG = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")
_THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
_COMMON_THOUGHT = ("<think>", "</think>", "\n</think>\n\n")
"""What a thought is taken to be written in where a prompt opens one and the template shows none (DeepSeek-R1)."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a reply ends."""

    mark: str
    """The control token that the model stops with."""
    bare: str = ""
    added: str = ""
    """Where the mark is the next speaker's: what stands behind the last reply, and what behind one that is followed."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What a prompt ends with that the reply's turn doesn't have."""

    written: str
    empty: str
    """What the turn has instead of it where it holds no thought."""
    opens: bool
    """Whether a thought is open at the prompt's end; else it was closed again, empty."""


@dataclass(slots=True)
class Reply:
    """A reply as the model has to write it."""

    prompt: str
    """What it is asked with."""
    text: str
    """What it has to write, with the end mark."""
    rest: str = ""
    """What the template writes behind it."""
    notes: list[str] = field(default_factory=list)


class Dialect:
    """One template with one setting of its variables.

    Args:
        template: The compiled template.
        encoder: Knows which texts are control tokens.
        stops: Ids that the model's generation config names as ends; they decide which of several marks ends a reply.
        with_tools: The template is for conversations with tools alone.

    Raises:
        TemplateRefused: It can't render a question and its answer, or ends no reply with a control token.
        UserError: It writes a token that the tokenizer takes for control only in some places.
    """

    def __init__(
        self, template: ChatTemplate, encoder: TokenEncoder, stops: Collection[int] = (), *, with_tools: bool = False
    ) -> None:
        self._plain_tools: Tools = [_TOOL] if with_tools else None
        self.template, self._encoder, self._stops = template, encoder, frozenset(stops)
        self._parts = False
        if not self._renders():
            self._parts = True
            if not self._renders():
                self._parts = False
                self.text([_ASK, _ANSWER], self._plain_tools)  # says why, if it can
                raise TemplateRefused("it leaves out or changes what the user or the assistant said")
        self.text([_ASK], self._plain_tools, prompt=True)
        end = self._ending([_ASK], _ANSWER, _NEXT, None)
        if end is None:
            raise TemplateRefused(
                "it ends no reply with a control token, so a model trained on it never learns to stop"
            )
        self._end = end
        self._roles: dict[tuple[str, ...], bool] = {}
        system: Message = {"role": "system", "content": "qzsystem"}
        self._system_in_prompt = not self._shows(("system",)) and "qzsystem" in (
            self._try([system, _ASK], prompt=True) or ""
        )
        twice = self._try([_ASK, {"role": "user", "content": "qzagain"}, _ANSWER])
        self._alternates = twice is None or "qzagain" not in twice
        self._thoughts = self._find_thoughts()
        self.guard = Guard(encoder, template.source, self._thought_marks())

    # -- asking -------------------------------------------------------------------------------------------------------

    def text(self, messages: list[Message], tools: Tools, *, prompt: bool = False) -> str:
        """The messages as the template renders them, with the generation prompt if it is a prompt.

        Raises:
            TemplateRefused: The template doesn't take them.
        """
        if self._parts:
            messages = [with_parts(message) for message in messages]
        return self.template.render(messages, tools, add_generation_prompt=prompt)

    def _try(self, messages: list[Message], tools: Tools = None, *, prompt: bool = False) -> str | None:
        try:
            return self.text(messages, tools or self._plain_tools, prompt=prompt)
        except TemplateRefused:
            return None

    def _renders(self) -> bool:
        text = self._try([_ASK, _ANSWER]) or ""
        if wavering := sorted(token for token in self._encoder.wavering if token in text):
            raise UserError(
                f"the tokenizer reads {wavering[0]!r} as a control token in some places and as text in others",
                rule="The chat template writes it, and it has normalized: true beside a normaliser that adds a space.",
                way_out='Set "normalized": false for it in tokenizer.json.',
            )
        as_they_are = self._parts and re.search(r"""['"]type['"]""", text)  # parts written down, not their text
        return "qzuser" in text and "qzreply" in text and not as_they_are

    def _shows(self, roles: tuple[str, ...]) -> bool:
        """Whether turns of these roles at the beginning are all shown."""
        if roles not in self._roles:
            heads = [{"role": role, "content": f"qzhead{number}x"} for number, role in enumerate(roles)]
            text = self._try([*heads, _ASK, _ANSWER]) or ""
            self._roles[roles] = all(head["content"] in text for head in heads)
        return self._roles[roles]

    def _ending(self, before: list[Message], reply: Message, follow: Message, tools: Tools) -> Ending | None:
        """What ends a reply: the last control token that stands behind it whether or not a turn follows; else the
        first behind it when it is the last; else the next speaker's, when a turn follows."""
        whole = self._try([*before, reply], tools)
        if whole is None:
            return None
        words = ("qzreply",) if reply is _ANSWER else ("qztool", "qzarg", "qzvalue")
        last = max((whole.rindex(word) + len(word) for word in words if word in whole), default=len(whole))
        after, behind = whole[last:], ""
        longer = self._try([*before, reply, follow], tools)
        if longer is not None and str(follow["content"]) in longer:
            until = longer.index(str(follow["content"]))
            begin = last if longer.startswith(whole[:last]) else _last_end(longer[:until], words)
            behind = longer[begin:until]
        kept = common_length(after, behind)
        found = self._end_marks(after)
        named = [mark for mark in found if self._encoder.controls[mark[0]] in self._stops]
        shared = [mark for mark in found if mark.end() <= kept]
        if len(shared) > 1 and self._always_opens(before, tools, after[kept:].strip()):
            del shared[-1]
        if mark := next(iter(named), None) or next(reversed(shared), None) or next(iter(found), None):
            return Ending(mark[0])
        if (mark := next(iter(self._end_marks(behind)), None)) and behind[: mark.start()].strip() == after.strip():
            kept = common_length(after, behind)
            return Ending(mark[0], after[kept:], behind[kept : mark.end()])
        return None

    def _always_opens(self, before: list[Message], tools: Tools, rest: str) -> bool:
        """Whether the template writes the next reply's header behind all conversations, asked for or not. ``rest`` is
        what stands there and nowhere else; the mark in front of it opens a turn and ends none."""
        return bool(rest) and all(
            (self._try(before, tools, prompt=asked) or "").rstrip().endswith(rest) for asked in (False, True)
        )

    def _end_marks(self, text: str) -> list[re.Match[str]]:
        controls, special = self._encoder.controls, self._encoder.special
        return [f for f in self._encoder.pattern.finditer(text) if f[0] in special or controls[f[0]] in self._stops]

    # -- thoughts -----------------------------------------------------------------------------------------------------

    def _find_thoughts(self) -> tuple[ThoughtStyle, str, str, str] | None:
        """(how the template takes thoughts, what opens one, what closes it, all that stands between it and the reply),
        or None if it shows none."""
        styles: tuple[ThoughtStyle, ...] = ("keys", "all keys", "parts", "nested parts")
        for style in styles:
            text = self._try([_ASK, with_thought(_THOUGHTFUL, style)]) or ""
            if "{'" in text or "[{" in text or "qzthought" not in text or "qzreply" not in text:
                continue
            at = text.index("qzthought")
            between = text[at + len("qzthought") : text.rindex("qzreply")]
            return style, self._last_mark(text[:at]), self._first_mark(between), between
        return None

    def _last_mark(self, text: str) -> str:
        text = text.rstrip()
        found = list(self._encoder.pattern.finditer(text))
        if found and not re.search(r"\s", text[found[-1].end() :]):
            return text[found[-1].start() :]
        return re.findall(r"\S*$", text)[0] if text else ""

    def _first_mark(self, text: str) -> str:
        text = text.lstrip()
        found = self._encoder.pattern.match(text) or re.match(r"\S*", text)
        return found[0] if found else ""

    def _thought_marks(self) -> set[str]:
        """Control tokens that are there for thoughts alone."""
        if self._thoughts is None:
            return set()
        plain = self._try([_ASK, _ANSWER, _NEXT, _ANSWER]) or ""
        return {mark for mark in self._thoughts[1:3] if mark and mark not in plain}

    @cached_property
    def _openings(self) -> list[Opening]:
        """What prompts may end with that the reply's turn doesn't have."""
        made: dict[str, Opening] = {}
        contexts: list[tuple[list[Message], Tools]] = [([_ASK], None)]
        if self.calls is not None:
            call = with_calls(_CALL, self.calls)
            contexts += [([_ASK], [_TOOL]), ([_ASK, call, _RESULT], [_TOOL])]
        for before, tools in contexts:
            replies = [_ANSWER, self._with_thought(_THOUGHTFUL)]
            if tools and self.calls is not None:
                replies.append(with_calls(_CALL, self.calls))
            for reply in replies:
                if (found := self._opening(before, reply, tools)) is not None:
                    made.setdefault(found.written, found)
        return sorted(made.values(), key=lambda opening: len(opening.written))

    def _opening(self, before: list[Message], reply: Message, tools: Tools) -> Opening | None:
        prompt, whole = self._try(before, tools, prompt=True), self._try([*before, reply], tools)
        if prompt is None or whole is None or whole.startswith(prompt):
            return None
        at = self._apart(prompt, whole)
        written = prompt[at:]
        word = next((word for word in ("qzthought", "qzreply", "qztool") if word in whole[at:]), "")
        if "qz" in written or not word:
            return None
        begins = whole[at : whole.index(word, at)]
        thought = self._thoughts[1:3] if self._thoughts is not None else _COMMON_THOUGHT[:2]
        marks = set(self._marks_in(written)) - set(self._marks_in("".join(thought)))
        if marks & set(self._marks_in(begins)):
            return None  # the same marks in another place: nothing that one has and the other lacks
        if len(marks) == 1 and next(iter(marks)) not in whole[:at]:
            return None  # something is opened that no turn shows: what should follow can't be known
        generation = prompt[common_length(prompt, self._try(before, tools) or "") :]
        closes = (self._thoughts[1:] if self._thoughts is not None else _COMMON_THOUGHT)[1]
        empty = begins if word == "qzreply" else ""
        if word == "qztool" and closes in begins:
            empty = begins[: begins.index(closes) + len(closes)]
        return Opening(written, empty, self._is_open(generation))

    def _apart(self, prompt: str, whole: str) -> int:
        """Where prompt and turn part, in front of the mark that they part in."""
        at = common_length(prompt, whole)
        for text in (prompt, whole):
            for pattern in (self._encoder.pattern, _TAG):
                at = next((f.start() for f in pattern.finditer(text) if f.start() < at < f.end()), at)
        return at

    def _marks_in(self, text: str) -> list[str]:
        return [*(found[0] for found in self._encoder.pattern.finditer(text)), *_TAG.findall(text)]

    def _is_open(self, generation: str) -> bool:
        opens, closes, _ = self._thoughts[1:] if self._thoughts is not None else _COMMON_THOUGHT
        return generation.rfind(opens) > generation.rfind(closes)

    @cached_property
    def _held_marks(self) -> tuple[str, str] | None:
        """The marks of thoughts inside replies that aren't left there: the common ones where the template has others,
        else its own where such a reply would get a second, empty thought; None if it can stay."""
        if self._thoughts is None or not all(self._thoughts[1:3]):
            return None
        _, opens, closes, _ = self._thoughts
        if closes != _COMMON_THOUGHT[1]:
            return _COMMON_THOUGHT[:2]
        held = self._try([_ASK, {**_ANSWER, "content": f"{opens}\nqzthought\n{closes}\n\nqzreply"}]) or ""
        handed_on = self._try([_ASK, self._with_thought(_THOUGHTFUL)]) or ""
        return (opens, closes) if "qzthought" in held and held.count(closes) > handed_on.count(closes) else None

    def _with_thought(self, message: Message) -> Message:
        return with_thought(message, self._thoughts[0] if self._thoughts is not None else "keys")

    # -- tools --------------------------------------------------------------------------------------------------------

    @cached_property
    def lists_tools(self) -> bool:
        """Whether the template shows which tools there are."""
        shown = self._try([_ASK, _ANSWER], [_TOOL]) or ""
        asked = self._try([_ASK], [_TOOL], prompt=True) or ""
        return any("qztool" in text and "qzarg" in text for text in (shown, asked))

    @cached_property
    def calls(self) -> CallStyle | None:
        """How the template takes calls and results, or None if it doesn't show them whole."""
        return self._calls_and_end[0]

    @cached_property
    def _calls_and_end(self) -> tuple[CallStyle | None, Ending | None]:
        for style in (CallStyle(n, t) for t in (False, True) for n in (False, True)):
            call = with_calls(_CALL, style)
            asked = self._try([_ASK], [_TOOL], prompt=True)
            called = self._try([_ASK, call], [_TOOL])
            answered = self._try([_ASK, call, _RESULT], [_TOOL], prompt=True)
            whole = self._try([_ASK, call, _RESULT, _ANSWER], [_TOOL])
            if asked is None or called is None or answered is None or whole is None:
                continue
            written = called[common_length(asked, called) :]
            if "None" in written or "{'" in written or '\\"qzarg' in written:
                continue
            if not all(word in written for word in ("qztool", "qzarg", "qzvalue")) or "qzresult" not in answered:
                continue
            end = self._ending([_ASK], call, {**_RESULT, "name": "other"}, [_TOOL])
            if "qzreply" in whole and end is not None:
                return style, end
        return None, None

    @property
    def end_marks(self) -> tuple[str, ...]:
        """The control tokens that end replies, the common one first."""
        call = self._calls_and_end[1]
        return tuple(dict.fromkeys([self._end.mark, *([call.mark] if call is not None else [])]))

    # -- conversations ------------------------------------------------------------------------------------------------

    def fitted(
        self, messages: list[Message], tools: list[dict[str, Any]], notes: list[str]
    ) -> tuple[list[Message], Tools, list[str]]:
        """Messages and tools as this template takes them, and the repairs that this took; what else was found goes to
        the notes.

        Raises:
            RowRefused: They can't be brought into that form.
        """
        repairs: list[str] = []
        calls = any("tool_calls" in message or message["role"] == "tool" for message in messages)
        if tools and not (self.lists_tools and (self.calls is not None or not calls)):
            messages, tools, calls = tools_as_text([call_as_text(m) for m in messages], tools), [], False
            repairs.append("tools-as-text")
        if calls:
            if self.calls is None:
                messages = [call_as_text(message) for message in messages]
                repairs.append("tools-as-text")
            else:
                messages = [with_calls(message, self.calls) for message in messages]
        messages = self._with_system(messages, repairs)
        if self._alternates and same_in_a_row(messages):
            messages = merged(messages)
            repairs.append("merged-turns")
        if held := self._held_marks:
            before, messages = messages, [_thought_taken_out(message, *held) for message in messages]
            if messages != before and self._thoughts is not None and held[1] != self._thoughts[2]:
                notes.append("thought-moved")
        if any("reasoning_content" in message for message in messages):
            messages = [self._with_thought(message) for message in messages]
        return messages, tools or None, repairs

    def _with_system(self, messages: list[Message], repairs: list[str]) -> list[Message]:
        if not self._shows(("developer",)):
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        roles: tuple[str, ...] = ()
        for message in messages:
            if message["role"] not in SYSTEM_ROLES:
                break
            roles += (message["role"],)
        if not roles or self._shows(roles):
            return messages
        if len(roles) > 1:
            messages = systems_joined(messages)
            repairs.append("merged-turns")
        if not self._shows((messages[0]["role"],)) and not self._system_in_prompt:
            messages = system_into_user(messages)
            repairs.append("system-into-user")
        return messages

    def reply(self, messages: list[Message], tools: Tools) -> Reply:
        """The reply that the messages end with, as the model has to write it behind its prompt.

        Raises:
            TemplateRefused: The template doesn't take the messages.
            RowRefused: What the model would have to write can't be told from what the template renders.
        """
        before, message = messages[:-1], messages[-1]
        prompt = self.text(before, tools, prompt=True)
        whole = self.text(messages, tools)
        if whole.startswith(prompt):
            return self._ended(prompt, whole[len(prompt) :], messages)
        if self._system_in_prompt and messages[0]["role"] in SYSTEM_ROLES:
            bare = self.reply(messages[1:], tools)
            return Reply(prompt, bare.text, bare.rest, ["as-asked"])
        for opening in self._openings:
            head = prompt[: len(prompt) - len(opening.written)]
            if not prompt.endswith(opening.written) or not whole.startswith(head):
                continue
            if opening.opens:
                made = self._ended(prompt, self._thought_closed(whole[len(head) :], message, opening), messages)
                return replace(made, notes=["thought-opened"])
            closed = any(closes in opening.written for closes in self._closes)
            if closed and (bare_message := self._thoughtless(message)) != message:
                made = self.reply([*before, bare_message], tools)
            elif (turn := _behind(opening.empty, whole[len(head) :])) is not None:
                made = self._ended(prompt, turn, messages)
            else:
                continue
            return replace(made, prompt=prompt, notes=["as-asked"])
        what = "the template's generation prompt is no prefix of its training text"
        raise RowRefused("", f"turn {len(messages)}: {what}", "template")

    def _thought_closed(self, turn: str, message: Message, opening: Opening) -> str:
        """What is written behind a prompt that opens a thought: the turn if it closes one, else the thought in front of
        it."""
        opens, closes, close = self._thoughts[1:] if self._thoughts is not None else _COMMON_THOUGHT
        content = str(message.get("content") or "")
        inside, _, said = content.rpartition(closes)
        if closes in turn and (not said or turn.index(closes) < turn.rfind(said.strip())):
            return turn
        thought = str(message.get("reasoning_content") or "") or inside.split(opens)[-1]
        reply = turn.lstrip()
        indent = "" if closes in content else content[: len(content) - len(content.lstrip())]
        if turn.removesuffix(reply).endswith(indent):
            reply = indent + reply  # the reply's own, where the white space before it is the template's
        return f"{thought.strip()}{close.removesuffix(opening.empty)}{reply}"

    @property
    def _closes(self) -> set[str]:
        """What may close a thought: the common mark and the template's own."""
        own = self._thoughts[2] if self._thoughts is not None else ""
        return {_COMMON_THOUGHT[1], own or _COMMON_THOUGHT[1]}

    def _thoughtless(self, message: Message) -> Message:
        """The message without its thought, wherever it stands in it."""
        made = {key: value for key, value in message.items() if key not in _THOUGHT_KEYS}
        if isinstance(content := made.get("content"), list):
            content = inner_text(content, "text")
        closes = (self._thoughts[1:] if self._thoughts is not None else _COMMON_THOUGHT)[1]
        if content and closes in content:
            content = content.rpartition(closes)[2].lstrip()
        return {**made, "content": content} if content != made.get("content") else made

    def check_end(self, reply: Reply, turn: int, *, calls: bool) -> None:
        """Check that nothing inside a reply stops the model before its end.

        Raises:
            RowRefused: An end mark stands there, and the template goes on behind it.
        """
        # What ends text may part it from calls (GigaChat 3), unless the model is said to stop there.
        ends, controls = () if calls else self.end_marks, self._encoder.controls
        pattern, text = self._encoder.pattern, reply.text
        first = pattern.search(text)
        if first is None or first.end() == len(text):
            return
        # Where marks alone follow, nothing is lost by stopping at the first (Apriel's <|end|></s>).
        found = [f[0] for f in pattern.finditer(text) if pattern.sub("", text[f.end() :]).strip()]
        between = self._thoughts[3] if self._thoughts is not None else ""
        for mark in dict.fromkeys(found):
            stops = mark in ends or controls[mark] in self._stops
            if stops and found.count(mark) > between.count(mark):  # some close a thought with it (Solar Open)
                what = f"an end mark ({mark}) stands inside the reply, where the model would stop"
                raise RowRefused("", f"turn {turn}: {what}", "template")

    def leaves_thought(self, reply: Reply, messages: list[Message], tools: Tools) -> bool:
        """Whether the template leaves out the thought of the reply that the messages end with.

        Raises:
            RowRefused: It is there, but not as it was written.
        """
        message, at = messages[-1], len(messages)
        content: Any = message.get("content") or ""
        thought = str(message.get("reasoning_content") or "")
        if isinstance(content, list):
            content, thought = inner_text(content, "text"), inner_text(content, "thinking")
        kept = thought.strip() in reply.text
        opens, closes, _ = _COMMON_THOUGHT
        if closes in content and content.strip() not in reply.text:
            inside, _, said = content.rpartition(closes)
            front, _, thought = inside.rpartition(opens)
            if front.strip() not in reply.text:
                raise RowRefused("", f"turn {at}: the template leaves out what stands before a thought", "template")
            kept = self._stands(thought.strip(), said.strip(), reply.text)
        if kept:
            return False
        bare = self.reply([*messages[:-1], self._thoughtless(message)], tools)
        if "".join(bare.text.split()) != "".join(reply.text.split()):
            raise RowRefused("", f"turn {at}: the template changes the reply's thought or its marks", "template")
        return bool(thought.strip())

    def _stands(self, thought: str, said: str, text: str) -> bool:
        """Whether a thought and what is said behind it stand in a text in marks of thoughts, up to white space."""
        ways = [(_COMMON_THOUGHT[0], _COMMON_THOUGHT[1])]
        if self._thoughts is not None:
            ways.append((self._thoughts[1], self._thoughts[3]))
        for opens, between in ways:
            behind = r"\s*".join(map(re.escape, between.split()))
            if re.search(rf"(?:^|{re.escape(opens)})\s*{re.escape(thought)}\s*{behind}\s*{re.escape(said)}", text):
                return True
        return False

    def _ended(self, prompt: str, turn: str, messages: list[Message]) -> Reply:
        """The reply with its end, which is behind everything that somebody wrote."""
        message = messages[-1]
        end = self._calls_and_end[1] if message.get("tool_calls") else self._end
        assert end is not None  # calls are shown only where it is known
        if end.added:
            return Reply(prompt, turn[: len(turn) - len(end.bare)] + end.added)
        ends = [found.end() for found in self._encoder.pattern.finditer(turn) if found[0] == end.mark]
        if not ends:
            raise RowRefused(
                "", f"turn {len(messages)}: the template doesn't end the reply with {end.mark}", "template"
            )
        return Reply(prompt, turn[: ends[-1]], turn[ends[-1] :])


def _thought_taken_out(message: Message, opens: str, closes: str) -> Message:
    """A reply that begins with a thought in these marks, with that as its thought."""
    content = message.get("content")
    if message["role"] != "assistant" or message.get("reasoning_content") or not isinstance(content, str):
        return message
    inside, found, said = content.lstrip().partition(closes)
    if not found or not inside.startswith(opens):
        return message
    made = {**message, "content": said.lstrip("\n")}
    thought = inside[len(opens) :].strip()
    return {**made, "reasoning_content": thought} if thought else made


def _behind(empty: str, turn: str) -> str | None:
    """A turn without what it holds instead of a thought, None if it begins otherwise; the white space behind that is
    the template's whim."""
    if turn.startswith(empty):
        return turn[len(empty) :]
    mark = empty.strip()
    if mark and not turn.lstrip().startswith(mark):
        return None
    return turn.lstrip()[len(mark) :].lstrip() if mark else turn


def _last_end(text: str, words: tuple[str, ...]) -> int:
    return max((text.rindex(word) + len(word) for word in words if word in text), default=len(text))
