"""Errors as OpenAI's clients expect them: a status, and {"error": {"message", "type", "param", "code"}}."""

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
    """What the server itself refuses.

    Attributes:
        status: of the answer.
        code: for programs, or None.
        headers: that go along.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def dumps(value: Any) -> bytes:
    """JSON. A lone surrogate, which a client may send and UTF-8 has not, goes out as the escape that it came as."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def told(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """The status, the body and the headers that tell of an error. What is nobody's fault but ours is logged."""
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
        headers = {"x-should-retry": "false"}  # OpenAI's clients would ask the same again
        message = message or "the answer was not whole in time; lower max_tokens, or stream"
    elif isinstance(error, ContextOverflowError):
        status, code, param = 400, "context_length_exceeded", "messages"
    elif isinstance(error, ExtraError):
        status, code = 501, "not_installed"
    elif isinstance(error, CancelledError | LoadError):
        status, code, headers = 503, "unavailable", {"retry-after": "5"}
    elif isinstance(error, PackError) and not isinstance(error, MemberError | StructureError):
        status = 400
        found = re.match(r"(\w+)=", message)
        param = found[1] if found else None
    elif isinstance(error, MemberError | StructureError):
        code = "member_failed" if isinstance(error, MemberError) else "structure"
        logger.error("%s: %s", type(error).__name__, message, exc_info=error.__cause__)
    else:
        message = "the server failed; its log says why"
        logger.error("a request failed", exc_info=error)
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers


def response_of(error: BaseException) -> Response:
    """The whole answer that tells of an error."""
    status, body, headers = told(error)
    return Response(dumps(body), status, headers, "application/json")


def _invalid(error: RequestValidationError | ValidationError) -> tuple[str | None, str]:
    """Which field of a body is wrong, and how."""
    first = error.errors()[0]
    name = next((str(part) for part in first["loc"] if part != "body"), None)
    if name is None:
        return None, "the body must be a JSON object, sent with Content-Type: application/json"
    return name, f"{name}: {first['msg']}"
