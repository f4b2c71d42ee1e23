"""A conversation to ids and supervised mask, by the tokenizer's chat template, with the mask derived and checked.

How the mask comes about: for each reply the turns before it are rendered with the generation prompt, and what the model
has to write behind it is worked out (:mod:`slimtune.data.dialect`). Where both stand as they are in the text of the
conversation up to its last reply, the reply is supervised there; a reply that the template shows differently once turns
follow becomes a document of its own. The text is cut where replies begin before it is encoded, so the ids that a model
is asked with (:func:`prompt_ids`) are always a prefix of the ids that it was trained on.

Control tokens in people's text are marked before the template sees them and stay text.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimtune.config import Config, did_you_mean
from slimtune.data.conversation import NONCHARACTER, Conversation, Message, RowRefused, read_messages, read_tools
from slimtune.data.dialect import Dialect, Reply, Tools
from slimtune.data.fit import inner_text
from slimtune.data.stops import named_stops
from slimtune.data.template import ChatTemplate, TemplateRefused
from slimtune.data.tokens import Piece, TokenEncoder
from slimtune.errors import UserError

__all__ = ["NOTES", "ChatRenderer", "Draft", "Manner", "learnt", "prompt_ids", "renderer_for", "writes_date"]

NOTES: dict[str, str] = {
    "thoughts-left-out": "the template leaves a reply's thoughts out",
    "indent-lost": "the template takes the white space off a reply's first line",
    "text-changed": "the template changes the text of a tool's result",
    "python-values": "the template writes null, true or false in a call as Python does (None, True, False)",
    "as-asked": "the template's training text isn't what it asks with: the reply was put behind what it asks with",
    "thought-moved": "a thought inside a reply (<think>) was written in the template's own marks",
    "thought-opened": "the template's prompt opens a thought that its training text lacks: the thought was written in",
    "own-document": "a reply became a document of its own: the template renders it differently once turns follow",
    "unsupervised-reply": "a reply is shown, not learnt, as the row says (weight: 0, train: false, loss: false)",
    "unknown-variables": "the row sets variables that the template doesn't use",
    "control-text": "control-token text in a turn was kept as text",
    "bos-added": "the template writes no BOS but the tokenizer adds one: it was added",
    "bos-doubled": "the template wrote more than one BOS: one was kept",
}
"""What the renderer may find in a row, by the name that is counted."""

_KEPT_DIALECTS = 64
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


@dataclass(frozen=True)
class Manner:
    """How conversations are rendered beside what tokenizer and template say: a run's own, recorded with it."""

    allow_control_tokens: bool = False
    """Let control-token text inside content become control tokens."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the template's variables are set to (``enable_thinking`` and its like)."""
    today: date | None = None
    """The date that the template writes; today's if None."""

    @classmethod
    def of(cls, config: Config) -> Manner:
        """The manner of a run."""
        return cls(config.allow_control_tokens, config.template_vars, config.date)

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Manner:
        """The manner of a run whose config was recorded as plain values; of an older run's, what it had."""
        today = values.get("date")
        return cls(
            bool(values.get("allow_control_tokens")),
            values.get("template_vars") or {},
            date.fromisoformat(today) if today else None,
        )

    @property
    def key(self) -> str:
        """The same for equal manners."""
        return json.dumps([self.allow_control_tokens, self.variables, str(self.today)], sort_keys=True, default=str)


@dataclass(slots=True)
class Draft:
    """One document before it is encoded: its pieces, and how many replies in it are supervised."""

    pieces: list[Piece]
    replies: int = 0
    notes: list[str] = field(default_factory=list)


