"""From JSON schemas to the grammar of an answer, as far as a grammar can say what a schema means.

JSON is written as json.dumps writes it, with one space after commas and colons: no model can lose itself in white
space. What llguidance cannot follow (uniqueItems, not, if, contains, bounds beyond 64 bits, lookaround, ...) is left
out of the grammar: verdict.py holds the whole answer against the whole schema.
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

# Lenient: what llguidance does not know it leaves out, instead of refusing all of it.
_MANNER = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"}
_OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_OF_STRINGS = ("minLength", "maxLength", "pattern")
_EXACT = 2**53  # larger integers are rounded by llguidance, which counts in doubles


@dataclass(frozen=True)
class Grammar:
    """The answers that the options allow.

    Attributes:
        lark: the grammar, in llguidance's Lark.
        hints: what a search for the shortest answer is told of it.
    """

    lark: str
    hints: Hints


def make_grammar(options: Options) -> Grammar | None:
    """The grammar of the answers that the options allow; None if any text may be the answer.

    Raises:
        ExtraError: a form is to be guaranteed, and the extra is not installed.
        OptionError: a schema that no answer or no grammar can satisfy.
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
        parameters = {"type": "object", "properties": {}, **(tool["function"].get("parameters") or {})}
        parts.append(_prepared(f"parameters of the tool {name!r}", json.dumps(parameters)))
        before = json.dumps(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ', ensure_ascii=False)
        rules += [f'call_{i}: {before} arguments_{i} "}}"', f"arguments_{i}: %json {parts[-1][0]}"]
    if options.json_schema is not None:
        starts.append("json")
        parts.append(_prepared("json_schema", json.dumps(options.json_schema)))
        rules.append(f"json: %json {parts[-1][0]}")
    hints = [hints for _, hints in parts]
    names, patterns = ({text: None for h in hints for text in texts(h)} for texts in (_names, _patterns))
    return Grammar("\n".join(["start: " + " | ".join(starts), *rules]), Hints(tuple(names), tuple(patterns)))


def demanded_tools(options: Options) -> Sequence[Schema]:
    """The tools of which the answer is, or may be, a call of a guaranteed form."""
    if options.tool_choice == "any":
        return options.tools
    if options.tool_choice in (None, "auto", "none"):
        return options.offered_tools if options.json_schema is not None else ()
    return [tool for tool in options.tools if tool["function"]["name"] == options.tool_choice]


def _names(hints: Hints) -> tuple[str, ...]:
    return hints.names


def _patterns(hints: Hints) -> tuple[str, ...]:
    return hints.patterns


@lru_cache(256)
def _prepared(what: str, given: str) -> tuple[str, Hints]:
    """A schema as llguidance can follow it, as JSON, and its hints."""
    try:
        schema = json.loads(given)
        attempts = [_Preparation(schema, closed=True), _Preparation(schema, closed=False)]
    except RecursionError:
        raise OptionError(f"{what} cannot be guaranteed: it is nested too deep") from None
    said: str | None = ""
    for attempt in attempts:  # closed objects may be none that satisfies all parts of a composition
        for without in ((), ("patternProperties", "additionalProperties")):
            text = json.dumps({**attempt.without(without), "x-guidance": _MANNER})
            said = matcher.refusal(f"start: %json {text}")
            if said is None:
                return text, attempt.hints
    raise OptionError(
        f"{what} cannot be guaranteed: {said}. Say it with the keywords that a grammar can follow (type, properties, "
        f"required, items, enum, const, anyOf, pattern, minimum, ...), or go without the guarantee and parse the text"
    )


class _Preparation:
    """A copy of a schema, changed in place, so that references by place stay right.

    Args:
        schema: JSON.
        closed: whether objects get no properties beside those that they name, where they do not ask for them: a small
            model would invent some. Parts of a composition stay open, for one part may allow what another names.
    """

    def __init__(self, schema: Schema, closed: bool) -> None:
        self._root = copy.deepcopy(dict(schema))
        self._names: dict[str, None] = {}
        self._patterns: dict[str, None] = {}
        self._seen: dict[int, dict[str, Any]] = {}
        self._parts: set[int] = set()
        self._visit(self._root, part=False)
        for node in self._seen.values():
            if closed and id(node) not in self._parts and _closable(node):
                node["additionalProperties"] = False
        self.hints = Hints(tuple(self._names), tuple(self._patterns))

    def without(self, keywords: Sequence[str]) -> dict[str, Any]:
        """The schema without some keywords, wherever they are."""
        for node in self._seen.values():
            for keyword in keywords:
                node.pop(keyword, None)
        return self._root

    def _visit(self, node: Any, part: bool) -> None:
        """Prepare a schema and all within it; a part is one of several that have to hold of the same value."""
        if not isinstance(node, dict) or (id(node) in self._seen and (id(node) in self._parts or not part)):
            return
        fresh = id(node) not in self._seen
        self._seen[id(node)] = node
        if part:
            self._parts.add(id(node))
        if fresh:
            _simplify(node)
            self._names |= dict.fromkeys(name for name in node.get("required", ()) if isinstance(name, str))
            if isinstance(node.get("pattern"), str):
                self._patterns[node["pattern"]] = None
        joined = part or _joins(node)
        for keyword, inner in _inner(node):
            within = keyword in ("allOf", "$ref") or (keyword in ("anyOf", "oneOf"))
            self._visit(inner, (joined and within) or part or keyword == "allOf")
        if isinstance(node.get("$ref"), str):
            self._visit(_at(self._root, node["$ref"]), joined)


def _inner(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword in _MAPS:
        if isinstance(node.get(keyword), dict):
            yield from ((keyword, inner) for inner in node[keyword].values())
    for keyword in (*_LISTS, "items"):
        if isinstance(node.get(keyword), list):
            yield from ((keyword, inner) for inner in node[keyword])
    for keyword in _SINGLE:
        yield keyword, node.get(keyword)


def _joins(node: Schema) -> bool:
    """Whether a schema says several things of one value, beside notes and definitions."""
    spoken = node.keys() - _NOTES - {"type", "$defs", "definitions", "discriminator", "required", "$id"}
    described = "required" in node and not _described(node)
    return bool(spoken & {"$ref", "anyOf", "oneOf", "allOf"}) and (len(spoken) > 1 or described)


def _described(node: Schema) -> bool:
    properties = node.get("properties")
    return isinstance(properties, dict) and properties.keys() >= set(node.get("required") or ())


def _closable(node: Schema) -> bool:
    open_ = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf", "unevaluatedProperties"}
    return "properties" in node and not node.keys() & open_ and ("required" not in node or _described(node))


def _at(root: Any, reference: str) -> Any:
    """What a reference into the schema means; None if it does not mean a place in it."""
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


# What llguidance would refuse, or understands otherwise, in the words that it follows


def _simplify(node: dict[str, Any]) -> None:
    if isinstance(node.get("format"), str):
        _simplify_format(node)
    if isinstance(node.get("propertyNames"), dict):
        _simplify_names(node)
    if isinstance(node.get("pattern"), str) and _refused({"type": "string", "pattern": node["pattern"]}):
        del node["pattern"]
    if any(keyword in node for keyword in _OF_STRINGS):
        _drop(node, "string", _OF_STRINGS)
    for keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if _number(node.get(keyword)) and not -(2**63) < node[keyword] < 2**63:
            del node[keyword]
    if any(keyword in node for keyword in _OF_NUMBERS):
        _drop(node, "number", _OF_NUMBERS)
        _drop(node, "integer", _OF_NUMBERS)
    if _large(node.get("const")):
        del node["const"]
        node.setdefault("type", "integer")
    if isinstance(node.get("enum"), list) and any(map(_large, node["enum"])):
        small = [value for value in node.pop("enum") if not _large(value)]
        node.setdefault("allOf", []).append({"anyOf": [*([{"enum": small}] if small else ()), {"type": "integer"}]})


def _simplify_format(node: dict[str, Any]) -> None:
    pattern = FORMATS.get(node.pop("format"))
    if pattern is None:
        return
    if "pattern" in node:
        node.setdefault("allOf", []).append({"pattern": f"^(?:{pattern})$"})
    else:
        node["pattern"] = f"^(?:{pattern})$"


def _simplify_names(node: dict[str, Any]) -> None:
    """Names of a map: its choice of them as properties, their pattern as patternProperties."""
    names, value = node["propertyNames"], node.get("additionalProperties", True)
    if node.keys() & {"properties", "patternProperties"} or value is False:
        return
    if isinstance(names.get("enum"), list) and all(isinstance(name, str) for name in names["enum"]):
        node["properties"] = {name: copy.deepcopy(value) for name in names["enum"]}
        node["additionalProperties"] = False
        return
    pattern = FORMATS.get(names.get("format", ""))
    pattern = names.get("pattern") if pattern is None else f"^(?:{pattern})$"
    if isinstance(pattern, str) and not _refused({"type": "string", "pattern": pattern}):
        node["patternProperties"] = {pattern: value}
        node["additionalProperties"] = False


def _drop(node: dict[str, Any], type_: str, keywords: Sequence[str]) -> None:
    """Leave out those keywords of a type that cannot be followed by themselves, or together."""
    given = {keyword: node[keyword] for keyword in keywords if keyword in node}
    for keyword in given:
        if _refused({"type": type_, keyword: given[keyword]}):
            del node[keyword]
    given = {keyword: node[keyword] for keyword in given if keyword in node}
    if given and _refused({"type": type_, **given}):
        for keyword in given:
            del node[keyword]


def _refused(schema: Schema) -> bool:
    """Whether llguidance cannot follow a schema. That nothing satisfies it is something else."""
    said = _refusal(json.dumps(schema))
    return said is not None and "Unsatisfiable" not in said


@lru_cache(1024)
def _refusal(schema: str) -> str | None:
    return matcher.refusal(f"start: %json {json.dumps({**json.loads(schema), 'x-guidance': _MANNER})}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _large(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT
