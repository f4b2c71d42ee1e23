"""A conversation to ids and supervised mask, by the tokenizer's chat template, with the mask derived and checked.

How the mask comes about: for each reply the turns before it are rendered with the generation prompt. That text must be
a prefix of the training text; where it ends the reply begins, and the reply ends with the first end mark (the control
token that the template closes a reply with). The text is cut there before it is encoded, so the ids that a model is
asked with (:func:`prompt_ids`) are always a prefix of the ids that it was trained on.

A reply whose prompt is no prefix of the whole conversation's text (templates that rewrite earlier turns) becomes a
document of its own. Control tokens in people's text are marked before the template sees them and stay text.
"""

from __future__ import annotations

import itertools
import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimtune.data.conversation import NONCHARACTER, Conversation, Message, RowRefused, read_messages, read_tools
from slimtune.data.template import ChatTemplate, TemplateRefused
from slimtune.data.tokens import Piece, TokenEncoder
from slimtune.errors import UserError

__all__ = ["NOTES", "ChatRenderer", "Draft", "prompt_ids", "renderer_for"]

NOTES: dict[str, str] = {
    "thoughts-left-out": "the template leaves the thoughts of earlier replies out",
    "text-left-out": "the template leaves out or changes the text of a turn",
    "own-document": "a reply became a document of its own: the template renders it differently once turns follow",
    "thought-opened": "the template's prompt opens a thought that its training text lacks: the thought was written in",
    "control-text": "control-token text in a turn was kept as text",
    "bos-added": "the template writes no BOS but the tokenizer adds one: it was added",
    "bos-doubled": "the template wrote more than one BOS: one was kept",
}
"""What the renderer may find in a row, by the name that is counted."""

_THINK = ("<think>", "</think>")


@dataclass(slots=True)
class Draft:
    """One document before it is encoded: its pieces, and how many replies in it are supervised."""

    pieces: list[Piece]
    replies: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _CallStyle:
    """How a template takes tool calls: content null or empty, arguments as an object or as JSON text."""

    null_content: bool
    text_arguments: bool


