"""Errors in OpenAI's format: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Callable
from contextvars import ContextVar
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
    unquoted,
)

BLOCK = 1000
"""Items of a list that are encoded together."""

logger = logging.getLogger("packllm.serve")

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request that is being answered, for logs."""


class ServeError(Exception):
    """A request that the server itself rejects.

    Attributes:
        status: HTTP status.
        code: error code for programs, or None.
        param: the field that is at fault, or None.
        headers: headers of the response.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def dumps(value: Any, depth: int = 5) -> bytes:
    """Compact JSON. A lone surrogate, which UTF-8 cannot encode, is escaped. Large values are encoded in parts, as json
    holds Python's lock until it is done."""
    if depth and isinstance(value, dict) and value:
        pairs = (dumps(str(key), 0) + b":" + dumps(one, depth - 1) for key, one in value.items())
        return b"{" + b",".join(pairs) + b"}"
    if depth and isinstance(value, list) and value:
        if isinstance(value[0], dict | list):
            parts = [dumps(one, depth - 1) for one in value]
        else:
            parts = [dumps(value[at : at + BLOCK], 0)[1:-1] for at in range(0, len(value), BLOCK)]
        return b"[" + b",".join(parts) + b"]"
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def field_of(option: str) -> str | None:
    """The request's field that an error of the pack is about, where fields and options have the same names."""
    return None if option == "messages" else option


def told(
    error: BaseException, named: Callable[[str], str | None] = field_of
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error response. Internal errors are logged.

    Args:
        named: the request's field for an option of the pack, see Body.named.
    """
    status, code, param, headers = 500, None, None, {}
    message = "" if isinstance(error, RequestValidationError | ValidationError) else str(error)
    if isinstance(error, ServeError):
        status, code, param, headers = error.status, error.code, error.param, error.headers
    elif isinstance(error, RequestValidationError):
        status, (param, message) = 400, _invalid(error, str)  # of fields, not of options
    elif isinstance(error, ValidationError):
        status, (param, message) = 400, _invalid(error, named)
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
        if error.__cause__ is not None:  # the body could not be parsed
            message = f"the body cannot be read as JSON in UTF-8: {error.__cause__}"
    elif isinstance(error, AnswerTimeout | TimeoutError):
        status, code = 504, "timeout"
        headers = {"x-should-retry": "false"}  # OpenAI's clients would retry the same request
        message = message or "the answer was not complete in time; lower max_tokens, or use stream"
    elif isinstance(error, ContextOverflowError):
        status, code, param = 400, "context_length_exceeded", named("messages")
        if error.text is not None and (match := re.match(r"\w+", error.text)):
            param = named(match[0])
            message = message.replace(error.text, f"{param or match[0]}{error.text[match.end() :]}")
    elif isinstance(error, ExtraError):
        status, code = 501, "not_installed"
    elif isinstance(error, CancelledError | LoadError):
        status, code, headers = 503, "unavailable", {"retry-after": "5"}
    elif isinstance(error, PackError) and not isinstance(error, MemberError | StructureError):
        status, (param, message) = 400, _faulty(message, named)
    elif isinstance(error, MemberError | StructureError):
        code = "member_failed" if isinstance(error, MemberError) else "structure"
        _log(error)
    else:
        message = "internal server error; see the server's log"
        _log(error)
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers


def _log(error: BaseException) -> None:
    """Log an error and its causes, without text of prompts and answers."""
    if isinstance(error, StructureError):  # its message quotes the answer
        logger.error("request %s failed: two answers violated their schema", request_id.get())
    else:
        details = unquoted(error, "".join(traceback.format_exception(error)).rstrip())
        logger.error("request %s failed\n%s", request_id.get(), details)


def response_of(error: BaseException, named: Callable[[str], str | None] = field_of) -> Response:
    """The response for an error, see told()."""
    status, body, headers = told(error, named)
    return Response(dumps(body), status, headers, "application/json")


def _faulty(message: str, named: Callable[[str], str | None]) -> tuple[str | None, str]:
    """The field that an error of the pack is about, and the message with this field's name."""
    for beginning, option in (
        (r"message \d+ |(the )?prompt('s)? ", "messages"),
        (r"(parameters of )?the tool |a tool ", "tools"),
    ):
        if re.match(beginning, message):
            return named(option), message
    match = re.match(r"(\w+)(?==|: |\[| must be | cannot be )", message)
    if match is None:
        return None, message
    field = named(match[1])
    return field, message if field in (None, "packllm") else f"{field}{message[match.end() :]}"


def _invalid(
    error: RequestValidationError | ValidationError, named: Callable[[str], str | None]
) -> tuple[str | None, str]:
    """The invalid field of a body, and a message."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    name = next((str(part) for part in first["loc"] if part != "body"), None)
    if name is not None:
        return _faulty(f"{name}: {message}", named)
    if isinstance(first["input"], dict):
        return _faulty(message, named)
    return None, "the body must be a JSON object, sent with Content-Type: application/json"
