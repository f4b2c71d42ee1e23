"""The messages of a chat request, key by key, as OpenAI's API documents them; what isn't shown to the model is refused.

Source: OpenAI's API reference, "Create chat completion", ``messages``. ``reasoning_content`` is vLLM's and DeepSeek's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Message"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Strict):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[_Text], Field(min_length=1)]


class _Function(_Strict):
    name: str
    arguments: str


class _Call(_Strict):
    id: str
    type: Literal["function"]
    function: _Function


class _System(_Strict):
    role: Literal["system", "developer"]
    content: Content


class _User(_Strict):
    role: Literal["user"]
    content: Content


class _Assistant(_Strict):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[_Call], Field(min_length=1)] | None = None

    # There in answers, which clients give back as they are; never with a value in answers of ours.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None


class _Tool(_Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[_System | _User | _Assistant | _Tool, Field(discriminator="role")]
"""One message. A ``name`` of who speaks is refused: no template is known to show it."""
