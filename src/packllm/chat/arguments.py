"""Parses arguments of tool calls that are not written as JSON. The tool's schema gives their types."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

import regex

from packllm.chat.json_text import loads, tolerant_loads

Schema = Mapping[str, Any]

_PARAMETER = regex.compile(r'<([^<>\s/="]{0,16})parameter(?:=([^<>]*+)|\s++name="([^"<>]*+)"[^<>]*+)>')
_KEY, _VALUE = regex.compile(r"<(arg_key[^<>]{0,16})>"), regex.compile(r"<(arg_value[^<>]{0,16})>")
_JSON_WORDS = {"true": True, "false": False, "null": None}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}
_UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


def xml_arguments(body: str, schema: Schema) -> dict[str, Any] | None:
    """Parse <parameter=key>value</parameter>..., or a JSON object in its place; None if it is neither."""
    if body.lstrip()[:1] == "{":
        value = tolerant_loads(body)
        return value if isinstance(value, dict) else None
    arguments: dict[str, Any] = {}
    at = 0
    while match := _PARAMETER.search(body, at):
        close = f"</{match[1]}parameter>"
        end = body.find(close, match.end())
        if end < 0:
            return None
        value = body[match.end() : end]
        if value[:1] == "\n":
            value = value[1:].removesuffix("\n")
        name = (match[2] or match[3] or "").strip()
        arguments[name] = value if 'string="true"' in match[0] else typed(value, name, schema)
        at = end + len(close)
    return arguments if arguments or not body.strip() else None


def tagged_arguments(body: str, schema: Schema) -> dict[str, Any] | None:
    """Parse <arg_key>key</arg_key><arg_value>value</arg_value>...; None if it is anything else."""
    arguments: dict[str, Any] = {}
    at = 0
    while key := _KEY.search(body, at):
        key_end = body.find(f"</{key[1]}>", key.end())
        value = _VALUE.search(body, key_end) if key_end >= 0 else None
        end = body.find(f"</{value[1]}>", value.end()) if value else -1
        if value is None or end < 0:
            return None
        name = body[key.end() : key_end].strip()
        arguments[name] = typed(body[value.end() : end], name, schema)
        at = end
    return arguments


def python_arguments(source: str, schema: Schema) -> dict[str, Any] | None:
    """Parse key="value", ...; None if a value has no JSON type, or an unnamed argument has no name in the schema."""
    try:
        call = ast.parse(f"f({_on_one_line(source)})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return None
        names = list(schema.get("properties") or {})
        pairs = [*zip(names, call.args, strict=False), *((keyword.arg, keyword.value) for keyword in call.keywords)]
        if len(pairs) < len(call.args) + len(call.keywords) or any(name is None for name, _ in pairs):
            return None
        value = {name: ast.literal_eval(_JsonWords().visit(node)) for name, node in pairs}
        return loads(json.dumps(value))
    except _UNREADABLE:
        return None


def _on_one_line(source: str) -> str:
    """The text with line breaks inside strings escaped; some models write them raw."""
    out: list[str] = []
    quote, escaped = "", False
    for character in source:
        if quote and character in "\r\n" and not escaped:
            out.append("\\r" if character == "\r" else "\\n")
            continue
        if escaped:
            escaped = False
        elif quote:
            escaped = character == "\\"
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        out.append(character if quote or character not in "\r\n" else " ")
    return "".join(out)


class _JsonWords(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_JSON_WORDS[node.id]) if node.id in _JSON_WORDS else node


def typed(written: str, name: str, schema: Schema) -> Any:
    """Convert a value that was written without quotes to its type in the schema; without a known type, parse it as JSON
    if possible."""
    properties = schema.get("properties")
    declaration = properties.get(name) if isinstance(properties, Mapping) else None
    types = _types(declaration, schema)
    if types == {"string"}:
        return written
    bare = written.strip()
    if bare in _PYTHON_WORDS:
        value, is_read = _PYTHON_WORDS[bare], True
    elif bare[:1] in "{[" and bare:
        value = tolerant_loads(bare)
        is_read = value is not None
    else:
        value = loads(bare)
        is_read = value is not None or bare == "null"
    if not is_read or (isinstance(value, str) and "string" in types):
        return written
    return value if not types or _type_of(value) & types or "string" not in types else written


def _types(declaration: Any, schema: Schema, depth: int = 0) -> set[str]:
    """Names of the JSON types that a value may have; empty if the schema does not say."""
    if not isinstance(declaration, Mapping) or depth > 8:
        return set()
    reference = declaration.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        inner: Any = schema
        for key in reference[2:].split("/"):
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        return _types(inner, schema, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(declaration.get(key), list):
            return set().union(*(_types(inner, schema, depth + 1) for inner in declaration[key]))
    types = declaration.get("type")
    if types is None:
        values = declaration.get("enum") or [declaration[key] for key in ("const",) if key in declaration]
        return set().union(*map(_type_of, values))
    return {types} if isinstance(types, str) else {one for one in types if isinstance(one, str)}


def _type_of(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number", *(["integer"] if value.is_integer() else [])}
    return {"string"} if isinstance(value, str) else {"array"} if isinstance(value, list) else {"object"}
