"""Compiles JSON schemas to the grammar of an answer, as far as a grammar can express a schema.

JSON is written as json.dumps writes it, with one space after commas and colons: so no model can write white space
forever. llguidance cannot express some keywords (uniqueItems, not, if, contains, bounds beyond 64 bits, lookaround,
...). These are left out of the grammar; verdict.py then checks the complete answer against the complete schema.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from packllm.decode import matcher
from packllm.decode.closing import Hints
from packllm.decode.formats import FORMATS
from packllm.errors import ExtraError, OptionError
from packllm.options import Options

Schema = Mapping[str, Any]

# Lenient: llguidance ignores keywords that it does not know instead of refusing the schema.
_MANNER = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"}
_BEYOND = {  # keywords that the grammar cannot express, or not always
    *("uniqueItems", "not", "if", "contains", "propertyNames", "minProperties", "maxProperties", "dependentRequired"),
    *("dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
}
_BESIDE_REF = ("$ref",)  # stands for: all keywords beside a $ref
_LADDER = ((), _BESIDE_REF, ("patternProperties", "additionalProperties"))  # keywords to leave out, tried in this order
_EXACT = 2**53  # llguidance rounds larger integers, because it computes in doubles


@dataclass(frozen=True)
class Grammar:
    """The grammar of the answers that the options allow.

    Attributes:
        lark: the grammar, in llguidance's Lark.
        hints: for the search of the shortest answer.
        exact: whether it expresses all of the schemas; otherwise answers must be checked against them (verdict.py).
    """

    lark: str
    hints: Hints
    exact: bool


def make_grammar(options: Options) -> Grammar | None:
    """The grammar of the answers that the options allow; None if any text may be the answer.

    Raises:
        ExtraError: an answer's form is to be guaranteed, but the extra is not installed.
        OptionError: no answer can satisfy the schema, or no grammar can express it.
    """
    tools = demanded_tools(options)
    if not tools and options.json_schema is None:
        return None
    if matcher.llguidance is None:
        what = "json_schema" if options.json_schema is not None else f"tool_choice={options.tool_choice!r}"
        raise ExtraError(what, "llguidance", "structured")
    rules, starts, parts = [], [], []
    if tools:
        starts = ["call", r'"<tool_call>\n" call "\n</tool_call>"']
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        name = tool["function"]["name"]
        parts.append(_followed(f"parameters of the tool {name!r}", json.dumps(_call_schema(tool["function"]))))
        rules.append(f"call_{i}: {parts[-1].lark}")
    if options.json_schema is not None:
        starts.append("json")
        parts.append(_followed("json_schema", json.dumps(options.json_schema)))
        rules.append(f"json: {parts[-1].lark}")
    names = dict.fromkeys(name for part in parts for name in part.hints.names)
    patterns = dict.fromkeys(pattern for part in parts for pattern in part.hints.patterns)
    hints = Hints(tuple(names), tuple(patterns))
    return Grammar("\n".join(["start: " + " | ".join(starts), *rules]), hints, all(part.exact for part in parts))


def _call_schema(function: Schema) -> Schema:
    """The JSON schema of a call of a function; references into its parameters are adjusted to their new place."""
    parameters = {"type": "object", "properties": {}, **(function.get("parameters") or {})}
    properties = {"name": {"const": function["name"]}, "arguments": _moved(parameters, "/properties/arguments")}
    return {"type": "object", "properties": properties, "required": ["name", "arguments"]}


def _moved(value: Any, to: str) -> Any:
    if isinstance(value, list):
        return [_moved(inner, to) for inner in value]
    if not isinstance(value, dict):
        return value
    moved = {key: inner if key in ("const", "enum", "default") else _moved(inner, to) for key, inner in value.items()}
    for key in _MAPS:
        if isinstance(value.get(key), dict):
            moved[key] = {name: _moved(inner, to) for name, inner in value[key].items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = "#" + to + reference[1:]
    return moved


def demanded_tools(options: Options) -> Sequence[Schema]:
    """The tools whose calls the grammar has to allow."""
    if options.tool_choice == "any":
        return options.tools
    if options.tool_choice in (None, "auto", "none"):
        return options.offered_tools if options.json_schema is not None else ()
    return [tool for tool in options.tools if tool["function"]["name"] == options.tool_choice]


@lru_cache(256)
def _followed(what: str, schema_json: str) -> Grammar:
    """The grammar of one schema's JSON, as the right side of a rule."""
    reason: str | None = ""
    try:
        for closed in (True, False):  # with closed objects no value may satisfy all parts of a composition
            for without in _LADDER:
                prepared = _Preparation(json.loads(schema_json), closed, without)
                lark = "%json " + json.dumps({**prepared.schema, "x-guidance": _MANNER})
                reason, left_out = matcher.checked(f"start: {lark}")
                if reason is None:
                    exact = prepared.exact and not any(note.startswith("oneOf") for note in left_out)
                    return Grammar(lark, prepared.hints, exact)
    except RecursionError:
        reason = "it is nested too deep"
    except (AttributeError, TypeError) as error:
        reason = f"a keyword has a value of the wrong type: {error}"
    raise OptionError(
        f"{what} cannot be guaranteed: {reason}. Use keywords that a grammar can express (type, properties, "
        f"required, items, enum, const, anyOf, pattern, minimum, ...), or drop the guarantee and parse the text"
    )


