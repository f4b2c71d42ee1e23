"""What OpenAI's clients may ask for, checked field by field, and the shapes of what they get.

Source: OpenAI's API reference, "Chat" and "Completions". A field that would change the answer and that nothing here
honours is refused, never ignored: a client must not believe that it got what it asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from slimtune.serve.limits import Limits
from slimtune.serve.messages import Message
from slimtune.serve.refusal import Refusal
from slimtune.use.sampling import LEAST

__all__ = ["ChatRequest", "CompletionRequest", "Request", "read"]

Stop = Annotated[str, Field(min_length=1, max_length=256)]
# A message's text, role and marks are this many tokens at least.
_MESSAGE_TOKENS = 4
R = TypeVar("R", bound="Request")
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[int, Field(ge=1, le=1)]


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = False


class Request(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    """Greedy (0) unless given, as every verb of slimtune."""
    top_p: Annotated[float, Field(ge=LEAST, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: One | None = 1

    # Honoured at their neutral value only.
    frequency_penalty: Zero | None = 0.0
    presence_penalty: Zero | None = 0.0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    # Words to OpenAI's own service, without bearing on an answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for wrong, words in self._conflicts():
            if wrong:
                raise ValueError(words)
        return self

    def _conflicts(self) -> list[tuple[bool, str]]:
        """What may not be together: whether it is, and what to say of it."""
        return [
            (
                self.temperature is not None and 0 < self.temperature < LEAST,
                f"temperature is 0 or at least {LEAST:g}",
            ),
            (self.stream_options is not None and not self.stream, "stream_options goes with stream: true"),
        ]

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The field that bounds the reply, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens to show beside each; None for no log probabilities."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Function(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: _Function


class _Named(_Strict):
    name: str


class _NamedTool(_Strict):
    type: Literal["function"]
    function: _Named


class _TextFormat(_Strict):
    type: Literal["text"]


class _ObjectFormat(_Strict):
    type: Literal["json_object"]


class _Schema(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class _SchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: _Schema


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | _NamedTool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    response_format: Annotated[_TextFormat | _ObjectFormat | _SchemaFormat, Field(discriminator="type")] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def _conflicts(self) -> list[tuple[bool, str]]:
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        return [
            *super()._conflicts(),
            (self.top_logprobs is not None and not self.logprobs, "top_logprobs goes with logprobs: true"),
            (self.tool_choice is not None and not self.tools, "tool_choice goes with tools"),
            (len(self._names) > len(set(self._names)), "two of the tools have the same name"),
            (
                isinstance(self.tool_choice, _NamedTool) and self.tool_choice.function.name not in self._names,
                "tool_choice names a tool that isn't among the tools",
            ),
            (
                bool(self.shown_tools) and self.wanted_schema is not None,
                "response_format doesn't go with tools: a call has a form of its own",
            ),
            (self.parallel_tool_calls is not None and not self.tools, "parallel_tool_calls goes with tools"),
            (
                both and self.max_tokens != self.max_completion_tokens,
                "max_tokens is the old name of max_completion_tokens; they differ",
            ),
        ]

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages as plain values, without what is null."""
        return [message.model_dump(exclude_none=True) for message in self.messages]

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The newer name goes first."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().wanted_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """``top_logprobs`` where ``logprobs`` is on."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the template gets."""
        if self.tool_choice == "none" or not self.tools:
            return None
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]

    @property
    def _names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or []]

    @property
    def must_call(self) -> dict[str, dict[str, Any]] | None:
        """By tool, its arguments' schema, where the reply has to be a call of one of these."""
        if self.tool_choice != "required" and not isinstance(self.tool_choice, _NamedTool):
            return None
        only = None if self.tool_choice == "required" else self.tool_choice.function.name
        functions = [tool.function for tool in self.tools or [] if only in (None, tool.function.name)]
        # As OpenAI's reference has it, one without parameters takes none.
        return {f.name: {"additionalProperties": False} if f.parameters is None else f.parameters for f in functions}

    @property
    def one_call(self) -> bool:
        """Whether there may be no more than one."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, _NamedTool)

    @property
    def strict_schemas(self) -> dict[str, dict[str, Any]]:
        """By tool, the schema that its calls are promised to fit."""
        functions = [tool.function for tool in self.tools or [] if tool.function.strict]
        return {function.name: function.parameters or {"type": "object"} for function in functions}

    @property
    def wanted_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the reply has to fit; None if any text will do."""
        match self.response_format:
            case _ObjectFormat():
                return {"type": "object"}
            case _SchemaFormat(json_schema=wanted):
                return wanted.schema_
        return None


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = False
    best_of: One | None = 1
    suffix: None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """As given."""
        return self.logprobs


def read(kind: type[R], body: bytes, limits: Limits) -> R:
    """The request in ``body``.

    Raises:
        Refusal: It isn't JSON, a field is missing, unknown, of the wrong kind or not honoured, or over a limit (400).
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(error, body) from None
    name, wanted = request.wanted_tokens
    if wanted is not None and wanted > limits.output_tokens:
        raise Refusal(400, f"{name} is {wanted}; this server gives {limits.output_tokens}", "too_long", param=name)
    if isinstance(request, ChatRequest) and len(request.messages) * _MESSAGE_TOKENS > limits.prompt_tokens:
        # Said before any of them is rendered, for the time that takes grows with the square of their number.
        raise Refusal(400, "too many messages", "context_length_exceeded", param="messages")
    return request


def _refused(error: ValidationError, body: bytes) -> Refusal:
    """One fault, in words that name the field."""
    # Where a field may be of several kinds there is a fault for each. What is wrong with the kind that was given says
    # more than that it is none of the others, and what went wrong deepest inside says most.
    first = max(
        error.errors(include_url=False, include_context=False, include_input=False),
        key=lambda fault: (not fault["type"].endswith("_type"), len(fault["loc"])),
    )
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['msg']}", "invalid_json")
    param = _place(first["loc"], from_json(body), missing=first["type"] == "missing")
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"unknown or unsupported parameter: {json.dumps(param)}", "unknown_parameter", param=param)
    words = first["msg"].removeprefix("Value error, ")
    return Refusal(400, f"{param}: {words}" if param else words, "invalid_value", param=param)


def _place(location: Sequence[str | int], value: Any, *, missing: bool) -> str | None:
    """Where in a body something is, as clients write it: ``messages[0].content``.

    Pydantic names a field's kinds in between, which the body knows nothing of.

    Args:
        location: Pydantic's.
        value: The body.
        missing: Whether the last part isn't there.
    """
    place = f".{location[-1]}" if missing else ""
    at = ""
    for part in location:
        if isinstance(value, dict) and part in value:
            value, at = value[part], f"{at}.{part}"
        elif isinstance(value, list) and isinstance(part, int):
            value, at = value[part], f"{at}[{part}]"
    return (at + place).removeprefix(".") or None