class ChatRenderer:
    """Renders conversations for one tokenizer and one chat template.

    Args:
        tokenizer: The tokenizer; its ``chat_template`` is used, of named ones ``tool_use`` where there are tools and
            ``default`` else, as Transformers does.
        manner: The rest.

    Raises:
        UserError: The template is invalid, can't render a question and its answer, or ends no reply with a control
            token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, manner: Manner | None = None) -> None:
        self.encoder = TokenEncoder(tokenizer)
        self.manner = manner or Manner()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self._begin = _put_before(tokenizer)
        self.adds_bos = self.bos_id is not None and self._begin[:1] == [self.bos_id]
        source = tokenizer.chat_template
        self._sources: dict[str, str] = source if isinstance(source, dict) else {"default": source} if source else {}
        self._special_texts = dict(tokenizer.special_tokens_map)
        self._dialects: dict[tuple[str, str], Dialect] = {}
        self.named_stops = named_stops(tokenizer)
        if self._sources:
            try:
                self._dialect(False, self.manner.variables)
            except TemplateRefused as error:
                raise _bad_template(str(error)) from None
            self._check_variables()

    @property
    def variables(self) -> set[str]:
        """The variables that stand in the template, of named ones in any."""
        return set().union(*(ChatTemplate(source, {}).names for source in self._sources.values()))

    def _check_variables(self) -> None:
        if not self.manner.variables:
            return
        names = self.variables
        unknown = sorted(self.manner.variables.keys() - names)
        if unknown:
            raise UserError(
                f"the chat template has no variable {unknown[0]!r}",
                rule=did_you_mean(unknown[0], sorted(names)),
                way_out="Leave it out of --template-vars.",
            )

    def _dialect(self, with_tools: bool, variables: Mapping[str, Any]) -> Dialect:
        """The dialect for a conversation with or without tools.

        Raises:
            TemplateRefused: The template can't be used with these variables.
        """
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise TemplateRefused(f"none of the named templates ({', '.join(self._sources)}) is called default")
        key = name, json.dumps(variables, sort_keys=True, default=str) if variables else ""
        if key not in self._dialects:
            if reserved := _RESERVED & variables.keys():
                raise TemplateRefused(f"{min(reserved)} is no variable of its own to set")
            if len(self._dialects) >= _KEPT_DIALECTS:
                del self._dialects[next(iter(self._dialects))]
            template = ChatTemplate(self._sources[name], {**self._special_texts, **variables}, self.manner.today)
            self._dialects[key] = Dialect(template, self.encoder, self.named_stops, with_tools=name == "tool_use")
        return self._dialects[key]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids of the control tokens that end replies, the common one first; without a template, the end of text."""
        if not self._sources:
            return () if self.eos_id is None else (self.eos_id,)
        marks: dict[str, None] = {}
        for with_tools in (False, True):
            marks.update(dict.fromkeys(self._dialect(with_tools, self.manner.variables).end_marks))
        return tuple(self.encoder.controls[mark] for mark in marks)

    def text(self, messages: list[Message], *, prompt: bool = False) -> str:
        """Messages in normal form as the template renders them, with nothing changed and nothing checked.

        Raises:
            TemplateRefused: The template doesn't take them.
        """
        return self._dialect(False, self.manner.variables).text(messages, None, prompt=prompt)

    # -- conversations ------------------------------------------------------------------------------------------------

    def drafts(self, conversation: Conversation, train_on: str = "assistant") -> list[Draft]:
        """The documents of a conversation; the last is the conversation itself.

        Args:
            conversation: A row in normal form. The rules that had to change it are added to its ``repairs``.
            train_on: ``assistant``, ``last``, ``all`` or ``completion``.

        Raises:
            RowRefused: The template refuses the row, or a reply in it can't be proven.
            UserError: The row is a conversation and the tokenizer has no chat template.
        """
        if conversation.text is not None:
            return [self._raw(conversation.text, self.manner.allow_control_tokens or conversation.rendered)]
        notes: list[str] = []
        row = conversation
        if conversation.completion_from and train_on in ("assistant", "completion"):
            row = replace(conversation, messages=learnt(conversation, train_on))
        try:
            dialect, messages, tools = self._prepared(row, notes)
            return self._chat_drafts(conversation, dialect, messages, tools, notes, train_on)
        except TemplateRefused as error:
            raise RowRefused("", f"the chat template refuses it: {error}", "template") from None

    def _chat_drafts(
        self,
        conversation: Conversation,
        dialect: Dialect,
        messages: list[Message],
        tools: Tools,
        notes: list[str],
        train_on: str,
    ) -> list[Draft]:
        replies = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [at for at in _meant(conversation, replies, train_on) if messages[at].get("supervised", True)]
        said = [message for message in conversation.messages if message["role"] == "assistant"]
        if not all(message.get("supervised", True) for message in said):
            notes.append("unsupervised-reply")
        if not wanted:
            raise RowRefused("", "no reply is left to learn", "nothing-to-learn")
        last = replies[-1] if train_on == "all" else wanted[-1]
        written = {at: dialect.reply(messages[: at + 1], tools) for at in replies if at <= last}
        main = written[last]
        places = _places(main.prompt + main.text, written)
        for at in wanted:
            # What stands in front of a reply in the conversation's own document is looked at once, with the last.
            begin = at if at in places and at != last else 0
            notes += written[at].notes + _checked(written[at], messages[: at + 1], begin)
            if not self.manner.allow_control_tokens:  # else the row may say so itself
                dialect.check_end(written[at], at + 1, calls="tool_calls" in messages[at])
            if dialect.leaves_thought(written[at], messages[: at + 1], tools):
                notes.append("thoughts-left-out")
        if train_on == "all" and any(not messages[at].get("supervised", True) for at in replies if at not in places):
            what = "a reply that isn't to be learnt is shown otherwise once turns follow: train_on: all would learn it"
            raise RowRefused("", what, "weight")
        drafts = [self._own_document(at, written) for at in wanted if at not in places]
        cuts = [(*places[at], at in wanted) for at in places]
        pieces = self._pieces(main.prompt + main.text + main.rest, cuts, everything=train_on == "all")
        drafts.append(Draft(pieces, len(places.keys() & set(wanted)), notes))
        for draft in drafts:
            self._fix_bos(draft)
        return drafts

    def _own_document(self, at: int, written: Mapping[int, Reply]) -> Draft:
        """A document that ends with one reply, the only one that is supervised in it."""
        own = written[at]
        text = own.prompt + own.text
        places = _places(text, {earlier: reply for earlier, reply in written.items() if earlier <= at})
        cuts = [(*place, earlier == at) for earlier, place in places.items()]
        return Draft(self._pieces(text + own.rest, cuts, everything=False), 1, ["own-document"])

    def reply(self, messages: Sequence[Any], tools: Any = None, variables: Mapping[str, Any] | None = None) -> str:
        """What the model has to write as the last of ``messages``, up to the end mark and with it.

        Raises:
            RowRefused: A message breaks a rule, or what has to be written can't be told.
            TemplateRefused: The template refuses them.
        """
        conversation = Conversation(read_messages(list(messages)), read_tools(tools), variables=dict(variables or {}))
        dialect, prepared, tool_list = self._prepared(conversation, [])
        return dialect.reply(prepared, tool_list).text

    def prompt(
        self, messages: Sequence[Any], tools: Any = None, variables: Mapping[str, Any] | None = None
    ) -> list[Piece]:
        """What the model is asked with: the turns so far and the generation prompt, as pieces.

        Raises:
            UserError: A message breaks a rule, the template refuses them, or the tokenizer has no template.
        """
        try:
            conversation = Conversation(
                read_messages(list(messages)), read_tools(tools), variables=dict(variables or {})
            )
            notes: list[str] = []
            dialect, prepared, tool_list = self._prepared(conversation, notes)
            if "unknown-variables" in notes:
                raise RowRefused("chat_template_kwargs", "the template has no such variable")
            text = dialect.text(prepared, tool_list, prompt=True)
            replies = [at for at, message in enumerate(prepared) if message["role"] == "assistant"]
            places = _places(text, {at: dialect.reply(prepared[: at + 1], tool_list) for at in replies})
        except RowRefused as error:
            raise UserError(f"the conversation can't be used: {error}") from None
        except TemplateRefused as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from None
        draft = Draft(self._pieces(text, [(*place, False) for place in places.values()], everything=False))
        self._fix_bos(draft)
        return draft.pieces

    def _prepared(self, conversation: Conversation, notes: list[str]) -> tuple[Dialect, list[Message], Tools]:
        """The dialect, and messages and tools as it takes them, with their text guarded. Repairs go to the
        conversation, what else was found to the notes."""
        if not self._sources:
            raise UserError(
                "the tokenizer has no chat template",
                rule="Conversations need one: it says how turns become tokens.",
                way_out="Give one: --template FILE.jinja, or train on raw text.",
            )
        messages, tools = conversation.messages, conversation.tools
        dialect = self._dialect(bool(tools), self.manner.variables)
        if conversation.variables:
            used = {key: value for key, value in conversation.variables.items() if key in dialect.template.names}
            if len(used) < len(conversation.variables):
                notes.append("unknown-variables")
            dialect = self._dialect(bool(tools), {**self.manner.variables, **used})
        if not self.manner.allow_control_tokens:
            messages = [dialect.guard.message(message, notes) for message in messages]
            tools = [dialect.guard.value(tool, False, notes) for tool in tools]
        messages, fitting, repairs = dialect.fitted(messages, tools, notes)
        conversation.repairs.extend(name for name in dict.fromkeys(repairs) if name not in conversation.repairs)
        return dialect, messages, fitting

    # -- text to pieces -----------------------------------------------------------------------------------------------

    def _raw(self, text: str, with_controls: bool) -> Draft:
        """Raw text: what the tokenizer begins texts with (BOS, GLM's two tokens), the text, the end of text; all of it
        supervised."""
        pieces = self._cut(text, True, False) if with_controls else [Piece(text, -1, True, False)]
        if pieces[0].control not in self._begin:
            pieces[:0] = [Piece("", token, True, False) for token in self._begin]
        if self.eos_id is not None and pieces[-1].control != self.eos_id:
            pieces.append(Piece("", self.eos_id, True, False))
        return Draft(pieces, 1)

    def _pieces(self, text: str, cuts: list[tuple[int, int, bool]], *, everything: bool) -> list[Piece]:
        pieces: list[Piece] = []
        at = 0
        for start, end, supervised in sorted(cuts):
            pieces += self._cut(text[at:start], everything, False)
            pieces += self._cut(text[start:end], supervised, True)
            at = end
        pieces += self._cut(text[at:], everything, bool(pieces) and pieces[-1].control < 0)
        return pieces

    def _cut(self, text: str, supervised: bool, joined: bool) -> list[Piece]:
        """Text cut at its control tokens; marks inside guarded text go."""
        controls = self.encoder.controls
        pieces: list[Piece] = []
        for number, part in enumerate(self.encoder.pattern.split(text)):
            if not part:
                continue
            if number % 2:
                pieces.append(Piece(part, controls[part], supervised, joined and not pieces))
            else:
                pieces.append(Piece(part.replace(NONCHARACTER, ""), -1, supervised, joined and not pieces))
        return pieces

    def _fix_bos(self, draft: Draft) -> None:
        """Exactly the BOS that the model expects: what the template writes, never two; else what the tokenizer adds."""
        pieces, bos = draft.pieces, self.bos_id
        while len(pieces) > 1 and pieces[0].control == bos == pieces[1].control:
            del pieces[0]
            draft.notes.append("bos-doubled")
        if self.adds_bos and bos is not None and (not pieces or pieces[0].control != bos):
            pieces.insert(0, Piece("", bos, False, False))
            draft.notes.append("bos-added")


