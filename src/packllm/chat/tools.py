"""Tools that a caller may offer, and calls of them."""

from __future__ import annotations

import json
import secrets
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packllm.errors import OptionError, shown

Tool = Mapping[str, Any]
CHOICES = ("auto", "none", "any")
RESERVED = (*CHOICES, "required")

_ID_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolCall:
    """A tool call that a member made: the tool's name and its arguments. `id` is unique."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class InvalidToolCall:
    """A tool call that cannot be parsed: its text and what is wrong with it."""

    id: str
    name: str
    arguments: str
    error: str


@dataclass(frozen=True)
class ParsedAnswer:
    """A parsed answer: the text beside the calls, the calls in order, invalid calls, and the reasoning."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    invalid: tuple[InvalidToolCall, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True)
class CallPart:
    """A piece of a call in a streamed answer.

    Attributes:
        index: number of the call in the answer, invalid calls included.
        id, name: of the call; on its first part only.
        arguments: a piece of the JSON text of the arguments; joined, the pieces are the complete text.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


def new_call_id() -> str:
    """Nine letters and digits: unique, and in the format that Mistral's templates require."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


def check_tools(tools: Sequence[Tool], tool_choice: str | None, json_schema: Mapping[str, Any] | None) -> None:
    """Raise OptionError unless the three are valid, alone and together."""
    if not isinstance(tools, list | tuple):
        raise OptionError(f"tools={shown(tools)} is no list; give a list of tools")
    names = [_checked_name(tool, at) for at, tool in enumerate(tools)]
    for name, count in Counter(names).items():
        if count > 1:
            raise OptionError(f"tools: {count} tools of the name {name!r}; give each its own name")
        if name in RESERVED:
            raise OptionError(f"a tool is called {name!r}, which is a value of tool_choice; rename the tool")
    if tool_choice is not None and not tools:
        raise OptionError(f"tool_choice={tool_choice!r} without tools; give tools, or leave tool_choice out")
    if tool_choice is not None and tool_choice not in (*CHOICES, *names):
        raise OptionError(f"tool_choice={tool_choice!r} is none of {', '.join(map(repr, (*CHOICES, *names)))}")
    if json_schema is not None:
        _check_json(json_schema, "json_schema")
        if tool_choice not in (None, "auto", "none"):
            raise OptionError(
                f"tool_choice={tool_choice!r} demands a tool call and json_schema demands an answer; "
                f"give one of them, or tool_choice='auto' to leave the choice to the model"
            )


def _checked_name(tool: Any, at: int) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or str(tool.get("type", "function")) != "function":
        raise OptionError(
            f'tools[{at}] must look like {{"type": "function", "function": {{"name": ..., "description": ..., '
            f'"parameters": JSON schema}}}}, not {shown(tool)}'
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise OptionError(f"tools[{at}] has the name {shown(name)}; a tool's name is text of at least one character")
    if not isinstance(parameters, Mapping | None):
        raise OptionError(
            f"parameters of the tool {name!r} must be a JSON schema of an object, not {shown(parameters)}"
        )
    _check_json(tool, f"the tool {name!r}")
    if parameters and parameters.get("type", "object") != "object":
        raise OptionError(f"parameters of the tool {name!r} must have type 'object', not {shown(parameters['type'])}")
    return name


def _check_json(value: Any, what: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{what} is not JSON: {error}") from None


def tool_parameters(tool: Tool) -> Mapping[str, Any]:
    """The JSON schema of a checked tool's arguments."""
    return tool["function"].get("parameters") or {}
