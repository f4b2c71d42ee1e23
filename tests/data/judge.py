"""A judge of chat templates that shares no code with what it judges.

Each field of a conversation holds a sentinel (``qz…``). What a model would be asked with, and what it would have to
write, is worked out from Transformers' own rendering and the sentinels' places; the documents that slimtune trains on
are held against that, reply by reply: the text in front of what is supervised must be the prompt, what is supervised
must be the reply with its thought, its calls and its end mark, and nothing else may be supervised.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jinja2.nodes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from slimtune.data.conversation import RowRefused, normalise
from slimtune.data.header import completed
from slimtune.data.render import ChatRenderer
from slimtune.errors import UserError
from tests.data.conversations import CASES, Case, Messages, result, user

# -- a tokenizer for a template ---------------------------------------------------------------------------------------

_MARK = re.compile(
    r"<\|[^|<>\s'\"{}]+\|?>|<[a-z_]+\|>|<｜[^｜<>\s]+｜>|</?[a-z]+:[a-z_]+(?::[a-z_]+)?>|\[/?[A-Z][A-Z_]+\]"
    r"|<\[[^\]\s]+\]>|\]<\][^\[\s]+\[>\[|<[a-z]+_of_[a-z]+>|</?s>|<[be]os>|<extra_id_\d+>|<reserved_\d+>"
    r"|\[\|[a-z]+\|\]|\[e~\[|\]~!?b[\]\[]|<SPECIAL_\d+>|</assistant>|<sep>|<_[a-z]+>"
)
_PLAIN = re.compile(r"</?(?:think|thought|tool_calls?|tool_response|tool_result|arg_key|arg_value|answer)>")
_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]


def _alphabet() -> dict[str, int]:
    spare = iter(range(256, 512))
    return {chr(byte) if byte in _BYTES else chr(next(spare)): byte for byte in range(256)}


def _literals(source: str) -> str:
    tree = _compile_jinja_template(source).environment.parse(source)
    texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


def tokenizer_for(source: str) -> PreTrainedTokenizerBase:
    """A tokenizer of bytes that knows the marks which stand in a template as control tokens."""
    text = _literals(source)
    special = list(dict.fromkeys(_MARK.findall(text)))
    if "\0<|\0" in f"\0{text}\0" or "|>" in text.split("\0"):
        special += [f"<|{role}|>" for role in ("system", "user", "assistant", "tool") if f"<|{role}|>" not in special]
    plain = list(dict.fromkeys(_PLAIN.findall(text)))
    deepseek = any("｜" in mark for mark in special)
    bos = "<｜begin▁of▁sentence｜>" if deepseek else "<|begin_of_text|>" if "<|eot_id|>" in special else "<s>"
    eos = "<｜end▁of▁sentence｜>" if deepseek else "</s>" if "eos_token" in source else "<|endoftext|>"
    backend = Tokenizer(models.BPE(vocab=_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in (bos, eos, *special)])
    backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in plain])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    made.chat_template = source
    return made


def as_loaded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with its template as slimtune takes it over."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = completed(str(tokenizer.chat_template), tokenizer.special_tokens_map)
    return made


# -- what is expected -------------------------------------------------------------------------------------------------

_THOUGHT_MARKS = [
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"), ("<thought>", "</thought>"), ("<mm:think>", "</mm:think>"),
    ("<|think_start|>", "<|think_end|>"), ("<|think|>", "<|/think|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
]  # fmt: skip
_SENTINEL = re.compile(r"qz[a-z]+")
_RAW_PARTS = ("{'type': 'text'", "{'type': 'thinking'", '{"type": "text"', '{"type": "thinking"')
_OFF = ("weight", "train", "loss", "loss_weight")


@dataclass
class Expected:
    """What one reply's document must be."""

    prompt: str
    reply: str
    exact: bool
    shows_thought: bool


class Unusable(Exception):
    """Transformers' rendering can't be trained on, and why."""