def _put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    whole, bare = (list(tokenizer("a", add_special_tokens=special).input_ids) for special in (True, False))
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:at]


def _bad_template(what: str) -> UserError:
    return UserError(
        f"the chat template can't be used: {what}",
        rule="A chat template renders user and assistant turns and closes each reply with a control token.",
        way_out="Give another: --template FILE.jinja",
    )


def learnt(conversation: Conversation, train_on: str) -> list[Message]:
    """The messages, with each reply that ``train_on`` doesn't mean marked as one that is shown: so it stays, whatever
    is merged, parted or left out of them."""
    if train_on == "all":
        return conversation.messages
    replies = [at for at, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    meant = _meant(conversation, [at for at in replies if at >= conversation.completion_from], train_on)
    return [
        {**message, "supervised": False} if message["role"] == "assistant" and at not in meant else message
        for at, message in enumerate(conversation.messages)
    ]


def _meant(conversation: Conversation, replies: list[int], train_on: str) -> list[int]:
    """Which of these replies ``train_on`` means."""
    only_last = train_on == "last" or (train_on == "completion" and not conversation.completion_from)
    return replies[-1:] if only_last else replies


def _places(text: str, written: Mapping[int, Reply]) -> dict[int, tuple[int, int]]:
    """Where replies stand in a text just as they have to be written behind their prompts."""
    made = {}
    for at, reply in written.items():
        start = len(reply.prompt)
        if text.startswith(reply.prompt) and text.startswith(reply.text, start):
            made[at] = (start, start + len(reply.text))
    return made


def _checked(reply: Reply, messages: list[Message], begin: int) -> list[str]:
    """What the template left out without harm, of the messages from ``begin`` on.

    Raises:
        RowRefused: It left out or changed what somebody said.
    """
    notes = []
    *before, message = messages[begin:]
    contents = [_content(each).strip() for each in before]
    said = NONCHARACTER.join(content for content in contents if content in reply.prompt)
    for at, (each, content) in enumerate(zip(before, contents, strict=True), begin + 1):
        if each["role"] == "assistant" or _stands((content,), said, reply.prompt):
            continue
        if each["role"] != "tool":
            raise _left_out(at, each)
        notes.append("text-changed")
    content = _content(message)
    if "</think>" in content and content.strip() not in reply.text:
        content = content.rpartition("</think>")[2]
    if content[:1].isspace() and _first_line(content) not in reply.text:
        notes.append("indent-lost")
    content = content.strip()
    calls = [call["function"] for call in message.get("tool_calls", ())]
    words = [(name, _spelled(value)) for call in calls for name, value in _values(call) if not _holds(value)]
    said = NONCHARACTER.join([content, *(spelled[0] for _, spelled in words)]) if calls else ""
    if not _stands(_spelled(content) if calls else (content,), said, reply.text):
        raise _left_out(len(messages), message)
    for name, spelled in words:
        if not _stands(spelled, said, reply.text):
            what = f"turn {len(messages)}: the template leaves out a part of a call: {name!r}"
            raise RowRefused("", what, "template")
    for call in calls:
        notes += _check_values(call, reply.text, len(messages))
    return notes


def _left_out(turn: int, message: Message) -> RowRefused:
    what = f"turn {turn}: the template leaves out or changes what the {message['role']} says"
    return RowRefused("", what, "template")


def _content(message: Message) -> str:
    content = message.get("content") or ""
    return inner_text(content, "text") if isinstance(content, list) else str(content)


def _stands(spelled: tuple[str, ...], said: str, text: str) -> bool:
    """Whether a word, in one of its spellings, stands in a text as often as in all that was said: what one turn or call
    says may stand in another one's."""
    times = said.count(spelled[0])
    if times <= 1 or not spelled[0]:
        return any(word in text for word in spelled)
    return sum(map(text.count, set(spelled))) >= times


def _spelled(value: Any) -> tuple[str, ...]:
    """A word as it is, and how else a template may write it in a call."""
    if not isinstance(value, str):
        return json.dumps(value), str(value)
    word = value.strip()
    return word, json.dumps(word, ensure_ascii=False)[1:-1], json.dumps(word)[1:-1]


def _values(call: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(argument that it belongs to, value) of all that a call says: its name, the arguments' names and their values,
    and what these hold."""
    arguments = call["arguments"]
    left = [("name", call["name"]), ("arguments", json.loads(arguments) if isinstance(arguments, str) else arguments)]
    while left:
        name, value = left.pop()
        yield name, value
        if isinstance(value, dict):
            left += (pair for key, item in value.items() for pair in ((key, key), (key, item)))
        elif isinstance(value, list):
            left += ((name, item) for item in value)


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def _first_line(content: str) -> str:
    """The first line that says something, with its indent and without what stands behind it."""
    return content[: len(content) - len(content.lstrip())].rpartition("\n")[2] + content.strip().partition("\n")[0]


def _check_values(call: dict[str, Any], text: str, turn: int) -> list[str]:
    """What is to be noted of a call that is there whole, in words that its tool's parser can read.

    Raises:
        RowRefused: They aren't.
    """
    notes: list[str] = []
    for name, value in _values(call):
        if _holds(value):
            if str(value) != json.dumps(value, ensure_ascii=False) and str(value) in text:
                what = f"the template writes argument {name!r} as Python would, not as JSON"
                raise RowRefused("", f"turn {turn}: {what}", "template")
        elif (value is None or isinstance(value, bool)) and str(value) in text and json.dumps(value) not in text:
            notes.append("python-values")
    return notes[:1]


_RENDERERS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, int, str], ChatRenderer]] = (
    weakref.WeakKeyDictionary()
)


def renderer_for(tokenizer: PreTrainedTokenizerBase, manner: Manner | None = None) -> ChatRenderer:
    """The renderer of a tokenizer and its present template, made once."""
    manner = manner or Manner()
    made = _RENDERERS.setdefault(tokenizer, {})
    key = (str(tokenizer.chat_template), len(tokenizer), manner.key)
    if key not in made:
        made[key] = ChatRenderer(tokenizer, manner)
    return made[key]


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the date of the day it is rendered."""
    return "strftime_now" in str(tokenizer.chat_template)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    *,
    tools: Any = None,
    manner: Manner | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids that a model is asked with: the conversation so far and the generation prompt.

    The one function that training, chat, generate, eval, compare and serve render prompts by: its ids are a prefix of
    the training document of the same conversation.

    Args:
        tokenizer: The tokenizer with its chat template.
        messages: OpenAI-style messages (role, content, tool_calls, …); the last is a user's or a tool's.
        tools: OpenAI-style tool definitions, or None.
        manner: How the run renders.
        variables: What this one conversation sets in the template (``chat_template_kwargs``), over the run's.

    Raises:
        UserError: A message breaks a rule, or the template refuses the conversation.
    """
    renderer = renderer_for(tokenizer, manner)
    ids, _ = renderer.encoder.encode([renderer.prompt(messages, tools, variables)])[0]
    made: list[int] = ids.tolist()
    return made