class ChatRenderer:
    """Renders conversations for one tokenizer and one chat template.

    Args:
        tokenizer: The tokenizer; its ``chat_template`` is used.
        allow_control_tokens: Let control-token text inside content become control tokens.

    Raises:
        UserError: The template is invalid, can't render a question and its answer, or ends no reply with a control
            token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, allow_control_tokens: bool = False) -> None:
        self.encoder = TokenEncoder(tokenizer)
        self.allow_control_tokens = allow_control_tokens
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.adds_bos = self.bos_id is not None and list(tokenizer("").input_ids)[:1] == [self.bos_id]
        source = tokenizer.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        self._template: ChatTemplate | None = None
        if source:
            try:
                self._template = ChatTemplate(source, dict(tokenizer.special_tokens_map))
            except TemplateRefused as error:
                raise _bad_template(str(error)) from None
            self._forgeable = self._forgeable_tokens(source)
            self._probe()

    def _forgeable_tokens(self, source: str) -> dict[bool, tuple[str, re.Pattern[str]]]:
        """(first characters, pattern) of the control tokens to guard against, for replies and for other turns."""
        special = self.encoder.special
        written = {
            text for text in self.encoder.controls if text in source and any(map(str.isalpha, text)) and len(text) > 1
        }
        made = {}
        for is_reply, texts in ((True, special - set(_THINK)), (False, special | written)):
            ordered = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
            pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
            made[is_reply] = ("".join({text[0] for text in ordered}), pattern)
        return made

    # -- what the template can do -------------------------------------------------------------------------------------

    def _probe(self) -> None:
        ask = {"role": "user", "content": "qzuser"}
        answer = {"role": "assistant", "content": "qzreply"}
        try:
            text = self._text([ask, answer], None, prompt=False)
            self._text([ask], None, prompt=True)
        except TemplateRefused as error:
            raise _bad_template(f"it can't render a question and its answer: {error}") from None
        wavering = sorted(token for token in self.encoder.wavering if token in text)
        if wavering:
            raise UserError(
                f"the tokenizer reads {wavering[0]!r} as a control token in some places and as text in others",
                rule="The chat template writes it, and it has normalized: true beside a normaliser that adds a space.",
                way_out='Set "normalized": false for it in tokenizer.json.',
            )
        if "qzuser" not in text or "qzreply" not in text:
            raise _bad_template("it leaves out what the user or the assistant said")
        after = text.rindex("qzreply") + len("qzreply")
        marks = [found[0] for found in self.encoder.pattern.finditer(text, after) if found[0] in self.encoder.special]
        if not marks:
            raise _bad_template("it ends no reply with a control token, so a model trained on it never learns to stop")
        self._end_marks = {marks[0]}
        system = {"role": "system", "content": "qzsystem"}
        shown = "qzsystem" in (self._try([system, ask, answer]) or "")
        self._system_in_prompt = not shown and "qzsystem" in (self._try([system, ask], prompt=True) or "")
        self._has_system = shown or self._system_in_prompt
        twice = self._try([ask, {"role": "user", "content": "qzagain"}, answer])
        self._alternates = twice is None or "qzagain" not in twice
        self._tools_probed = False
        self._lists_tools = False
        self._call_style: _CallStyle | None = None

    def _probe_tools(self) -> None:
        """Find out whether the template shows tools, calls and results, and in which form it takes calls."""
        self._tools_probed = True
        ask = {"role": "user", "content": "qzuser"}
        parameters = {"type": "object", "properties": {"qzarg": {"type": "string", "description": "qzabout"}}}
        tool = {"type": "function", "function": {"name": "qztool", "description": "qzdoes", "parameters": parameters}}
        shown = self._try([ask, {"role": "assistant", "content": "qzreply"}], [tool])
        self._lists_tools = shown is not None and "qztool" in shown and "qzarg" in shown
        call = {
            "id": "call00000",
            "type": "function",
            "function": {"name": "qztool", "arguments": {"qzarg": "qzvalue"}},
        }
        messages: list[Message] = [
            ask,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "qzresult", "name": "qztool", "tool_call_id": "call00000"},
            {"role": "assistant", "content": "qzreply"},
        ]
        for style in (_CallStyle(n, t) for t in (False, True) for n in (False, True)):
            styled = [_styled(message, style) for message in messages]
            text = self._try(styled, [tool])
            if text is None or "None" in text or "{'" in text or '\\"qzarg' in text:
                continue
            if not all(word in text for word in ("qztool", '"qzarg"', "qzvalue", "qzresult", "qzreply")):
                continue
            try:
                spans = self._reply_spans(text, styled, [tool])
            except (TemplateRefused, RowRefused):
                continue
            if all(span is not None for span in spans.values()) and "qzvalue" in text[slice(*(spans[1] or (0, 0)))]:
                self._call_style = style
                return

    def _try(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, *, prompt: bool = False
    ) -> str | None:
        try:
            return self._text(messages, tools, prompt=prompt)
        except TemplateRefused:
            return None

    def _text(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool) -> str:
        assert self._template is not None
        return self._template.render(messages, tools, add_generation_prompt=prompt)

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
            return [self._raw(conversation.text, self.allow_control_tokens or conversation.rendered)]
        messages, tools, kept = self._prepared(conversation)
        try:
            return self._chat_drafts(conversation, messages, tools, kept, train_on)
        except TemplateRefused as error:
            raise RowRefused("", f"the chat template refuses it: {error}", "template") from None

    def _chat_drafts(
        self,
        conversation: Conversation,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        notes: list[str],
        train_on: str,
    ) -> list[Draft]:
        full = self._text(messages, tools, prompt=False)
        spans = self._reply_spans(full, messages, tools)
        replies = list(spans)
        if train_on in ("last", "completion") and not conversation.completion_from:
            wanted = replies[-1:]
        elif train_on != "all" and conversation.completion_from:
            in_completion = sum(
                1 for m in conversation.messages[conversation.completion_from :] if m["role"] == "assistant"
            )
            wanted = replies[-1:] if train_on == "last" else replies[-in_completion:]
        else:
            wanted = replies
        alone = [at for at in wanted if spans[at] is None]
        drafts = [self._own_document(messages[: at + 1], tools) for at in alone]
        proven = {at: span for at, span in spans.items() if span is not None}
        supervised = [at for at in wanted if at in proven]
        if supervised:
            notes = notes + _left_out(messages, full, proven)
            cuts = [(*proven[at], at in supervised) for at in proven]
            pieces = self._pieces(full, cuts, everything=train_on == "all")
            drafts.append(Draft(pieces, len(supervised), notes))
        for draft in drafts:
            self._fix_bos(draft)
        if not drafts:
            raise RowRefused("", "no reply is left to supervise")
        return drafts

    def _reply_spans(
        self, full: str, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> dict[int, tuple[int, int] | None]:
        """For each assistant turn where its reply begins and ends (behind the end mark) in the training text.

        None where the prompt is no prefix of it.
        """
        replies = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        starts: dict[int, int | None] = {}
        for at in replies:
            prompt = self._text(messages[:at], tools, prompt=True)
            starts[at] = len(prompt) if full.startswith(prompt) else None
        spans: dict[int, tuple[int, int] | None] = {}
        for number, at in enumerate(replies):
            start = starts[at]
            if start is None:
                spans[at] = None
                continue
            limit = next((s for a in replies[number + 1 :] if (s := starts[a]) is not None), len(full))
            spans[at] = (start, self._reply_end(full, start, limit, at, messages, tools))
        return spans

    def _reply_end(
        self, full: str, start: int, limit: int, at: int, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> int:
        if self.allow_control_tokens:  # an end mark inside the reply may be the writer's own
            until = self._text(messages[: at + 1], tools, prompt=False)
            limit = len(until) if full.startswith(until) else limit
            ends = [f.end() for f in self.encoder.pattern.finditer(full, start, limit) if f[0] in self._end_marks]
            end = ends[-1] if ends else None
        else:
            marks = self.encoder.pattern.finditer(full, start, limit)
            end = next((found.end() for found in marks if found[0] in self._end_marks), None)
        if end is None:
            wanted = " or ".join(self._end_marks)
            raise RowRefused("", f"turn {at + 1}: the template doesn't end the reply with {wanted}", "template")
        return end

    def _own_document(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> Draft:
        """A document that ends with the last message, its only supervised reply."""
        full = self._text(messages, tools, prompt=False)
        at = len(messages) - 1
        spans = self._reply_spans(full, messages, tools)
        span = spans[at]
        notes = ["own-document"]
        if span is None and self._system_in_prompt and messages[0]["role"] == "system":
            full, span = self._behind_system(messages, tools)
        if span is None:
            full, span = self._with_thought(full, messages, tools)
            notes = ["thought-opened"]
        cuts = [(*s, False) for a, s in spans.items() if s is not None and a != at and s[1] <= span[0]]
        return Draft(self._pieces(full, [*cuts, (*span, True)], everything=False), 1, notes)

    def _behind_system(
        self, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[str, tuple[int, int] | None]:
        """The training text where the template shows the system turn only while a question ends the messages, as
        Mistral Nemo's does: the prompt with it, and the reply as it is rendered without."""
        prompt = self._text(messages[:-1], tools, prompt=True)
        bare = self._text(messages[1:-1], tools, prompt=True)
        full = self._text(messages[1:], tools, prompt=False)
        if not full.startswith(bare):
            return full, None
        text = prompt + full[len(bare) :]
        return text, (len(prompt), self._reply_end(text, len(prompt), len(text), len(messages) - 1, messages, tools))

    def _with_thought(
        self, full: str, messages: list[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[str, tuple[int, int]]:
        """The training text where the generation prompt opens a thought (``<think>``) that the reply is rendered
        without: prompt, thought, reply."""
        prompt = self._text(messages[:-1], tools, prompt=True)
        opened = max(prompt.rfind("<think>"), 0)
        body = full[opened:]
        if prompt[opened:].strip() != "<think>" or not full.startswith(prompt[:opened]):
            what = "the template's generation prompt is no prefix of its training text"
            raise RowRefused("", f"turn {len(messages)}: {what}", "template")
        reply = messages[-1]
        thought = str(reply.get("reasoning_content") or "")
        content = str(reply.get("content") or "")
        if not thought and "</think>" in content:
            thought = content.split("</think>")[0].split("<think>")[-1]
        text = f"{prompt}{thought.strip()}\n</think>\n\n{body.split('</think>')[-1].lstrip()}"
        end = self._reply_end(text, len(prompt), len(text), len(messages) - 1, messages, tools)
        return text, (len(prompt), end)

    def prompt(self, messages: Sequence[Any], tools: Any = None) -> list[Piece]:
        """What the model is asked with: the turns so far and the generation prompt, as pieces.

        Raises:
            UserError: A message breaks a rule, the template refuses them, or the tokenizer has no template.
        """
        try:
            conversation = Conversation(read_messages(list(messages)), read_tools(tools))
            prepared, tool_list, _ = self._prepared(conversation)
            text = self._text(prepared, tool_list, prompt=True)
            cuts = []
            for at, message in enumerate(prepared):
                if message["role"] == "assistant":
                    before = self._text(prepared[:at], tool_list, prompt=True)
                    if text.startswith(before):
                        cuts.append(
                            (len(before), self._reply_end(text, len(before), len(text), at, prepared, tool_list), False)
                        )
        except RowRefused as error:
            raise UserError(f"the conversation can't be used: {error}") from None
        except TemplateRefused as error:
            raise UserError(f"the chat template refuses the conversation: {error}") from None
        draft = Draft(self._pieces(text, cuts, everything=False))
        self._fix_bos(draft)
        return draft.pieces

    # -- preparation: guard text, fit the template --------------------------------------------------------------------

    def _prepared(self, conversation: Conversation) -> tuple[list[Message], list[dict[str, Any]] | None, list[str]]:
        """Messages and tools as this template takes them, and what was noted. Repairs go to the conversation."""
        if self._template is None:
            raise UserError(
                "the tokenizer has no chat template",
                rule="Conversations need one: it says how turns become tokens.",
                way_out="Give one: --template FILE.jinja, or train on raw text.",
            )
        notes: list[str] = []
        messages, tools = conversation.messages, conversation.tools
        if not self.allow_control_tokens:
            messages = [self._guarded(message, notes) for message in messages]
            tools = [self._guard(tool, False, notes) for tool in tools]
        calls = any("tool_calls" in message or message["role"] == "tool" for message in messages)
        if (tools or calls) and not self._tools_probed:
            self._probe_tools()
        repairs: list[str] = []
        if calls:
            if self._call_style is None:
                messages = [_call_as_text(message) for message in messages]
                repairs.append("tools-as-text")
            else:
                messages = [_styled(message, self._call_style) for message in messages]
        if tools and not (self._lists_tools and (self._call_style is not None or not calls)):
            messages, tools = _tools_as_text(messages, tools), []
            repairs.append("tools-as-text")
        if messages[:1] and messages[0]["role"] == "system" and not self._has_system:
            messages = _system_into_user(messages)
            repairs.append("system-into-user")
        if self._alternates and _same_in_a_row(messages):
            messages = _merged(messages)
            repairs.append("merged-turns")
        conversation.repairs.extend(name for name in dict.fromkeys(repairs) if name not in conversation.repairs)
        return messages, tools or None, notes

    def _guarded(self, message: Message, notes: list[str]) -> Message:
        is_reply = message["role"] == "assistant"
        made = message
        for key in ("content", "reasoning_content", "tool_calls", "name"):
            if key in message and (guarded := self._guard(message[key], is_reply, notes)) is not message[key]:
                made = {**made, key: guarded}
        return made

    def _guard(self, value: Any, is_reply: bool, notes: list[str]) -> Any:
        """The value with a mark inside each control token's text, so that it is not recognised; same object if none."""
        if isinstance(value, str):
            firsts, pattern = self._forgeable[is_reply]
            if not any(first in value for first in firsts):
                return value
            marked = pattern.sub(lambda found: found[0][0] + NONCHARACTER + found[0][1:], value)
            if marked == value:
                return value
            notes.append("control-text")
            return marked
        if isinstance(value, dict):
            return {
                self._guard(key, is_reply, notes): self._guard(item, is_reply, notes) for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._guard(item, is_reply, notes) for item in value]
        return value

    # -- text to pieces -----------------------------------------------------------------------------------------------

    def _raw(self, text: str, with_controls: bool) -> Draft:
        """Raw text: BOS where the tokenizer adds one, the text, the end of text; all of it supervised."""
        pieces = self._cut(text, True, False) if with_controls else [Piece(text, -1, True, False)]
        if self.adds_bos and self.bos_id is not None and pieces[0].control != self.bos_id:
            pieces.insert(0, Piece("", self.bos_id, True, False))
        if self.eos_id is not None and pieces[-1].control != self.eos_id:
            pieces.append(Piece("", self.eos_id, True, False))
        return Draft(pieces, 1)

    def _pieces(self, text: str, cuts: list[tuple[int, int, bool]], *, everything: bool) -> list[Piece]:
        pieces: list[Piece] = []
        at = 0
        for start, end, supervised in sorted(cuts):
            pieces += self._cut(text[at:start], everything, False)
            pieces += self._cut(text[start:end], everything or supervised, True)
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


def _bad_template(what: str) -> UserError:
    return UserError(
        f"the chat template can't be used: {what}",
        rule="A chat template renders user and assistant turns and closes each reply with a control token.",
        way_out="Give another: --template FILE.jinja",
    )


def _styled(message: Message, style: _CallStyle) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    if style.text_arguments:
        calls = [{**call, "function": _with_text_arguments(call["function"])} for call in calls]
    content = None if style.null_content and not message["content"] else message["content"]
    return {**message, "content": content, "tool_calls": calls}


def _with_text_arguments(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _call_as_text(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    made = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = (json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"])
    texts = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    made["content"] = "\n".join([message["content"], *texts] if message["content"] else texts)
    return made


def _tools_as_text(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"You can call these functions:\n<tools>\n{listed}\n</tools>\n"
        "To call one, reply with its name and arguments as JSON:\n"
        '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'
    )
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _system_into_user(messages: list[Message]) -> list[Message]:
    system, *rest = messages
    at = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": system["content"]}, *rest]
    joined = {**rest[at], "content": f"{system['content']}\n\n{rest[at]['content']}"}
    return [*rest[:at], joined, *rest[at + 1 :]]


def _same_in_a_row(messages: list[Message]) -> bool:
    roles = [message["role"] for message in messages]
    return any(a == b and a in ("user", "assistant") for a, b in itertools.pairwise(roles))


def _merged(messages: list[Message]) -> list[Message]:
    made: list[Message] = []
    for message in messages:
        same = made and made[-1]["role"] == message["role"] and message["role"] in ("user", "assistant")
        if same and "tool_calls" not in message and "tool_calls" not in made[-1]:
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n\n{message['content']}"}
        else:
            made.append(message)
    return made


def _left_out(messages: list[Message], full: str, spans: dict[int, tuple[int, int]]) -> list[str]:
    """Names of what the template left out of the text."""
    notes = []
    for at, message in enumerate(messages):
        content = message.get("content") or ""
        where = full[slice(*spans[at])] if at in spans else full
        if message["role"] == "assistant":
            thought = message.get("reasoning_content") or ""
            if "</think>" in content:
                inner, _, content = content.rpartition("</think>")
                thought = thought or inner.replace("<think>", "")
            if thought.strip() and thought.strip() not in where:
                notes.append("thoughts-left-out")
        if content.strip() not in where:
            notes.append("text-left-out")
    return notes


_RENDERERS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, int, bool], ChatRenderer]] = (
    weakref.WeakKeyDictionary()
)


def renderer_for(tokenizer: PreTrainedTokenizerBase, *, allow_control_tokens: bool = False) -> ChatRenderer:
    """The renderer of a tokenizer and its present template, made once."""
    made = _RENDERERS.setdefault(tokenizer, {})
    key = (str(tokenizer.chat_template), len(tokenizer), allow_control_tokens)
    if key not in made:
        made[key] = ChatRenderer(tokenizer, allow_control_tokens=allow_control_tokens)
    return made[key]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    *,
    tools: Any = None,
    allow_control_tokens: bool = False,
) -> list[int]:
    """Token ids that a model is asked with: the conversation so far and the generation prompt.

    The one function that training, chat, generate, eval, compare and serve render prompts by: its ids are a prefix of
    the training document of the same conversation.

    Args:
        tokenizer: The tokenizer with its chat template.
        messages: OpenAI-style messages (role, content, tool_calls, …); the last is a user's or a tool's.
        tools: OpenAI-style tool definitions, or None.
        allow_control_tokens: Let control-token text inside content become control tokens.

    Raises:
        UserError: A message breaks a rule, or the template refuses the conversation.
    """
    renderer = renderer_for(tokenizer, allow_control_tokens=allow_control_tokens)
    ids, _ = renderer.encoder.encode([renderer.prompt(messages, tools)])[0]
    made: list[int] = ids.tolist()
    return made