class _Preparation:
    """A schema in a form that llguidance can follow. It is changed in place, so that references stay valid.

    Args:
        schema: parsed JSON; this object changes it.
        closed: whether to forbid properties that an object does not name, unless it asks for them: a small model would
            invent some. Parts of a composition stay open, because one part may allow what another one names.
        without: keywords to leave out.

    Attributes:
        schema: the changed schema.
        hints: its property names and patterns.
        exact: whether the grammar expresses every keyword that constrains answers.
    """

    def __init__(self, schema: dict[str, Any], closed: bool, without: Sequence[str]) -> None:
        self.schema, self.exact = schema, True
        self._names: dict[str, None] = {}
        self._patterns: dict[str, None] = {}
        self._seen: dict[int, dict[str, Any]] = {}
        self._parts: set[int] = set()
        self._visit(schema, part=False)
        for node in self._seen.values():
            if closed and id(node) not in self._parts and _closable(node):
                node["additionalProperties"] = False
            for keyword in (
                without if without != _BESIDE_REF else node.keys() - _NOTES - {"$ref", "$defs", "definitions"}
            ):
                if keyword in node and (without != _BESIDE_REF or "$ref" in node):
                    del node[keyword]
                    self.exact = False
        self.hints = Hints(tuple(self._names), tuple(self._patterns))

    def _visit(self, node: Any, part: bool) -> None:
        """Prepare a schema and its subschemas. `part`: it is one of several that must hold for the same value."""
        if not isinstance(node, dict) or (id(node) in self._seen and (id(node) in self._parts or not part)):
            return
        is_new = id(node) not in self._seen
        self._seen[id(node)] = node
        if part:
            self._parts.add(id(node))
        if is_new:
            for keyword in [key for key, value in node.items() if value is None and key not in ("const", "default")]:
                del node[keyword]  # some clients write null for what is missing
            self.exact &= _simplify(node)
            self._names |= dict.fromkeys(name for name in node.get("required", ()) if isinstance(name, str))
            patterns = [node.get("pattern"), *(node.get("patternProperties") or ())]
            self._patterns |= dict.fromkeys(pattern for pattern in patterns if isinstance(pattern, str))
        joint = part or _joins(node)
        for keyword, inner in _inner(node):
            same_value = keyword in ("allOf", "$ref") or (keyword in ("anyOf", "oneOf"))
            self._visit(inner, (joint and same_value) or part or keyword == "allOf")
        if isinstance(node.get("$ref"), str):
            self._visit(_at(self.schema, node["$ref"]), joint)


def _inner(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword in _MAPS:
        if isinstance(node.get(keyword, {}), dict):
            yield from ((keyword, inner) for inner in node.get(keyword, {}).values())
        else:
            raise TypeError(f"{keyword!r} must be an object")
    for keyword in (*_LISTS, "items"):
        if isinstance(node.get(keyword), list):
            yield from ((keyword, inner) for inner in node[keyword])
        elif keyword in node and keyword != "items":
            raise TypeError(f"{keyword!r} must be a list")
    for keyword in _SINGLE:
        if not isinstance(node.get(keyword, {}), dict | bool | list):
            raise TypeError(f"{keyword!r} must be a schema")
        yield keyword, node.get(keyword)


def _joins(node: Schema) -> bool:
    """Whether several keywords constrain the same value, apart from notes and definitions."""
    keywords = node.keys() - _NOTES - {"type", "$defs", "definitions", "discriminator", "required", "$id"}
    undescribed = "required" in node and not _described(node)
    return bool(keywords & {"$ref", "anyOf", "oneOf", "allOf"}) and (len(keywords) > 1 or undescribed)


def _described(node: Schema) -> bool:
    properties = node.get("properties")
    return isinstance(properties, dict) and properties.keys() >= set(node.get("required") or ())


def _closable(node: Schema) -> bool:
    open_ = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "unevaluatedProperties"}
    return "properties" in node and not node.keys() & open_ and ("required" not in node or _described(node))


