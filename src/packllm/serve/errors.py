"""Errors in OpenAI's format: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from packllm.errors import (
    AnswerTimeout,
    CancelledError,
    ContextOverflowError,
    ExtraError,
    LoadError,
    MemberError,
    PackError,
    StructureError,
)

logger = logging.getLogger("packllm.serve")


class ServeError(Exception):
    """A request that the server itself rejects.

    Attributes:
        status: HTTP status.
        code: error code for programs, or None.
        headers: headers of the response.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def dumps(value: Any) -> bytes:
    """Compact JSON. A lone surrogate, which UTF-8 cannot encode, is escaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def told(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error response. Internal errors are logged."""
    status, code, param, headers = 500, None, None, {}
    message = str(error)
    if isinstance(error, ServeError):
        status, code, headers = error.status, error.code, error.headers
    elif isinstance(error, RequestValidationError | ValidationError):
        status, (param, message) = 400, _invalid(error)
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
    elif isinstance(error, AnswerTimeout | TimeoutError):
        status, code = 504, "timeout"
        headers = {"x-should-retry": "false"}  # OpenAI's clients would retry the same request
        message = message or "the answer was not complete in time; lower max_tokens, or use stream"
    elif isinstance(error, ContextOverflowError):
        status, code, param = 400, "context_length_exceeded", "messages"
    elif isinstance(error, ExtraError):
        status, code = 501, "not_installed"
    elif isinstance(error, CancelledError | LoadError):
        status, code, headers = 503, "unavailable", {"retry-after": "5"}
    elif isinstance(error, PackError) and not isinstance(error, MemberError | StructureError):
        status = 400
        match = re.match(r"(\w+)=", message)
        param = match[1] if match else None
    elif isinstance(error, MemberError | StructureError):
        code = "member_failed" if isinstance(error, MemberError) else "structure"
        logger.error("%s: %s", type(error).__name__, message, exc_info=error.__cause__)
    else:
        message = "internal server error; see the server's log"
        logger.error("a request failed", exc_info=error)
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers


def response_of(error: BaseException) -> Response:
    """The response for an error."""
    status, body, headers = told(error)
    return Response(dumps(body), status, headers, "application/json")


def _invalid(error: RequestValidationError | ValidationError) -> tuple[str | None, str]:
    """The invalid field of a body, and a message."""
    first = error.errors()[0]
    name = next((str(part) for part in first["loc"] if part != "body"), None)
    if name is None:
        return None, "the body must be a JSON object, sent with Content-Type: application/json"
    return name, f"{name}: {first['msg']}"
