"""Answers of a guaranteed form: whatever the models say, the answer parses and fits its schema."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from conftest import TextPack as Pack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tools import tool

from packllm import ExtraError, OptionError, VocabularyError, parse_tool_calls
from packllm.align.vocabulary import Vocabulary
from packllm.decode import matcher
from packllm.decode.grammar import make_grammar
from packllm.decode.sampling import make_sampler
from packllm.decode.structured import Constraint
from packllm.options import make_options

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "likes": {"type": "array", "items": {"enum": ["tea", "Kaffee", "茶"]}},
    },
    "required": ["name", "age", "likes"],
}
TOOLS = [
    tool("search", {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}),
    tool("add", {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}),
    tool("now"),
]


@pytest.fixture(scope="module", params=["bytes", "words"])
def vocabulary(request, byte_tokenizer, word_tokenizer) -> Vocabulary:
    return Vocabulary.from_tokenizer(byte_tokenizer if request.param == "bytes" else word_tokenizer)


def write(vocabulary: Vocabulary, seed: int, limit: int, temperature: float = 1.0, ends=(1,), **options):
    """What a model of random opinions writes under a constraint: the text, and the constraint."""
    constraint = Constraint(make_grammar(make_options(options)), vocabulary, ends, limit)
    sample = constraint.wrap(make_sampler(temperature, 1.0, None, seed))
    torch.manual_seed(seed)
    text = b""
    for _ in range(limit):
        token = sample(
            torch.randn(len(vocabulary) + 8).mul(4).log_softmax(-1)
        )  # more rows than tokens, as members have
        if token in ends:
            break
        text += vocabulary.tokens[token]
        if constraint.complete:
            break
    return text.decode(), constraint


@pytest.mark.parametrize("seed", range(8))
def test_a_schema_is_kept(vocabulary, seed):
    text, constraint = write(vocabulary, seed, 200, json_schema=PERSON)
    jsonschema.validate(json.loads(text), PERSON)
    assert constraint.complete
    assert text == json.dumps(json.loads(text), ensure_ascii=False) or "\\" in text  # no other white space


@pytest.mark.parametrize("choice", ["any", "search", "add", "now"])
def test_a_demanded_call_is_made(vocabulary, choice):
    for seed in range(4):
        text, _ = write(vocabulary, seed, 80, tools=TOOLS, tool_choice=choice)
        answer = parse_tool_calls(text, TOOLS)
        assert (answer.content, answer.invalid, len(answer.calls)) == ("", (), 1)
        (call,) = answer.calls
        assert choice in ("any", call.name)
        schema = next(t["function"] for t in TOOLS if t["function"]["name"] == call.name).get("parameters")
        jsonschema.validate(call.arguments, schema or {"maxProperties": 0})
        assert not call.arguments.keys() - (schema or {}).get("properties", {}).keys()  # none invented


def test_with_tools_and_a_schema_either_is_an_answer(vocabulary):
    kinds = set()
    for seed in range(30):
        text, _ = write(vocabulary, seed, 80, tools=TOOLS, json_schema=PERSON)
        answer = parse_tool_calls(text, TOOLS)
        kinds.add(bool(answer.calls))
        if not answer.calls:
            jsonschema.validate(json.loads(answer.content), PERSON)
    assert kinds == {True, False}


def test_an_end_is_allowed_where_the_answer_is_whole(vocabulary):
    constraint = Constraint(make_grammar(make_options({"json_schema": {"type": "integer"}})), vocabulary, (1,), 9)
    offered = []

    def sample(logprobs):
        allowed = logprobs.isfinite()
        offered.append(bool(allowed[1]))
        return 1 if allowed[1] else int(allowed.nonzero()[0])

    constrained = constraint.wrap(sample)
    first = constrained(torch.zeros(len(vocabulary)))
    assert vocabulary.tokens[first] in (b"-", *(b"%d" % digit for digit in range(10)))
    while constrained(torch.zeros(len(vocabulary))) != 1:
        pass
    assert offered[0] is False
    assert offered[-1] is True


def test_an_answer_is_closed_before_the_limit(vocabulary):
    text, constraint = write(vocabulary, 3, 40, json_schema=PERSON)
    jsonschema.validate(json.loads(text), PERSON)
    assert constraint.cut  # this model of random opinions would have gone on
    _, roomy = write(vocabulary, 3, 400, json_schema={"enum": ["a", "b"]})
    assert not roomy.cut


def test_what_the_members_rule_out_is_chosen_if_nothing_else_may_be(vocabulary):
    grammar = make_grammar(make_options({"json_schema": {"const": "x"}}))
    for temperature in (0.0, 0.5):
        constraint = Constraint(grammar, vocabulary, (1,), 9)
        sample = constraint.wrap(make_sampler(temperature, 0.9, 4, 0))
        text = b""
        while not constraint.complete:
            text += vocabulary.tokens[sample(torch.full((len(vocabulary),), -torch.inf))]
        assert text == b'"x"'


LABELS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def objects(inner):
    def make(properties):
        return st.lists(st.sampled_from(sorted(properties)), unique=True).map(
            lambda required: {"type": "object", "properties": properties, "required": required}
        )

    return st.dictionaries(LABELS, inner, min_size=1, max_size=3).flatmap(make)


SCHEMAS = st.recursive(
    st.sampled_from([{"type": name} for name in ("string", "integer", "number", "boolean", "null")])
    | st.lists(LABELS | st.integers(-9, 9) | st.none(), min_size=1, max_size=3).map(lambda values: {"enum": values})
    | st.just({"type": "string", "minLength": 2, "maxLength": 5})
    | st.just({"type": "integer", "minimum": 3, "maximum": 12}),
    lambda inner: (
        objects(inner)
        | inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3})
        | st.lists(inner, min_size=2, max_size=2).map(lambda options: {"anyOf": options})
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEMAS, st.integers(0, 2**31))
def test_any_schema_is_kept(vocabulary, schema, seed):
    text, constraint = write(vocabulary, seed, 150, json_schema=schema)
    jsonschema.validate(json.loads(text), schema)
    assert isinstance(constraint.cut, bool)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects(SCHEMAS), LABELS.filter(bool), st.integers(0, 2**31))
def test_any_tool_is_called_as_it_wants(vocabulary, parameters, name, seed):
    if name in ("auto", "none", "any", "required"):
        return
    tools = [tool(name, parameters)]
    text, _ = write(vocabulary, seed, 200, tools=tools, tool_choice="any")
    (call,) = parse_tool_calls(text, tools).calls
    assert call.name == name
    jsonschema.validate(call.arguments, parameters)


# Schemas that no grammar can keep


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"$ref": "#/nowhere"},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"enum": []},
        {"type": "array", "items": {"type": "string", "description": "long " * 20}, "minItems": 3, "maxItems": 2},
    ],
)
def test_a_schema_that_cannot_be_guaranteed_is_refused_before_anything_runs(pack, schema):
    with pytest.raises(OptionError, match=r"json_schema cannot be guaranteed.*keywords") as caught:
        pack.stream(MESSAGES, json_schema=schema)
    assert len(str(caught.value)) < 550  # the grammar is not quoted
    tools = [tool("f", {"type": "object", "properties": {"a": schema}, "required": ["a"]})]
    if "$ref" not in schema:
        with pytest.raises(OptionError, match="parameters of the tool 'f' cannot be guaranteed"):
            pack.stream(MESSAGES, tools=tools, tool_choice="f")
    assert pack.generate(MESSAGES, tools=tools).text  # nothing was demanded: the answer is parsed as it comes


def test_endless_and_too_deep_schemas_are_typed_errors(pack):
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    deep: dict = {}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    for schema in (endless, deep):
        try:
            text = pack.generate(MESSAGES, json_schema=schema, max_tokens=40).text
        except OptionError:
            continue
        jsonschema.validate(json.loads(text), schema)


def test_a_panic_of_llguidance_is_a_typed_error(pack, monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    monkeypatch.setattr(matcher, "llguidance", _Broken(panic))
    with pytest.raises(OptionError, match="index out of bounds") as caught:
        pack.stream(MESSAGES, json_schema={"type": "string", "maxLength": 4321})
    assert len(str(caught.value)) < 700


class _Broken:
    """llguidance, but it panics at every grammar."""

    def __init__(self, panic):
        def fail(*args, **kwargs):
            raise panic("index out of bounds " + "x" * 1000)

        self.LLMatcher = type("LLMatcher", (), {"validate_grammar_with_warnings": staticmethod(fail)})


def test_definitions_of_a_tool_are_found(vocabulary):
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    parameters = {**node, "$defs": {"node": node}, "required": ["next"]}
    text, _ = write(vocabulary, 0, 120, tools=[tool("f", parameters)], tool_choice="any")
    jsonschema.validate(parse_tool_calls(text, [tool("f")]).calls[0].arguments, parameters)


# Through a pack


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 4, "top_p": 0.9, "top_k": 50}])
def test_a_packs_answer_keeps_its_schema(pack, options):
    generation = pack.generate(MESSAGES, json_schema=PERSON, max_tokens=60, **options)
    jsonschema.validate(json.loads(generation.text), PERSON)
    assert generation.usage.completion_tokens <= 60
    text = pack.generate("Once upon a time", json_schema={"enum": ["there", "was"]}, max_tokens=20, **options)
    assert json.loads(text.text) in ("there", "was")
    assert text.finish_reason == "stop"


def test_each_row_of_a_batch_has_its_own_form(pack):
    prompts = [MESSAGES, [{"role": "user", "content": "def add(a, b):"}], [{"role": "user", "content": "a"}]]
    together = pack.generate_batch(prompts, json_schema=PERSON, max_tokens=40)
    assert [g.text for g in together] == [pack.generate(p, json_schema=PERSON, max_tokens=40).text for p in prompts]
    for generation in together:
        jsonschema.validate(json.loads(generation.text), PERSON)


def test_stop_strings_do_not_cut_a_guaranteed_answer(pack):
    generation = pack.generate(MESSAGES, json_schema=PERSON, max_tokens=60, stop=['"'])
    jsonschema.validate(json.loads(generation.text), PERSON)


def test_a_limit_too_small_for_any_answer_is_an_error_before_a_token_is_decoded(pack):
    with pytest.raises(OptionError, match=r"max_tokens=3 is too few .* the shortest takes \d+ tokens"):
        pack.generate(MESSAGES, json_schema=PERSON, max_tokens=3)
    with pytest.raises(OptionError, match="the shortest takes"):
        pack.generate(MESSAGES, json_schema={"type": "string", "minLength": 500}, max_tokens=20)
    chunks = pack.stream(MESSAGES, json_schema=PERSON, max_tokens=3)
    first = next(chunks)
    assert (first.text, first.usage.completion_tokens) == ("", 0)
    assert first.usage.prompt_tokens > 0
    with pytest.raises(OptionError, match="the shortest takes"):
        next(chunks)


def test_tools_need_a_conversation(pack):
    with pytest.raises(OptionError, match="chat_template=True"):
        pack.stream("text", tools=TOOLS)
    assert pack.generate("text", tools=TOOLS[2:], chat_template=True, tool_choice="now", max_tokens=60).text


def test_without_the_extra_a_guarantee_is_refused_and_parsing_works(pack, monkeypatch):
    monkeypatch.setattr(matcher, "llguidance", None)
    for options in ({"json_schema": PERSON}, {"tools": TOOLS, "tool_choice": "any"}):
        with pytest.raises(ExtraError, match=r"install packllm\[structured\]"):
            pack.stream(MESSAGES, **options)
    assert pack.generate(MESSAGES, tools=TOOLS).text
    assert pack.generate(MESSAGES, tools=TOOLS, tool_choice="none").text


def test_different_vocabularies_are_refused_or_the_one_that_runs_is_held_to_the_form(make_member):
    pack = Pack([make_member("llama"), make_member("llama", 1, "words", name="other")], max_tokens=40)
    with pytest.raises(VocabularyError, match=r"different vocabularies.*weighting='top1'"):
        pack.generate(MESSAGES, json_schema=PERSON)
    with pytest.raises(OptionError, match="decoding='cool' cannot guarantee"):
        pack.stream(MESSAGES, json_schema=PERSON, decoding="cool")
    for options in ({"weighting": "top1"}, {"decoding": "mined"}, {"weighting": {"other": 1.0}}):
        generation = pack.generate(MESSAGES, json_schema=PERSON, **options)
        jsonschema.validate(json.loads(generation.text), PERSON)