class Oracle:
    """Transformers' rendering of one template, and what must follow from it.

    ``header`` is what the template should have written as its generation prompt and doesn't.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, header: str = "") -> None:
        self.tokenizer, self.header = tokenizer, header
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special = re.compile("|".join(re.escape(text) for text in sorted({*special, *added}, key=len)[::-1]))
        self.marks = re.compile(f"{self.special.pattern}|<[^<>\\s]*>|\\[[^\\[\\]\\s]*\\]")

    def text(self, messages: Messages, case: Case, *, prompt: bool = False, tools: Any = ()) -> str | None:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=case.tools, tokenize=False, add_generation_prompt=prompt, **case.variables
            )
            return str(text) + self.header * prompt
        except Exception:  # noqa: BLE001 - whatever a stranger's template raises
            return None

    def expected(self, case: Case, messages: Messages) -> dict[int, Expected]:
        """For each reply that is to be learnt, by its turn, what must be trained.

        Raises:
            Unusable: The template doesn't render these messages so that it can be trained on.
        """
        made = {}
        for at, message in enumerate(messages):
            if message["role"] == "assistant" and not _is_off(message):
                made[at] = self._reply(case, messages, at)
        if not made:
            raise Unusable("no reply")
        return made

    def _reply(self, case: Case, messages: Messages, at: int) -> Expected:
        prompt = self.text(messages[:at], case, prompt=True)
        whole = self.text(messages[: at + 1], case)
        if prompt is None or whole is None:
            raise Unusable("the template raises")
        for message in messages[:at]:
            self._seen(message, prompt)
        if case.tools and not all(word in prompt for word in ("qztool", "qzdoes")):
            raise Unusable("the tools aren't shown")
        own = [*_content_sentinels(messages[at]), *_call_sentinels(messages[at])]
        shared = _common(prompt, whole)
        for text in (prompt, whole):
            shared = next((m.start() for m in self.marks.finditer(text) if m.start() < shared < m.end()), shared)
        if any(word in prompt[shared:] for message in messages[:at] for word in _content_sentinels(message)):
            if at and messages[0]["role"] == "system":  # shown in prompts alone, as Mistral Nemo does
                bare = self._reply(case, messages[1:], at - 1)
                return Expected(prompt, bare.reply, bare.exact, bare.shows_thought)
            raise Unusable("the turns before the reply are shown differently with it")
        more = _bare(prompt[shared:]).removeprefix("thought")
        turn_begins = whole[shared : whole.index("qz", shared)] if "qz" in whole[shared:] else ""
        if more and (more not in whole[:shared] or more in turn_begins):
            raise Unusable("the prompt isn't what the reply's turn begins with")
        body = whole[shared:]
        if any(word not in body for word in own):
            raise Unusable("the reply isn't shown")
        for artefact in ("None", "{'", '\\"', "Undefined", *_RAW_PARTS):
            if artefact in body:
                raise Unusable(f"{artefact} in the reply")
        if any(artefact in prompt for artefact in _RAW_PARTS):
            raise Unusable("parts are written as they are")
        last = shared + max((body.rindex(word) + len(word) for word in own), default=0)
        end = self._end(case, messages, at, whole, last)
        reply = whole[len(prompt) if whole.startswith(prompt) else shared : last] + end
        thought = _thought_sentinels(messages[at])
        return Expected(prompt, reply, whole.startswith(prompt), all(word in reply for word in thought))

    def _seen(self, message: dict[str, Any], prompt: str) -> None:
        words = [*_content_sentinels(message), *_call_sentinels(message)]
        if any(word not in prompt for word in words):
            raise Unusable(f"a turn of {message['role']} isn't shown")
        if message["role"] == "tool" and not words:
            raise Unusable("a result isn't shown")

    def _end(self, case: Case, messages: Messages, at: int, whole: str, last: int) -> str:
        """What closes the reply, from behind its last sentinel on to its end mark."""
        after = whole[last:]
        if messages[at].get("tool_calls"):
            calls = messages[at]["tool_calls"]
            follow = [result(n, "qznext", "other") for n in range(len(calls))]
            follow = [{**r, "tool_call_id": c["id"]} for r, c in zip(follow, calls, strict=True)]
        else:
            follow = [user("qznext")]
        longer = self.text(messages[: at + 1] + follow, case)
        if longer is not None and "qznext" in longer:
            behind = longer[: longer.index("qznext")]
            words = [*_content_sentinels(messages[at]), *_call_sentinels(messages[at])]
            seen = [behind.rindex(word) + len(word) for word in words if word in behind]
            behind = behind[last if behind.startswith(whole[:last]) else max(seen, default=0) :]
        else:
            behind = ""
        shared = after[: _common(after, behind)]
        if marks := list(self.special.finditer(shared)):
            # A header that stands behind every conversation begins with a mark of its own, which ends nothing.
            standing = after[len(shared) :].strip()
            bare = self.text(messages[:at], case) or ""
            if standing and bare.strip().endswith(standing) and bare == self.text(messages[:at], case, prompt=True):
                marks = marks[:-1] or marks
            return after[: marks[-1].end()]
        if mark := self.special.search(after):
            return after[: mark.end()]
        if (mark := self.special.search(behind)) and behind[: mark.start()].strip() == after.strip():
            return behind[: mark.end()]
        raise Unusable("no end mark")

    def matches(self, found: tuple[str, str], expected: Expected) -> str:
        """Why (prompt, supervised) isn't what is expected; "" if it is."""
        prompt, reply = found
        bos = self.tokenizer.bos_token or ""
        if prompt.removeprefix(bos) != expected.prompt.removeprefix(bos):
            return f"prompt {_apart(prompt, expected.prompt)}"
        if expected.exact:
            return "" if reply == expected.reply else f"reply {_apart(reply, expected.reply)}"
        if _bare(reply) != _bare(expected.reply) and _bare(reply, drop=True) != _bare(expected.reply, drop=True):
            return f"reply (loosely) {_apart(reply, expected.reply)}"
        head = prompt[max(prompt.rfind(word) for word in _SENTINEL.findall(prompt)) :]
        for opens, closes in _THOUGHT_MARKS:
            lone = max(0, head.count(closes) - head.count(opens))  # prompts that only close, as DeepSeek V3.1's
            if (head + reply).count(opens) != (head + reply).count(closes) - lone:
                return f"a thought isn't closed: {head + reply!r}"
        return ""


