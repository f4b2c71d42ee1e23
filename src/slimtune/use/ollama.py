"""An Ollama Modelfile that asks the model as training did.

Ollama's templates are Go's, the trained one is Jinja. The parts that a chat template puts around each turn are found by
rendering marked conversations; the Go template made of them is then rendered here and held to the Jinja one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from slimtune.data.render import Manner, renderer_for

__all__ = ["Turns", "modelfile", "read_turns"]

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around each turn."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    default_system: str

    def render(self, messages: Messages) -> str:
        """As the Go template renders it, with the start of the assistant's turn at the end."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        if self.default_system and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        return "".join(around[m["role"]][0] + m["content"] + around[m["role"]][1] for m in messages) + self.assistant[0]


def read_turns(tokenizer: PreTrainedTokenizerBase, manner: Manner | None = None) -> Turns | None:
    """The parts of the tokenizer's template; None if it is no plain sequence of turns."""
    system, ask, answer = ({"role": role, "content": f"qz{role}qz"} for role in ("system", "user", "assistant"))

    renderer = renderer_for(tokenizer, manner)

    def text(*messages: dict[str, str], prompt: bool = False) -> str:
        return renderer.text(list(messages), prompt=prompt)

    user_end = text(ask).partition(ask["content"])[2]
    opened = text(ask, prompt=True).partition(ask["content"])[2]
    if not opened.startswith(user_end):
        return None
    assistant_start = opened[len(user_end) :]
    assistant_end = text(ask, answer).partition(answer["content"])[2]
    between = text(ask, answer, ask).partition(answer["content"])[2].partition(ask["content"])[0]
    user_start = between.removeprefix(assistant_end)
    head, _, after = text(system, ask).partition(system["content"])
    system_end = after.partition(ask["content"])[0].removesuffix(user_start)
    bare = text(ask).partition(ask["content"])[0].removesuffix(user_start)
    default = bare.removeprefix(head).removesuffix(system_end) if bare.startswith(head) else ""
    # A beginning-of-text token is llama.cpp's to add: the file says whether it does.
    bos = tokenizer.bos_token or ""
    if bos and head.startswith(bos) and not user_start.startswith(bos):
        head = head.removeprefix(bos)
    turns = Turns((head, system_end), (user_start, user_end), (assistant_start, assistant_end), default)
    for messages in ([ask], [system, ask], [ask, answer, ask], [system, ask, answer, ask]):
        if turns.render(messages) != text(*messages, prompt=True).removeprefix("" if turns.system[0] == head else bos):
            return None
    return turns


def modelfile(
    gguf_name: str,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    context: int,
    manner: Manner | None = None,
) -> str:
    """The Modelfile's text: the file, the template, the stop tokens, the context that was trained."""
    lines = [f"FROM ./{gguf_name}"]
    turns = read_turns(tokenizer, manner)
    if turns is None:
        lines.append("# The chat template is no plain sequence of turns: Ollama reads it from the file itself.")
    else:
        lines.append(f'TEMPLATE """{_go(turns)}"""')
        if turns.default_system:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(stop)}"' for stop in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    # Greedy, as slimtune's own verbs answer unless told otherwise.
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def _go(turns: Turns) -> str:
    def turn(around: tuple[str, str]) -> str:
        return f"{around[0]}{{{{ .Content }}}}{around[1]}"

    return (
        '{{ range .Messages }}{{ if eq .Role "system" }}'
        + turn(turns.system)
        + '{{ else if eq .Role "user" }}'
        + turn(turns.user)
        + '{{ else if eq .Role "assistant" }}'
        + turn(turns.assistant)
        + "{{ end }}{{ end }}"
        + turns.assistant[0]
    )
