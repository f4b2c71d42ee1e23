"""What becomes of a conversation that doesn't fit into ``max_length``. No reply is ever cut, and none is learnt that
wouldn't be learnt of the whole.

``split`` makes several documents of it, each beginning with the system turn; ``keep-end`` leaves the oldest exchanges
out, and at last the beginning of the first user turn. Raw text is cut where the limit is: it has no replies.
"""

from __future__ import annotations

import itertools

from slimtune.data.conversation import SYSTEM_ROLES, Conversation, Message, RowRefused
from slimtune.data.documents import Mask
from slimtune.data.render import ChatRenderer, learnt
from slimtune.data.tokens import Ids

__all__ = ["keep_end", "split"]

Encoded = list[tuple[Ids, Mask]]


def split(conversation: Conversation, renderer: ChatRenderer, train_on: str, limit: int) -> Encoded | None:
    """The conversation as several documents of at most ``limit`` tokens, or None if one exchange alone is longer."""
    if conversation.text is not None:
        conversation.repairs.append("split")
        ids, mask = _encode(conversation, renderer, train_on)[0]
        return [(ids[at : at + limit], mask[at : at + limit]) for at in range(0, len(ids), limit) if len(ids) - at > 1]
    head, exchanges = _exchanges(learnt(conversation, train_on))
    made: Encoded = []
    current: list[Message] = []
    fitting: Encoded | None = None
    for exchange in exchanges:
        longer = _fit(conversation, head + current + exchange, renderer, train_on, limit)
        if longer is not None:
            current, fitting = current + exchange, longer
            continue
        alone = _fit(conversation, head + exchange, renderer, train_on, limit)
        if fitting is None or alone is None:
            return None
        made += fitting
        current, fitting = exchange, alone
    conversation.repairs.append("split")
    return made + (fitting or [])


def keep_end(conversation: Conversation, renderer: ChatRenderer, train_on: str, limit: int) -> Encoded | None:
    """The end of the conversation that fits into ``limit`` tokens, or None if the last reply alone doesn't."""
    if conversation.text is not None:
        conversation.repairs.append("cut-left")
        ids, mask = _encode(conversation, renderer, train_on)[0]
        return [(ids[-limit:], mask[-limit:])]
    head, exchanges = _exchanges(learnt(conversation, train_on))
    for first in range(1, len(exchanges)):
        kept = [message for exchange in exchanges[first:] for message in exchange]
        fitting = _fit(conversation, head + kept, renderer, train_on, limit)
        if fitting is not None:
            conversation.repairs.append("oldest-dropped")
            return fitting
    return _cut_first_turn(conversation, head, exchanges[-1], renderer, train_on, limit)


def _cut_first_turn(
    conversation: Conversation,
    head: list[Message],
    exchange: list[Message],
    renderer: ChatRenderer,
    train_on: str,
    limit: int,
) -> Encoded | None:
    """Shorten the user's text from its beginning until the last exchange fits: bisection over its characters."""
    text = str(exchange[0]["content"])
    low, high = 0, len(text)
    best: Encoded | None = None
    while high - low > 8:
        kept = (low + high) // 2
        end = text[len(text) - kept :]
        shorter = [{**exchange[0], "content": end}, *exchange[1:]]
        fitting = _fit(conversation, head + shorter, renderer, train_on, limit) if end.strip() else None
        if fitting is None:
            high = kept
        else:
            low, best = kept, fitting
    if best is not None:
        conversation.repairs.append("cut-left")
    return best


def _exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system turns, and the rest cut before each user turn that follows a reply."""
    head = list(itertools.takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages))
    made: list[list[Message]] = []
    for message in messages[len(head) :]:
        if not made or (message["role"] == "user" and made[-1][-1]["role"] != "user"):
            made.append([])
        made[-1].append(message)
    return head, made


def _fit(
    conversation: Conversation, messages: list[Message], renderer: ChatRenderer, train_on: str, limit: int
) -> Encoded | None:
    """Marked messages as documents of at most ``limit`` tokens, or None."""
    part = Conversation(messages, conversation.tools, variables=conversation.variables)
    try:
        encoded = _encode(part, renderer, "all" if train_on == "all" else "assistant")
    except RowRefused as refused:
        return [] if refused.name == "nothing-to-learn" else None
    return encoded if all(len(ids) <= limit for ids, _ in encoded) else None


def _encode(conversation: Conversation, renderer: ChatRenderer, train_on: str) -> Encoded:
    return renderer.encoder.encode([draft.pieces for draft in renderer.drafts(conversation, train_on)])