def _at(root: Any, reference: str) -> Any:
    """The value that a reference into the schema points to; None if it points to none."""
    if not reference.startswith("#"):
        return None
    for key in unquote(reference[1:]).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and key.isdigit() and int(key) < len(root):
            root = root[int(key)]
        elif isinstance(root, dict) and key in root:
            root = root[key]
        else:
            return None
    return root


# Rewrites of keywords that llguidance refuses or misunderstands into ones that it follows


def _simplify(node: dict[str, Any]) -> bool:
    """Rewrite a schema in place; return whether the result still expresses all of it."""
    before = len(node.keys() & _BEYOND)
    if "discriminator" in node and "oneOf" in node:  # at most one alternative can match
        node["anyOf"] = node.pop("oneOf")
    if isinstance(node.get("format"), str):
        _simplify_format(node)
    if isinstance(node.get("propertyNames"), dict) and _simplify_names(node):
        before -= 1
    dropped = _drop(node, "string", ("minLength", "maxLength", "pattern"))
    for keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if _number(node.get(keyword)) and not -(2**63) < node[keyword] < 2**63:
            del node[keyword]
            dropped = True
    _simplify_zero(node)
    numeric = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
    dropped |= any(_large(node.get(keyword)) for keyword in numeric)
    dropped |= _drop(node, "integer", numeric)
    if node.get("type") != "integer":
        dropped |= _drop(node, "number", numeric)
    if "json-schema.org" not in str(node.get("$schema", "json-schema.org")):
        del node["$schema"]
    if _large(node.get("const")):
        del node["const"]
        node.setdefault("type", "integer")
        dropped = True
    if isinstance(node.get("enum"), list) and any(map(_large, node["enum"])):
        small = [value for value in node.pop("enum") if not _large(value)]
        node.setdefault("allOf", []).append({"anyOf": [*([{"enum": small}] if small else ()), {"type": "integer"}]})
        dropped = True
    return not before and not dropped


def _simplify_format(node: dict[str, Any]) -> None:
    pattern = FORMATS.get(node.pop("format"))
    if pattern is None:
        return
    if "pattern" in node:
        node.setdefault("allOf", []).append({"pattern": f"^(?:{pattern})$"})
    else:
        node["pattern"] = f"^(?:{pattern})$"


def _simplify_names(node: dict[str, Any]) -> bool:
    """Rewrite propertyNames, as properties or patternProperties; return whether that expresses all of it."""
    names, value = node["propertyNames"], node.get("additionalProperties", True)
    if node.keys() & {"properties", "patternProperties"} or value is False:
        return False
    if isinstance(names.get("enum"), list) and all(isinstance(name, str) for name in names["enum"]):
        node["properties"] = {name: copy.deepcopy(value) for name in names["enum"]}
        node["additionalProperties"] = False
        return names.keys() <= _NOTES | {"enum", "type"}
    pattern = FORMATS.get(names.get("format", ""))
    pattern = names.get("pattern") if pattern is None else f"^(?:{pattern})$"
    if not isinstance(pattern, str) or _refused({"type": "string", "pattern": pattern}):
        return False
    node["patternProperties"] = {pattern: value}
    node["additionalProperties"] = False
    return names.keys() <= _NOTES | {"format", "pattern", "type"}


def _simplify_zero(node: dict[str, Any]) -> None:
    """Avoid bounds at 0: llguidance treats 0 as more than 0 if the other bound is below 1."""
    for keyword, other, bound in (("exclusiveMinimum", "aximum", 1e-9), ("exclusiveMaximum", "inimum", -1e-9)):
        ends: list[Any] = [node.get("m" + other), node.get("exclusiveM" + other)]
        if _number(node.get(keyword)) and node[keyword] == 0 and any(_number(end) and abs(end) < 1 for end in ends):
            del node[keyword]
            node[keyword.replace("exclusiveM", "m")] = bound


def _drop(node: dict[str, Any], type_: str, keywords: Sequence[str]) -> bool:
    """Remove the keywords of a type that llguidance refuses, alone or together; return whether there were any."""
    values = {keyword: node[keyword] for keyword in keywords if keyword in node}
    refused = {keyword for keyword in values if _refused({"type": type_, keyword: values[keyword]})}
    others = values.keys() - refused
    if others and _refused({"type": type_, **{keyword: values[keyword] for keyword in others}}):
        refused = set(values)
    for keyword in refused:
        del node[keyword]
    return bool(refused)


def _refused(schema: Schema) -> bool:
    """Whether llguidance refuses a schema for another reason than that no value satisfies it."""
    reason = _refusal(json.dumps(schema))
    return reason is not None and "nsatisfiable" not in reason


@lru_cache(1024)
def _refusal(schema: str) -> str | None:
    return matcher.checked(f"start: %json {json.dumps({**json.loads(schema), 'x-guidance': _MANNER})}")[0]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _large(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT
