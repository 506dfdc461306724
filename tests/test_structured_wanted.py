"""Answers of a guaranteed form say what the model means, as long as there is room, and are whole in any case."""

# ruff: noqa: E501 (tables of cases)
from __future__ import annotations

import json
import re
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.exceptions import OutputParserException
from llama_index.core import PromptTemplate
from pydantic import UUID4, AnyUrl, BaseModel, Field, SecretStr, TypeAdapter, create_model
from test_tools import tool
from wanting import Wanting

from langchain_packllm import ChatPackLLM
from llama_index.llms.packllm import PackLLM
from packllm import OptionError, StructureError
from packllm.decode.matcher import Matcher

TEXT, INT, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def record(required=None, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required or properties)}


@pytest.fixture(scope="module")
def wanting() -> Wanting:
    return Wanting()


# Values in their places

PLACES = [
    (record(age=INT, name=TEXT), {"age": 34, "name": "Mary"}),
    (record(a=NUMBER, b=NUMBER), {"a": -3.25, "b": 12000.5}),
    ({"type": "array", "items": NUMBER, "minItems": 4}, [1.5, -2, 0.25, 7]),
    (record(p=record(x=INT, y=INT), q={"type": "array", "items": record(z=INT)}), {"p": {"x": 12, "y": -7}, "q": [{"z": 3}]}),
    (record(m={"type": "object", "additionalProperties": INT}, k=INT), {"m": {"a": 1, "bb": 22}, "k": 9}),
    (record(["z"], o=TEXT, p=INT, z=INT), {"p": 5, "z": 12}),
    (record(e={"anyOf": [INT, {"type": "null"}]}, b={"type": "boolean"}), {"e": None, "b": False}),
    ({"type": "array", "prefixItems": [INT, TEXT], "minItems": 2, "maxItems": 2, "items": False}, [42, "ü \" \\ 茶"]),
    ({}, {"any": [1, {"x": None}], "t": "s"}),
    (TEXT, "hello"),
    (NUMBER, -0.5),
    ({"enum": ["red", "green"]}, "green"),
    (record(id={"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}), {"id": 2**63 - 1}),
    (record(n={"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, z=INT), {"n": 0.25, "z": 1}),
    ({"$defs": {"B": record(id=INT)}, "allOf": [{"$ref": "#/$defs/B"}, record(n=TEXT)]}, {"id": 7, "n": "x"}),
    ({"$defs": {"B": record(id=INT)}, "$ref": "#/$defs/B", "properties": {"n": INT}, "required": ["n"]}, {"id": 81, "n": 7}),
    ({"type": "object", "properties": {"a": INT}, "required": ["a", "b"]}, {"a": 12, "b": "undescribed"}),
    ({"type": "object", "properties": {"a": INT, "b": {"$ref": "#/properties/a"}}}, {"a": 12, "b": 34}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value"), PLACES, ids=str)
def test_the_value_that_the_model_wants(wanting, schema, value):
    text = json.dumps(value, ensure_ascii=False)
    generation = wanting.ask(text, json_schema=schema)
    assert sorted(json.loads(generation.text).items() if isinstance(value, dict) else [generation.text]) == (
        sorted(value.items()) if isinstance(value, dict) else [text]
    )
    assert generation.finish_reason == "stop"


FORMATS = {
    "date": ("2024-02-29", date), "date-time": ("2024-12-31T23:59:59Z", datetime), "time": ("23:01:02+01:00", time),
    "duration": ("P3DT4H", timedelta), "uri": ("https://a.org/b?c=1", AnyUrl), "uuid4": (str(UUID(int=9, version=4)), UUID4),
    "ipv4": ("192.168.10.254", IPv4Address), "email": ("ann.b@mail.org", None), "no-such-format": ("!", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_exact_however_short_the_room(wanting, name):
    value, kind = FORMATS[name]
    schema = record(t=TEXT, v={"type": "string", "format": name}, z=INT)
    text = json.dumps({"t": "some words", "v": value, "z": 77})
    least = shortest(wanting, json_schema=schema)
    for limit in (least, least + 3, (least + len(text)) // 2 + 2, len(text) - 1, len(text)):
        generation = wanting.ask(text, json_schema=schema, max_tokens=limit)
        got = json.loads(generation.text)
        jsonschema.validate(got, schema)
        if kind:
            TypeAdapter(kind).validate_json(json.dumps(got["v"]))
        assert (generation.finish_reason == "stop") == (generation.text == text) == (limit >= len(text))


@pytest.mark.parametrize("pattern", [r"^\d+\.\d+\.\d+$", "[a-z]{3}-[A-Z]{2}", "^(cat|dog|elephant)s?$", r"^\w{4,}\\$"])
def test_patterns_are_closed(wanting, pattern):
    schema = record(v={"type": "string", "pattern": pattern}, z=INT)
    text = json.dumps({"v": "1.2.3 xyz-AB catword" * 3, "z": 5})
    least = shortest(wanting, json_schema=schema)
    for limit in range(least, least + 12, 2):
        value = json.loads(wanting.ask(text, json_schema=schema, max_tokens=limit).text)
        assert re.search(pattern, value["v"])
        assert isinstance(value["z"], int)


def shortest(wanting: Wanting, **options: Any) -> int:
    with pytest.raises(OptionError, match="the shortest takes") as caught:
        wanting.ask("", **options, max_tokens=1)
    return int(re.search(r"takes (\d+) tokens", str(caught.value))[1])


LEAVES = st.sampled_from([(INT, 345), (NUMBER, -1.75), (TEXT, "a b"), ({"type": "boolean"}, True), ({"type": "null"}, None),
                          ({"type": "string", "minLength": 3}, "abcd"), ({"enum": ["x", 12]}, 12)])  # fmt: skip


def nested(inner):
    names = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)
    objects = names.flatmap(lambda keys: st.tuples(*[inner] * len(keys)).map(lambda made: (
        record(**{key: schema for key, (schema, _) in zip(keys, made, strict=True)}),
        {key: value for key, (_, value) in zip(keys, made, strict=True)})))  # fmt: skip
    arrays = st.tuples(inner, st.integers(1, 3)).map(
        lambda made: ({"type": "array", "items": made[0][0], "minItems": made[1]}, [made[0][1]] * made[1])
    )
    return objects | arrays


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.recursive(LEAVES, nested, max_leaves=4), st.floats(0, 1))
def test_wanted_values_of_any_schema_whole_and_cut(wanting, wanted, share):
    schema, value = wanted
    text = json.dumps(value)
    generation = wanting.ask(text, json_schema=schema)
    assert (generation.text, generation.finish_reason) == (text, "stop")
    least = (
        1
        if len(text) == 1 or schema in (INT, NUMBER) or 12 in schema.get("enum", ())
        else shortest(wanting, json_schema=schema)
    )
    limit = least + int(share * (len(text) - least))
    cut = wanting.ask(text, json_schema=schema, max_tokens=limit)
    jsonschema.validate(json.loads(cut.text), schema)


def test_twice_the_answer_costs_twice_the_work(wanting, monkeypatch):
    counts = {"calls": 0}

    def counted(name):
        method = getattr(Matcher, name)

        def call(self, *args):
            counts["calls"] += 1
            return method(self, *args)

        return call

    for name in ("mask", "consume", "follows", "fork", "forced"):
        monkeypatch.setattr(Matcher, name, counted(name))
    schema = {"type": "array", "items": record(a=INT, b=TEXT)}
    calls = []
    for size in (5, 10, 20):
        counts["calls"] = 0
        wanting.ask(json.dumps([{"a": 12, "b": "word"}] * size), json_schema=schema, max_tokens=2000)
        calls.append(counts["calls"])
    assert calls[1] - calls[0] > 50
    assert calls[2] - calls[1] < 2.4 * (calls[1] - calls[0])


# What no grammar can say


BEYOND = [
    ({"type": "array", "items": TEXT, "uniqueItems": True}, ["a", "b"], ["a", "a"]),
    ({"type": "array", "items": INT, "contains": {"const": 1}}, [3, 1], [3]),
    ({"not": {"const": 5}, **INT}, 6, 5),
    ({**INT, "minimum": -(2**63), "maximum": 2**70}, 2**69, 2**71),
    ({"if": {"required": ["a"]}, "then": {"required": ["b"]}, **record(["z"], a=INT, b=INT, z=INT)}, {"z": 1}, {"a": 1, "z": 1}),
    ({"oneOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2}]}, "a", "ab"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), BEYOND, ids=str)
def test_what_no_grammar_can_say_is_checked_after(wanting, schema, right, wrong):
    assert json.loads(wanting.ask(json.dumps(right), json_schema=schema).text) == right
    with pytest.raises(StructureError) as caught:  # this model is as sure of it when it is drawn anew
        wanting.ask(json.dumps(wrong), json_schema=schema)
    assert json.loads(caught.value.text) == wrong
    if not isinstance(right, dict):
        call = tool("f", record(v=schema))
        made = '{"name": "f", "arguments": {"v": %s}}'
        text = made % json.dumps(right)
        assert wanting.ask(text, tools=[call], tool_choice="f").text == text
        with pytest.raises(StructureError):
            wanting.ask(made % json.dumps(wrong), tools=[call], tool_choice="f")


def test_one_violation_is_drawn_anew(pack):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}
    messages = [{"role": "user", "content": "two numbers"}]
    first = json.loads(pack.generate(messages, json_schema=schema, max_tokens=30).text)
    other = {**schema, "not": {"const": first}}
    again = pack.generate(messages, json_schema=other, max_tokens=30)
    jsonschema.validate(json.loads(again.text), other)


# pydantic's everyday types, through the adapters


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Node(BaseModel):
    ok: bool
    kids: list[Node]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


TYPES: list[tuple[Any, Any]] = [
    (set[str], ["a", "b"]), (Path, "/srv/a"), (UUID4, str(UUID(int=5, version=4))), (bytes, "ab"), (SecretStr, "x"),
    (Decimal, 1.25), (dict[Literal["a", "b"], int], {"b": 3}), (dict[int, str], {"12": "x"}), (tuple[int, str], [4, "y"]),
    (Annotated[Cat | Dog, Field(discriminator="kind")], {"kind": "dog", "name": "Rex"}), (Node, {"ok": True, "kids": [{"ok": False, "kids": []}]}),
    (Colour, "blue"), (int | None, None), (timedelta, "P1DT2H"), (datetime, "2024-05-06T07:08:09Z"), (list[date], ["2023-01-31"]),
    (Annotated[int, Field(gt=10, multiple_of=5)], 25), (dict[date, int], {"2024-02-29": 1}), (frozenset[int], [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), TYPES, ids=str)
def test_everyday_types_through_the_adapters(wanting, kind, value):
    made = create_model("Made", x=(kind, ...), n=(int, ...))
    text = json.dumps({"x": value, "n": 12})
    wanted = made.model_validate_json(text)
    chat = ChatPackLLM(pack=wanting.pack)
    wanting.ask(text, json_schema=chat.with_structured_output(made).first.kwargs["json_schema"])
    assert chat.with_structured_output(made).invoke(wanting.PROMPT) == wanted
    got = chat.with_structured_output(made, include_raw=True).invoke(wanting.PROMPT)
    assert (got["parsed"], got["parsing_error"]) == (wanted, None)
    llm = PackLLM(pack=wanting.pack)
    assert llm.structured_predict(made, PromptTemplate(wanting.PROMPT)) == wanted


READY = [
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, False]),
    ({"enum": ["a", "b"]}, "b"),
    ({"anyOf": [INT, TEXT], "title": "Either", "description": "d"}, 42),
    ({"type": "object", "additionalProperties": INT}, {"q": 7}),
    ({"const": [1, {"a": None}]}, [1, {"a": None}]),
    ({"$defs": {"N": {**record(v=INT), "properties": {"v": INT, "n": {"$ref": "#/$defs/N"}}}}, "$ref": "#/$defs/N"}, {"v": 1, "n": {"v": 2}}),
    (record(name=TEXT, n=INT), {"name": "parameters", "n": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value"), READY, ids=str)
@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_a_ready_schema_passes_through_langchain_untouched(wanting, schema, value, method):
    bound = ChatPackLLM(pack=wanting.pack).with_structured_output(schema, method=method)
    assert bound.first.kwargs["json_schema"] == schema
    wanting.ask(json.dumps(value), json_schema=schema)
    assert bound.invoke(wanting.PROMPT) == value


def test_a_class_that_holds_itself_keeps_its_form_as_a_tool(wanting):
    chat = ChatPackLLM(pack=wanting.pack)
    bound = chat.with_structured_output(Node, method="function_calling")
    assert "$defs" in bound.first.kwargs["tools"][0]["function"]["parameters"]
    text = '{"name": "Node", "arguments": {"ok": true, "kids": [{"ok": false, "kids": []}]}}'
    wanting.ask(text, **{key: bound.first.kwargs[key] for key in ("tools", "tool_choice")})
    assert bound.invoke(wanting.PROMPT) == Node(ok=True, kids=[Node(ok=False, kids=[])])
    untitled = chat.with_structured_output(record(a=INT), method="function_calling")
    wanting.ask(
        '{"name": "answer", "arguments": {"a": 12}}',
        **{key: untitled.first.kwargs[key] for key in ("tools", "tool_choice")},
    )
    assert untitled.invoke(wanting.PROMPT) == {"a": 12}
    with pytest.raises(OptionError, match="use method='json_schema'"):
        chat.with_structured_output({"type": "array", "title": "L"}, method="function_calling")


def test_a_cut_answer_that_does_not_parse_says_so(wanting):
    class Even(BaseModel):
        words: str = Field(description="many")

        def model_post_init(self, _: Any) -> None:
            if not self.words.endswith("."):
                raise ValueError("unfinished")

    schema = Even.model_json_schema()
    chat = ChatPackLLM(pack=wanting.pack, max_tokens=40)
    wanting.ask(json.dumps({"words": "and so on " * 20 + "."}), json_schema=schema)
    with pytest.raises(OutputParserException, match="cut at max_tokens"):
        chat.with_structured_output(Even).invoke(wanting.PROMPT)
