"""The demo's task: requests to a home become one strict JSON object.

The rows are written for slimtune. They are built from a few lists, so what is held out is held out for certain: no
held-out row shares its (device, room, action) with a training row, and some of its wordings were never trained on.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from typing import Any

__all__ = ["DEMO_REPLY_TOKENS", "DEMO_SETTINGS", "HELD_OUT", "TRAINING_ROWS", "Row", "is_right", "rows"]

TRAINING_ROWS = 200
HELD_OUT = 20
DEMO_REPLY_TOKENS = 32
"""More than any right answer needs, so that a reply that doesn't stop is seen to go on."""
DEMO_SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "epochs": 1,
    "max_length": 256,
    "micro_batch": 1,
    "gradient_accumulation": 1,
    "eval_share": 0.0,
}
"""A high learning rate and many small steps: few tokens have to teach it on two CPU cores. No row is held out: the
demo's own requests say what it learned."""

ROOMS = ("kitchen", "bedroom", "bathroom", "living room", "hallway", "office", "garage", "attic", "cellar", "nursery")
ACTIONS = {
    "light": ("on", "off"),
    "fan": ("on", "off"),
    "heater": ("on", "off"),
    "radio": ("on", "off"),
    "window": ("open", "close"),
    "door": ("open", "close"),
    "curtain": ("open", "close"),
    "blind": ("open", "close"),
}
WORDINGS = {
    ("on", "off"): (
        "Turn {action} the {device} in the {room}.",
        "Turn the {room} {device} {action}, please.",
        "Please switch {action} the {room} {device}.",
        "Could you switch the {device} in the {room} {action}?",
        "I want the {device} {action} in the {room}.",
        "{room} {device} {action}, please!",
        "The {device} in the {room} should be {action} now.",
        "Switch the {room} {device} {action}.",
        "Could you turn {action} the {device} in the {room}?",
    ),
    ("open", "close"): (
        "{action} the {device} in the {room}.",
        "Please {action} the {room} {device}.",
        "Could you {action} the {device} in the {room}?",
        "I would like you to {action} the {room} {device}.",
        "{room}: {action} the {device}, please!",
        "It is time to {action} the {device} in the {room}.",
        "{action} the {room} {device} now.",
        "I want you to {action} the {device} in the {room}.",
    ),
}
# Only held-out rows use these.
NEW_WORDINGS = {
    ("on", "off"): ("Hey, would you turn {action} the {device} in the {room} for me?",),
    ("open", "close"): ("Hey, would you {action} the {device} in the {room} for me?",),
}


@dataclass(frozen=True)
class Row:
    """One request and the object that answers it."""

    request: str
    answer: dict[str, str]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The row as a conversation; the reply is compact JSON."""
        return [{"role": "user", "content": self.request}, {"role": "assistant", "content": json.dumps(self.answer)}]


def rows() -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows): always the same ones."""
    draw = random.Random(2024)
    combinations = [
        (device, room, action)
        for device, actions in ACTIONS.items()
        for room, action in itertools.product(ROOMS, actions)
    ]
    draw.shuffle(combinations)
    held, trained = combinations[:HELD_OUT], combinations[HELD_OUT:]
    # Each combination and each wording as often as any other, so that few rows show them all.
    turns = {kind: itertools.cycle(wordings) for kind, wordings in WORDINGS.items()}
    chosen = itertools.islice(itertools.cycle(trained), TRAINING_ROWS)
    training = [_row(combination, next(turns[ACTIONS[combination[0]]])) for combination in chosen]
    held_out = []
    for number, combination in enumerate(held):
        kind = ACTIONS[combination[0]]
        known = WORDINGS[kind]
        # Every other held-out row has a wording that training never saw.
        wording = NEW_WORDINGS[kind][0] if number % 2 else known[number // 2 % len(known)]
        held_out.append(_row(combination, wording))
    return training, held_out


def is_right(reply: str, answer: dict[str, str]) -> bool:
    """Whether the whole reply is one JSON object equal to the answer: nothing before it, nothing after it."""
    try:
        value: Any = json.loads(reply)
    except ValueError:
        return False
    return bool(value == answer) and reply == reply.strip()


def _row(combination: tuple[str, str, str], wording: str) -> Row:
    device, room, action = combination
    request = wording.format(device=device, room=room, action=action)
    return Row(request[0].upper() + request[1:], {"device": device, "room": room, "action": action})
