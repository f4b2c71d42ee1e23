"""Everything that a client is refused for, in OpenAI's error format."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

__all__ = ["Refusal"]

_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: The HTTP status.
        message: What is wrong, for a person.
        code: The same for a program.
        param: The request's field that it is about.
        retry_after: Seconds after which it is worth trying again.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def content(self) -> dict[str, Any]:
        """The body, as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.content(), self.status, headers)
