"""Chat templates that don't say that it is the assistant's turn, completed.

A template that ignores ``add_generation_prompt`` asks with the turns so far and nothing else, and writes the header of
the reply (``<|im_start|>assistant`` and a newline) in front of the reply itself. A model asked like that would have to
write its own header. What the header is can be read off from a reply's turn, and the template is given it as its
generation prompt: here, in the copy beside the adapter, and in whatever is made of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from slimtune.data.fit import with_parts
from slimtune.data.template import ChatTemplate, TemplateRefused, common_length

__all__ = ["added_header", "completed"]

_ASK = {"role": "user", "content": "qzuser"}
_NEXT = {"role": "user", "content": "qznext"}
_ANSWER = {"role": "assistant", "content": "qzreply"}
_THOUGHT = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "qzthought")
_CALLS = [{"id": "call00000", "type": "function", "function": {"name": "qztool", "arguments": {"qzarg": "qzvalue"}}}]
_REPLIES: tuple[dict[str, Any], ...] = (
    _ANSWER,
    {**_ANSWER, **_THOUGHT},
    {"role": "assistant", "content": "", "tool_calls": _CALLS},
)
_OPENS = re.compile(r"(?:(<[^<>\s]*>|\[[^\[\]\s]*\])|(?<!\S)([^\s<\[]\S*))\s*\Z")
"""What opens a thought: a tag, or a word."""
_ADDED = re.compile(r'\{\{ ("(?:[^"\\]|\\.)*") if add_generation_prompt else "" \}\}\Z')

Message = dict[str, Any]


def completed(source: str, variables: Mapping[str, Any]) -> str:
    """The template with the reply's header as its generation prompt, where it has none that says whose turn it is.

    Args:
        source: The Jinja source.
        variables: What it may use beside messages: ``bos_token``, ``eos_token``.

    Returns:
        The source as it is where nothing is missing, or where it renders no question and answer: whoever renders with
        it says so.
    """
    try:
        template = ChatTemplate(source, variables)
    except TemplateRefused:
        return source
    for as_parts in (False, True):
        header = _missing(template, as_parts)
        if header is not None:
            break
    if not header:
        return source
    # Jinja drops one newline at the end of a template.
    literal = json.dumps(header, ensure_ascii=False)
    return f'{source.removesuffix(chr(10))}{{{{ {literal} if add_generation_prompt else "" }}}}'


def added_header(source: str) -> str | None:
    """The header that :func:`completed` gave a template; None if it gave none."""
    found = _ADDED.search(source)
    return str(json.loads(found[1])) if found else None


def _missing(template: ChatTemplate, as_parts: bool) -> str | None:
    """What a reply's turn begins with that the generation prompt lacks, or "" if that is nothing or the model's own to
    write; None if the template doesn't take the messages."""

    def text(*messages: Message, prompt: bool = False) -> str:
        made = [with_parts(message) for message in messages] if as_parts else list(messages)
        try:
            return template.render(made, None, add_generation_prompt=prompt)
        except TemplateRefused:
            return ""

    turns, prompt, whole = text(_ASK), text(_ASK, prompt=True), text(_ASK, _ANSWER)
    longer = text(_ASK, _ANSWER, _NEXT)
    if "qzuser" not in turns or "qzreply" not in whole:
        return None
    if not prompt.startswith(turns) or not whole.startswith(prompt):
        return ""
    asked = prompt.removeprefix(turns)
    after = whole.rpartition("qzreply")[2]
    behind = longer.rpartition("qzreply")[2].partition("qznext")[0]
    at_the_end = after[common_length(after, behind) :].strip()
    if not asked and at_the_end and turns.rstrip().endswith(at_the_end):
        return ""  # a header stands at the end of every conversation, asked for or not
    if asked.strip() and asked.strip() not in behind:
        return ""  # what is asked for stands before the assistant's turns alone
    begins = [text(_ASK, reply).removeprefix(prompt) for reply in _REPLIES]
    return _header([turn for turn in begins if "qz" in turn])


def _header(turns: list[str]) -> str:
    """What replies' turns of all kinds begin with, without what opens a thought: that is the model's to write. So are
    spaces at its end, as the generation prompts of published templates have it."""
    starts = [turn.partition("qz")[0] for turn in turns]
    header = starts[0][: min(common_length(starts[0], start) for start in starts)]
    for turn, start in zip(turns, starts, strict=True):
        opens = _OPENS.search(start) if turn.startswith(f"{start}qzthought") else None
        if opens is not None:
            header = header.partition(opens[1] or opens[2])[0]
    header = header.rstrip(" \t")
    return header if header.strip() else ""
