"""Structured output for LangChain: JSON schemas of everything that it accepts as a schema, and answer parsers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from operator import itemgetter
from typing import Any, is_typeddict

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import (
    BaseOutputParser,
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError

import packllm
from packllm import schema_of_type

METHODS = ("json_schema", "function_calling", "json_mode")
_UNNAMED = "answer"  # name of a tool whose schema has no title


def schema_of(schema: Any) -> dict[str, Any]:
    """The JSON schema of a class, an OpenAI function or OpenAI's response_format. A JSON schema is returned
    unchanged."""
    if isinstance(schema, Mapping):
        if schema.get("type") == "json_schema":
            return dict(schema["json_schema"]["schema"])
        if schema.get("type") == "json_object":
            return {"type": "object"}
        functions = {"parameters", "input_schema", "function"}
        return convert_to_json_schema(dict(schema)) if schema.keys() & functions else dict(schema)
    if _is_read_whole(schema):
        return schema_of_type(schema)
    with_definitions: dict[str, Any] = {}
    if is_typeddict(schema):
        with suppress(PydanticUserError):
            with_definitions = schema_of_type(schema)
    # LangChain adds the descriptions of a TypedDict, but inlines definitions, which fails for recursive ones.
    return with_definitions if "$defs" in with_definitions else convert_to_json_schema(schema)


def tool_of(tool_like: dict[str, Any] | type | Callable | BaseTool, strict: bool | None = None) -> dict[str, Any]:
    """OpenAI's description of a tool; recursive classes are kept recursive."""
    if isinstance(tool_like, Mapping) and _is_schema(tool_like):
        header = {"name": tool_like.get("title") or _UNNAMED, "description": tool_like.get("description", "")}
        if tool_like.get("type", "object") != "object":
            raise packllm.OptionError(
                f"the arguments of a call are an object, but the schema has type {tool_like['type']!r}; "
                f"use method='json_schema', or make it a property of an object"
            )
        parameters = {key: value for key, value in tool_like.items() if key not in ("title", "description")}
        return {"type": "function", "function": {**header, "parameters": parameters}}
    tool = convert_to_openai_tool(tool_like, strict=strict)
    kind = tool_like.tool_call_schema if isinstance(tool_like, BaseTool) else tool_like
    if _is_model(kind) and _circles(full_schema := schema_of_type(kind)):
        parameters = {key: value for key, value in full_schema.items() if key not in ("title", "description")}
        return {**tool, "function": {**tool["function"], "parameters": parameters}}
    return tool


def structured_output(
    bind: Callable[..., Runnable[LanguageModelInput, AIMessage]],
    schema: dict[str, Any] | type,
    method: str,
    include_raw: bool,
    strict: bool | None,
    kwargs: Mapping[str, Any],
) -> Runnable[LanguageModelInput, Any]:
    """The result of ChatPackLLM.with_structured_output; `bind` binds options to the model."""
    if method not in METHODS:
        raise packllm.OptionError(f"method={method!r} is unknown; valid: {', '.join(METHODS)}")
    trace_metadata = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema}}
    parser: BaseOutputParser
    if method == "function_calling":
        tool = tool_of(schema, strict)
        name = tool["function"]["name"]
        llm = bind(tools=[tool], tool_choice=name, **trace_metadata, **kwargs)
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if isinstance(schema, type) and is_basemodel_subclass(schema)
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    else:
        llm = bind(json_schema=schema_of(schema), **trace_metadata, **kwargs)
        if (
            isinstance(schema, type) and is_basemodel_subclass(schema) and not _is_model(schema)
        ):  # a class of pydantic 1
            parser = PydanticOutputParser(pydantic_object=schema)
        else:
            parser = AnswerParser(kind=schema if _is_read_whole(schema) else None)
    if not include_raw:
        return llm | parser
    success = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failure = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | success.with_fallbacks([failure], exception_key="parsing_error")


class AnswerParser(JsonOutputParser):
    """Parses an answer as JSON, and as a value of `kind` if it is given. While it streams, it returns the JSON so far,
    as LangChain's parser does, or the value so far if it is valid."""

    kind: Any = None

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        try:
            if self.kind is None:
                return super().parse_result(result, partial=partial)
            if partial:
                so_far = super().parse_result(result, partial=True)
                return None if so_far is None else TypeAdapter(self.kind).validate_python(so_far)
            return TypeAdapter(self.kind).validate_json(result[0].text)
        except (OutputParserException, ValidationError) as error:
            if partial:
                return None
            why = str(error)
            if _finish_reason(result[0]) == "length":
                why = f"the answer was cut at max_tokens, so it may be incomplete; raise it. {why}"
            raise OutputParserException(why, llm_output=result[0].text) from error

    def _diff(self, prev: Any | None, next: Any) -> Any:
        return super()._diff(prev, next) if self.kind is None else next


def _finish_reason(generation: Generation) -> Any:
    if isinstance(generation, ChatGeneration):
        return generation.message.response_metadata.get("finish_reason")
    return (generation.generation_info or {}).get("finish_reason")


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_read_whole(kind: Any) -> bool:
    """Whether an answer becomes an object of a class instead of a dict."""
    return _is_model(kind) or (isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, Enum)))


def _is_schema(mapping: Mapping[str, Any]) -> bool:
    return not mapping.keys() & {"name", "function", "parameters", "input_schema"}


def _circles(schema: Mapping[str, Any]) -> bool:
    """Whether a definition refers to itself, directly or not."""
    definitions = schema.get("$defs", {})
    uses = {name: {ref.rsplit("/", 1)[-1] for ref in _references(inner)} for name, inner in definitions.items()}
    for name in uses:
        visited, queue = set(), list(uses[name])
        while queue:
            if (other := queue.pop()) not in visited:
                visited.add(other)
                queue.extend(uses.get(other, ()))
        if name in visited:
            return True
    return False


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for inner in schema.values():
            yield from _references(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _references(inner)