def _bare(reply: str, drop: bool = False) -> str:
    for pair in _THOUGHT_MARKS:
        for mark in pair:
            reply = reply.replace(mark, "")
    if drop:
        reply = re.sub(r"qzthought[ab]?( is deep\.)?", "", reply)
    return "".join(reply.split())


def _apart(found: str, wanted: str) -> str:
    at = max(0, _common(found, wanted) - 25)
    return f"…{found[at : at + 110]!r} for …{wanted[at : at + 110]!r}"


def _common(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _is_off(message: dict[str, Any]) -> bool:
    return any(key in message and not message[key] for key in _OFF)


def _content_sentinels(message: dict[str, Any]) -> list[str]:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = " ".join(str(part.get("text", "")) for part in content)
    return [word for word in _SENTINEL.findall(content) if not word.startswith("qzthought")]


def _call_sentinels(message: dict[str, Any]) -> list[str]:
    return _SENTINEL.findall(json.dumps(message.get("tool_calls") or []))


def _thought_sentinels(message: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(re.findall(r"qzthought[ab]?", json.dumps(message))))


def _variants(messages: Messages) -> Iterator[Messages]:
    """The forms in which these messages may be handed to a template without being other messages."""
    for roles in (_same, _developer_as_system, _system_into_user, _merged, lambda m: _merged(_system_into_user(m))):
        for parts in (
            _same,
            _joined_parts,
            _thought_key,
            _thought_parts,
            _as_parts,
            _thoughts_as_parts,
            _all_thought_keys,
        ):
            for arguments in (_object_arguments, _text_arguments):
                for content in (_same, _empty_content):
                    for system in (_same, _without_empty_system):
                        yield content(arguments(parts(roles(system(messages)))))


def _same(messages: Messages) -> Messages:
    return messages


def _without_empty_system(messages: Messages) -> Messages:
    return [m for m in messages if m["role"] != "system" or m["content"]]


def _developer_as_system(messages: Messages) -> Messages:
    return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]


def _system_into_user(messages: Messages) -> Messages:
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return messages
    heads = [m for m in messages if m["role"] in ("system", "developer")]
    rest = [m for m in messages if m["role"] not in ("system", "developer")]
    if messages[: len(heads)] != heads or not isinstance(rest[0]["content"], str):
        return messages
    text = "\n\n".join([*(m["content"] for m in heads), rest[0]["content"]])
    return [{**rest[0], "content": text}, *rest[1:]]


def _merged(messages: Messages) -> Messages:
    made: Messages = []
    for m in messages:
        if made and made[-1]["role"] == m["role"] == "user":
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n\n{m['content']}"}
        elif made and made[-1]["role"] in ("system", "developer") and m["role"] in ("system", "developer"):
            made[-1] = {**made[-1], "role": "system", "content": f"{made[-1]['content']}\n\n{m['content']}"}
        else:
            made.append(m)
    return made


