"""Arguments of calls that are not written as JSON. Their types are those that the tool's schema gives them."""

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
    """<parameter=key>value</parameter>..., or a JSON object in their place; None if it is neither."""
    if body.lstrip()[:1] == "{":
        value = tolerant_loads(body)
        return value if isinstance(value, dict) else None
    arguments: dict[str, Any] = {}
    at = 0
    while found := _PARAMETER.search(body, at):
        close = f"</{found[1]}parameter>"
        end = body.find(close, found.end())
        if end < 0:
            return None
        value = body[found.end() : end]
        if value[:1] == "\n":
            value = value[1:].removesuffix("\n")
        name = (found[2] or found[3] or "").strip()
        arguments[name] = value if 'string="true"' in found[0] else typed(value, name, schema)
        at = end + len(close)
    return arguments if arguments or not body.strip() else None


def tagged_arguments(body: str, schema: Schema) -> dict[str, Any] | None:
    """<arg_key>key</arg_key><arg_value>value</arg_value>...; None if it is not that."""
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


def python_arguments(written: str, schema: Schema) -> dict[str, Any] | None:
    """key="value", ...; None if they are not JSON's values, or an argument has no name and the schema none for it."""
    try:
        call = ast.parse(f"f({_on_one_line(written)})", mode="eval").body
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


def _on_one_line(written: str) -> str:
    """The text with line breaks inside of strings escaped, which some models write raw."""
    out: list[str] = []
    quote, escaped = "", False
    for character in written:
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
    """A value that was written without quotes, as the type that the schema gives it; of unknown type, as JSON if it is
    JSON."""
    properties = schema.get("properties")
    declared = properties.get(name) if isinstance(properties, Mapping) else None
    types = _types(declared, schema)
    if types == {"string"}:
        return written
    stripped = written.strip()
    if stripped in _PYTHON_WORDS:
        value, read = _PYTHON_WORDS[stripped], True
    elif stripped[:1] in "{[" and stripped:
        value = tolerant_loads(stripped)
        read = value is not None
    else:
        value = loads(stripped)
        read = value is not None or stripped == "null"
    if not read or (isinstance(value, str) and "string" in types):
        return written
    return value if not types or _type_of(value) & types or "string" not in types else written


def _types(declared: Any, schema: Schema, depth: int = 0) -> set[str]:
    """Names of JSON's types that a value may have; none if that is not said."""
    if not isinstance(declared, Mapping) or depth > 8:
        return set()
    reference = declared.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        inner: Any = schema
        for key in reference[2:].split("/"):
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        return _types(inner, schema, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(declared.get(key), list):
            return set().union(*(_types(inner, schema, depth + 1) for inner in declared[key]))
    types = declared.get("type")
    if types is None:
        values = declared.get("enum") or [declared[key] for key in ("const",) if key in declared]
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