def _joined_parts(messages: Messages) -> Messages:
    return [
        {**m, "content": "".join(p["text"] for p in m["content"])}
        if isinstance(m.get("content"), list) and all("text" in p for p in m["content"])
        else m
        for m in messages
    ]


def _as_parts(messages: Messages) -> Messages:
    """Text as parts, as the templates of models that also see take it."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def _all_thought_keys(messages: Messages) -> Messages:
    made = _thought_key(messages)
    keys = ("reasoning_content", "thinking", "reasoning")
    thoughts = [next((m[key] for key in keys if m.get(key)), None) for m in made]
    return [{**m, **dict.fromkeys(keys, t)} if t else m for m, t in zip(made, thoughts, strict=True)]


def _thoughts_as_parts(messages: Messages) -> Messages:
    return _as_parts(_thought_key(messages))


def _thought_key(messages: Messages) -> Messages:
    made = []
    for m in messages:
        content = m.get("content")
        if isinstance(content, list) and any(p["type"] == "thinking" for p in content):
            thought = "".join(t["text"] for p in content if p["type"] == "thinking" for t in p["thinking"])
            text = "".join(p["text"] for p in content if p["type"] == "text")
            m = {**m, "content": text, "reasoning_content": thought}
        elif isinstance(content, str) and (found := re.fullmatch(r"<think>\n(.*)\n</think>\n\n(.*)", content)):
            m = {**m, "content": found[2], "reasoning_content": found[1]}
        made.append(m)
    return _joined_parts(made)


def _thought_parts(messages: Messages) -> Messages:
    """Thoughts as parts: with plain text, as the newer templates of that kind take it, too."""
    made = []
    for m in _thought_key(messages):
        thought = next((m[key] for key in ("reasoning_content", "thinking", "reasoning") if m.get(key)), None)
        if thought is not None:
            rest = {k: v for k, v in m.items() if k not in ("reasoning_content", "thinking", "reasoning")}
            parts = [{"type": "thinking", "thinking": thought}]
            m = {**rest, "content": [*parts, *([{"type": "text", "text": m["content"]}] if m["content"] else [])]}
        made.append(m)
    return made


def _object_arguments(messages: Messages) -> Messages:
    return _with_arguments(messages, lambda a: json.loads(a) if isinstance(a, str) else a)


def _text_arguments(messages: Messages) -> Messages:
    return _with_arguments(messages, lambda a: a if isinstance(a, str) else json.dumps(a, ensure_ascii=False))


def _with_arguments(messages: Messages, change: Any) -> Messages:
    made = []
    for m in messages:
        if m.get("tool_calls"):
            calls = [{**c, "function": {**c["function"], "arguments": change(c["function"]["arguments"])}}
                     for c in m["tool_calls"]]  # fmt: skip
            m = {**m, "tool_calls": calls}
        made.append(m)
    return made


def _empty_content(messages: Messages) -> Messages:
    return [{**m, "content": ""} if m.get("tool_calls") and not m.get("content") else m for m in messages]


# -- what slimtune does, and the verdict ------------------------------------------------------------------------------

VERDICTS = ("right", "refused rightly", "refused wrongly", "wrong with a note", "wrong in silence")


@dataclass(frozen=True)
class Verdict:
    template: str
    case: str
    verdict: str
    why: str = ""


def judged(name: str, source: str, header: str = "") -> list[Verdict]:
    """The verdicts on a template with each conversation; ``header`` as :class:`Oracle` has it."""
    try:
        tokenizer = tokenizer_for(source)
    except Exception as error:  # noqa: BLE001 - no template of Transformers' either
        return [Verdict(name, case.name, "refused rightly", f"no template: {error}") for case in CASES]
    oracle = Oracle(tokenizer, header)
    try:
        renderer: ChatRenderer | UserError = ChatRenderer(as_loaded(tokenizer))
    except UserError as error:
        renderer = error
    return [_judge(name, case, oracle, renderer) for case in CASES]


def _judge(name: str, case: Case, oracle: Oracle, renderer: ChatRenderer | UserError) -> Verdict:
    wanted, reasons = _wanted(case, oracle)
    refused, said, documents = _documents(case, renderer)
    if refused:
        if wanted and case.name != "empty reply":
            return Verdict(name, case.name, "refused wrongly", refused)
        return Verdict(name, case.name, "refused rightly", f"{refused} | {reasons}")
    found = [pair for document in documents for pair in _supervised(document)]
    why = _wrong(found, wanted, oracle, case, said) if wanted else _wrong_somehow(found, case, said, oracle)
    if not why:
        return Verdict(name, case.name, "right", ", ".join(said))
    return Verdict(name, case.name, "wrong with a note" if said else "wrong in silence", f"{why} | {', '.join(said)}")


def _wanted(case: Case, oracle: Oracle) -> tuple[list[dict[int, Expected]], str]:
    """All the forms that are right; where some show the thoughts, only those."""
    made: list[dict[int, Expected]] = []
    reasons: dict[str, None] = {}
    tried: list[Messages] = []
    for messages in _variants(case.messages):
        if messages in tried:
            continue
        tried.append(messages)
        try:
            made.append(oracle.expected(case, messages))
        except Unusable as reason:
            reasons[str(reason)] = None
    showing = [form for form in made if all(reply.shows_thought for reply in form.values())]
    return showing or made, ", ".join(reasons)


def _documents(case: Case, renderer: ChatRenderer | UserError) -> tuple[str, list[str], list[list[tuple[str, bool]]]]:
    """(why it was refused, notes and repairs, for each document its stretches of text and whether supervised)."""
    if isinstance(renderer, UserError):
        return str(renderer), [], []
    try:
        conversation = normalise(case.row())
        drafts = renderer.drafts(conversation)
    except (RowRefused, UserError) as error:
        return str(error) or "refused", [], []
    encoded = renderer.encoder.encode([draft.pieces for draft in drafts])
    said = [*conversation.repairs, *(note for draft in drafts for note in draft.notes)]
    made = []
    vocabulary = {number: text for text, number in renderer.encoder.controls.items()}
    for ids, mask in encoded:
        stretches: list[tuple[bytes, bool]] = []
        for number, flag in zip(ids.tolist(), mask.tolist(), strict=True):
            piece = vocabulary[number].encode() if number in vocabulary else bytes([number])
            if stretches and stretches[-1][1] == flag:
                stretches[-1] = (stretches[-1][0] + piece, flag)
            else:
                stretches.append((piece, flag))
        made.append([(text.decode("utf-8", "replace"), flag) for text, flag in stretches])
    return "", list(dict.fromkeys(said)), made


def _supervised(document: list[tuple[str, bool]]) -> Iterator[tuple[str, str]]:
    before = ""
    for text, flag in document:
        if flag:
            yield before, text
        before += text


def _wrong(
    found: list[tuple[str, str]], wanted: list[dict[int, Expected]], oracle: Oracle, case: Case, said: list[str]
) -> str:
    """Why what was found is none of the forms that are right; "" if it is one."""
    first = ""
    for form in wanted:
        left, why = list(found), ""
        for expected in form.values():
            reasons = [oracle.matches(pair, expected) for pair in left]
            if "" not in reasons:
                why = reasons[0] if reasons else "a reply isn't learnt"
                near = [r for r in reasons if r.startswith("reply")]
                why = near[0] if near else why
                break
            left.pop(reasons.index(""))
        else:
            why = f"also supervised: {left[0][1]!r}" if left else ""
        if not why:
            thoughts = [w for m in case.messages if m["role"] == "assistant" for w in _thought_sentinels(m)]
            text = "".join(reply for _, reply in found)
            if any(word not in text for word in thoughts) and "thoughts-left-out" not in said:
                return "a thought was left out without a word"
            return ""
        first = first or why
    return first


def _wrong_somehow(found: list[tuple[str, str]], case: Case, said: list[str], oracle: Oracle) -> str:
    """The template can't show this row by itself: it must have been changed by a rule that is said, and whole."""
    if not said:
        return "the template doesn't render this row, and nothing was said"
    replies = [m for m in case.messages if m["role"] == "assistant" and not _is_off(m)]
    text = " ".join(reply for _, reply in found)
    for message in replies:
        for word in (*_content_sentinels(message), *_call_sentinels(message)):
            if word not in text:
                return f"{word} isn't learnt"
    for message in case.messages:
        if message["role"] != "assistant" and any(word in text for word in _content_sentinels(message)):
            return f"a turn of {message['role']} is learnt"
    shown = " ".join(prompt for prompt, _ in found)
    for message in case.messages:
        if message["role"] != "assistant" and any(word not in shown for word in _content_sentinels(message)):
            return f"a turn of {message['role']} is left out"
    if any(not re.search(f"({oracle.special.pattern})\\Z", reply) for _, reply in found):
        return "a reply ends in no control token"
    return ""
