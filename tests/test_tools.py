"""Tools: what may be offered, and calls read out of answers, whole and while they stream."""

from __future__ import annotations

import json

import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from saying import spelling_tokenizer

from packllm import InvalidToolCall, OptionError, ToolCall, ToolStream, parse_tool_calls
from packllm.chat.marks import CALL_MARKS
from packllm.chat.reasoning import THOUGHTS
from packllm.options import make_options


def tool(name: str, parameters: dict | None = None) -> dict:
    function = {"name": name, "description": f"does {name}"}
    return {"type": "function", "function": function | ({} if parameters is None else {"parameters": parameters})}


TOOLS = [tool("search"), tool("look_up")]


def plain(answer) -> tuple:
    """An answer without its ids."""
    calls = [(call.name, call.arguments) for call in answer.calls]
    return answer.content, calls, [(call.name, call.arguments) for call in answer.invalid]


def streamed(text: str, cuts: list[int], tools=TOOLS) -> tuple[ToolStream, list]:
    """The answer fed in pieces, and what came out."""
    stream, out = ToolStream(tools), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += stream.feed(text[begin:end])
    return stream, out + stream.finish()


CALL = '{"name": "search", "arguments": {"query": "a {b} \\"c\\""}}'
SEARCH = ("search", {"query": 'a {b} "c"'})
ANSWERS = [
    ("no call at all", ("no call at all", [], [])),
    ("  white space \n stays\n\n", ("  white space \n stays\n\n", [], [])),
    (f"<tool_call>\n{CALL}\n</tool_call>", ("", [SEARCH], [])),
    (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n", ("Let me see.", [SEARCH], [])),
    (
        f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "look_up", "arguments": {{}}}}</tool_call>',
        ("", [SEARCH, ("look_up", {})], []),
    ),
    (CALL, ("", [SEARCH], [])),
    (CALL.replace("arguments", "parameters"), ("", [SEARCH], [])),
    ("<|python_tag|>" + CALL.replace("arguments", "parameters") + "<|eom_id|>", ("", [SEARCH], [])),
    (f'{CALL}; {{"name": "look_up", "parameters": {{"a": [1]}}}}', ("", [SEARCH, ("look_up", {"a": [1]})], [])),
    (f"[{CALL}, {CALL}]", ("", [SEARCH, SEARCH], [])),
    (f"```json\n{CALL}\n```", ("", [SEARCH], [])),
    (f"I call:\n```json\n[{CALL}]\n```\nDone.", ("I call:\nDone.", [SEARCH], [])),
    (json.dumps({"arguments": {"query": 1}, "name": "search"}), ("", [("search", {"query": 1})], [])),
    (
        json.dumps({"type": "function", "function": {"name": "search", "arguments": '{"a": 2}'}}),
        ("", [("search", {"a": 2})], []),
    ),
    ('{"name": "search", "arguments": null}', ("", [("search", {})], [])),
    # JSON that is no call, or that the answer only mentions
    ('{"name": "Bob", "arguments": {"a": 1}}', ('{"name": "Bob", "arguments": {"a": 1}}', [], [])),
    ('{"name": "search", "age": 3}', ('{"name": "search", "age": 3}', [], [])),
    (f"Such a call looks like {CALL}.", (f"Such a call looks like {CALL}.", [], [])),
    ('[1] x\n```python\nf({"a": 1})\n```', ('[1] x\n```python\nf({"a": 1})\n```', [], [])),
    # A tool that was not offered, in markup: the caller's to answer
    ('<tool_call>{"name": "nope", "arguments": {}}</tool_call>', ("", [("nope", {})], [])),
    # Malformed
    (
        '<tool_call>{"name": "search", "arguments": {"q": </tool_call> and so on',
        ("and so on", [], [("search", '{"q": ')]),
    ),
    ("<tool_call>search(a)</tool_call>", ("", [], [("", "search(a)")])),
    ('{"name": "search", "arguments": {"query": "cut o', ("", [], [("search", '{"query": "cut o')])),
    ('{"name": "search", "arguments": [1]}', ("", [], [("search", '{"name": "search", "arguments": [1]}')])),
    ('{"name": "search", "arguments": {"a": NaN}}', ("", [], [("search", '{"a": NaN}')])),
    ('{"name": "search", "arguments": {"a": "\\ud800"}}', ("", [], [("search", '{"a": "\\ud800"}')])),
]


@pytest.mark.parametrize(("text", "expected"), ANSWERS, ids=range(len(ANSWERS)))
def test_answers(text, expected):
    assert plain(parse_tool_calls(text, TOOLS)) == expected


@pytest.mark.parametrize("text", [text for text, _ in ANSWERS], ids=range(len(ANSWERS)))
def test_a_stream_says_what_the_whole_answer_says(text):
    stream, out = streamed(text, list(range(1, len(text))))
    whole = parse_tool_calls(text, TOOLS)
    assert plain(stream.answer) == plain(whole)
    assert "".join(part for part in out if isinstance(part, str)) == whole.content
    parts = [part for part in out if not isinstance(part, str)]
    ordered = sorted([*stream.answer.calls, *stream.answer.invalid], key=lambda call: first_index(parts, call.id))
    for index, call in enumerate(ordered):
        own = [part for part in parts if part.index == index]
        assert [(part.id, part.name) for part in own] == [(call.id, call.name), *[(None, None)] * (len(own) - 1)]
        written = "".join(part.arguments for part in own)
        assert written == call.arguments if isinstance(call, InvalidToolCall) else json.loads(written) == call.arguments


def first_index(parts, call_id) -> int:
    return next(part.index for part in parts if part.id == call_id)


def test_arguments_stream_as_they_are_written():
    stream = ToolStream(TOOLS)
    assert stream.feed('{"name": "sea') == []  # may still become something else
    assert stream.feed('rch", "arguments": {"query"')[0].name == "search"
    assert [part.arguments for part in stream.feed(': "long')] == [': "long']
    assert [part.arguments for part in stream.feed('"}}')] == ['"}']
    assert stream.finish() == []


def test_text_is_held_back_only_while_it_may_be_a_call():
    stream = ToolStream(TOOLS)
    assert stream.feed("Well, <tool") == ["Well,"]
    assert stream.feed("box") == [" <toolbox"]
    assert stream.feed('\n{"na') == []
    assert stream.feed('tion"') == ['\n{"nation"']


def test_ids_are_unique_letters_and_digits():
    calls = parse_tool_calls(f"[{', '.join([CALL] * 50)}]", TOOLS).calls
    assert len({call.id for call in calls}) == 50
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)  # what Mistral's templates insist on


def test_without_tools_all_is_content():
    text = f"<tool_call>{CALL}</tool_call>"
    assert parse_tool_calls(text, []).content == text
    assert isinstance(parse_tool_calls(text, TOOLS).calls[0], ToolCall)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.data(), NAMES, st.dictionaries(st.text(), JSON, max_size=3), st.booleans())
def test_any_call_comes_back_from_any_format(data, name, arguments, ascii_only):
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
    formats = [call, f"<tool_call>\n{call}\n</tool_call>", f"[{call}]", f"```json\n{call}\n```", f"Yes.\n{call}"]
    text = data.draw(st.sampled_from(formats))
    tools = [tool(name)]
    expected = parse_tool_calls(text, tools)
    assert [(one.name, one.arguments) for one in expected.calls] == [(name, arguments)]
    assert expected.invalid == ()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    assert plain(streamed(text, cuts, tools)[0].answer) == plain(expected)


MARKS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "```json\n", "```", "[", "]", "{", "}", '"', "\\", "\n", " "]
TEXTS = ['{"name": "search"', ', "arguments": ', '{"a": 1}', "text", "search", ":", ",", "é", CALL]
FRAGMENTS = st.sampled_from([*MARKS, *TEXTS])


@given(st.data(), st.lists(FRAGMENTS, max_size=12))
def test_no_text_breaks_the_parser_or_depends_on_how_it_is_cut(data, fragments):
    text = "".join(fragments)
    whole = parse_tool_calls(text, TOOLS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stream, out = streamed(text, cuts)
    assert plain(stream.answer) == plain(whole)
    assert "".join(part for part in out if isinstance(part, str)) == whole.content
    if not whole.calls and not whole.invalid:
        assert whole.content == text


def test_the_label_of_a_fence_may_be_cut():
    text = "<tool_call>```json\n<tool_call>"
    whole = plain(parse_tool_calls(text, TOOLS))
    assert all(plain(streamed(text, [cut])[0].answer) == whole for cut in range(len(text)))


def test_deep_nesting_and_long_numbers_are_no_calls_but_no_crash():
    deep = '{"name": "search", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}"
    assert parse_tool_calls(deep, TOOLS).invalid[0].name == "search"
    assert parse_tool_calls('{"name": "search", "arguments": {"a": ' + "9" * 5000 + "}}", TOOLS).invalid


# Other spellings

WEATHER = tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "at": {"$ref": "#/$defs/place"},
            "hot": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "$defs": {"place": {"type": "object"}},
    },
)
OSLO = {"city": "123", "days": 3, "note": None, "at": {"x": [1.5]}, "hot": True, "tags": ["a", "b"]}


def xml(arguments: dict, opening='<parameter="{}">', closing="</parameter>", around="{}") -> str:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return "".join(opening.format(key) + around.format(text) + closing for key, text in texts.items())


def spellings(arguments: dict) -> dict[str, str]:
    """One call of get_weather as each family writes it."""
    plain, python = json.dumps(arguments), ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    call = json.dumps({"name": "get_weather", "arguments": arguments})
    quoted = repr({"name": "get_weather", "arguments": arguments})
    keys = xml(arguments, "<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n")
    coder = xml(arguments, "<parameter={}>", "</parameter>\n", "\n{}\n")
    return {
        "Hermes": f"<tool_call>\n{call}\n</tool_call>",
        "Llama 3": f"<|python_tag|>{call.replace('arguments', 'parameters', 1)}",
        "Llama 3 built in": f"<|python_tag|>get_weather.call({python})",
        "Llama 4": f"[get_weather({python})]",
        "LFM2": f"<|tool_call_start|>[get_weather({python})]<|tool_call_end|>",
        "Mistral 7B": f"[TOOL_CALLS][{call}]",
        "Mistral Small 3.2": f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{plain}",
        "Ministral": f"[TOOL_CALLS]get_weather[ARGS]{plain}",
        "Qwen3-Coder": f"<tool_call>\n<function=get_weather>\n{coder}</function>\n</tool_call>",
        "Qwen3-Coder, without its mark": f"<function=get_weather>\n{coder}</function>",
        "Seed": f"<seed:tool_call>\n<function=get_weather>\n{xml(arguments, '<parameter={}>')}\n</function>\n"
        f"</seed:tool_call>",
        "functionary": f"<function=get_weather>{plain}</function>",
        "MiniMax-M2": '<minimax:tool_call>\n<invoke name="get_weather">\n'
        + xml(arguments, '<parameter name="{}">')
        + "</invoke>\n</minimax:tool_call>",
        "GLM": f"<tool_call>get_weather\n{keys}</tool_call>",
        "DeepSeek-V3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{plain}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "DeepSeek-V3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        f"{plain}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{plain}<|tool_call_end|><|tool_calls_section_end|>",
        "Cohere": "<|START_ACTION|>[\n    "
        + json.dumps({"tool_call_id": "0", "tool_name": "get_weather", "parameters": arguments})
        + "\n]<|END_ACTION|>",
        "Apertus": f"<|tools_prefix|>[{json.dumps({'get_weather': arguments})}]<|tools_suffix|>",
        "Nemotron": f"<TOOLCALL>[{call}]</TOOLCALL>",
        "OpenAI": json.dumps({"tool_calls": [{"id": "a", "function": {"name": "get_weather", "arguments": plain}}]}),
        "Python's quotes": quoted,
        "Python's quotes, marked": f"<tool_call>{quoted}</tool_call>",
        "a comma too many": f"<tool_call>{call[:-2]},}},\n}}</tool_call>",
        "the last brace forgotten": f"<tool_call>{call[:-1]}</tool_call>",
    }


@pytest.mark.parametrize("family", spellings(OSLO))
def test_calls_of_every_family_are_read_with_the_types_of_their_schema(family):
    text = spellings(OSLO)[family]
    for before in ("", "I look it up.\n"):
        answer = parse_tool_calls(before + text, [*TOOLS, WEATHER])
        assert plain(answer) == (before.strip(), [("get_weather", OSLO)], [])
        stream, out = streamed(before + text, list(range(1, len(before + text))), [*TOOLS, WEATHER])
        assert plain(stream.answer) == plain(answer)
        parts = [part for part in out if not isinstance(part, str)]
        assert json.loads("".join(part.arguments for part in parts)) == OSLO


@pytest.mark.parametrize("family", [name for name in spellings({}) if name not in ("a comma too many", "Kimi")])
def test_calls_without_arguments(family):
    assert plain(parse_tool_calls(spellings({})[family], [WEATHER])) == ("", [("get_weather", {})], [])


WORDS = st.text(st.sampled_from("aé日😀 \"'\\{}[]()=,:;/\n0"), max_size=8)
VALUES = {
    "city": WORDS.filter(lambda text: text == text.strip()),
    "days": st.integers(-9, 9),
    "hot": st.booleans(),
    "tags": st.lists(WORDS, max_size=2),
    "at": st.dictionaries(WORDS, st.integers() | WORDS, max_size=2),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.fixed_dictionaries({}, optional=VALUES), st.sampled_from(sorted(spellings({}))))
def test_any_arguments_come_back_from_every_spelling(data, arguments, family):
    if family == "a comma too many" and not arguments:
        return
    text = spellings(arguments)[family]
    assert plain(parse_tool_calls(text, [WEATHER])) == ("", [("get_weather", arguments)], [])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    assert plain(streamed(text, cuts, [WEATHER])[0].answer) == ("", [("get_weather", arguments)], [])


TEMPLATES = sorted((SHARED / "templates").glob("*.jinja"))
UNREAD = ("gemma", "muse", "gpt-oss", "functionary-medium-v3.2", "MiniMax-M3", "llama-cpp-deepseek")
"""Forms that are not read: keys without quotes, several control tokens in a header, no mark at all."""


@pytest.mark.skipif(not TEMPLATES, reason="needs ../shared/templates")
def test_calls_are_read_as_the_templates_of_real_models_write_them():
    arguments = {"city": 'Oslo, "N"', "days": 3}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    tokenizer = spelling_tokenizer()
    read = 0
    for path in TEMPLATES:
        if any(name in path.name for name in UNREAD):
            continue
        said = []
        for content, calls in (("SAID", None), ("", [call])):
            turn = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
            try:
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": "ASKED"}, turn],
                    tools=[WEATHER],
                    chat_template=path.read_text(),
                    tokenize=False,
                )
            except Exception:  # a template that takes no such dialogue
                break
            said.append(text.rpartition("ASKED")[2])
        if len(said) < 2 or "Oslo" not in said[1]:
            continue
        answer = parse_tool_calls("\n" + said[1], [WEATHER])
        assert [(one.name, one.arguments) for one in answer.calls] == [("get_weather", arguments)], path.name
        read += 1
    assert read >= 25


def test_parallel_false_takes_the_first_call_alone():
    text = f"{CALL}\n{CALL}\nSo."
    one = parse_tool_calls(text, TOOLS, parallel=False)
    assert plain(one) == ("So.", [SEARCH], [])
    stream = ToolStream(TOOLS, parallel=False)
    parts = [part for letter in text for part in stream.feed(letter)] + stream.finish()
    assert {part.index for part in parts if not isinstance(part, str)} == {0}


@pytest.mark.parametrize(
    "text",
    [
        "[search](https://example.org) and [search(term)](https://example.org)",
        "A <think> tag opens reasoning, </think> closes it.",
        "if a < b and c[0] > {}:",
        "<function=nothing>x</function>",
        '{"type": "object", "properties": {"name": {"type": "string"}}}',
        "{'name': 'Bob'}\n{'a': 1}",
    ],
)
def test_text_that_looks_like_a_call_stays_as_it_is(text):
    for tools in (TOOLS, []):
        answer = parse_tool_calls(text, tools)
        assert (answer.content, answer.calls, answer.invalid, answer.reasoning) == (text, (), (), "")


@pytest.mark.parametrize(
    "unit",
    [
        *("\n", " ", "`", "{", "<", "[", '"', "'", "[ ", "{\n", "```json\n", "<tool_call>", "<tool_call>\n\n"),
        *("<think>", "</think>", '{"name": ', '{"type": ', '{"name": "\\u0073', "[search(", "<function=", ", "),
        *("<parameter=a>", "<tool_call>\n<function=search>\n<parameter=q>", "<tool_call>search<arg_key>", CALL),
        *("<｜tool▁call▁begin｜>", "  \n"),
    ],
)
def test_the_work_is_linear_in_the_text(unit):
    """Counted in characters looked at, whole and one at a time: as many again for twice the text."""
    work = {}
    for size in (4_000, 8_000):
        text = (unit * size)[:size]
        for pieces in ([text], text):
            stream = ToolStream(TOOLS)
            for piece in pieces:
                stream.feed(piece)
            stream.finish()
            work.setdefault(size, set()).add(stream.examined)
    (half,), (whole,) = work[4_000], work[8_000]
    assert half <= whole <= 2 * half + 500
    assert whole <= 6 * 8_000


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(sorted({*CALL_MARKS, *THOUGHTS, *THOUGHTS.values(), "search", "(", ")", "{", '"', "\n", "`"}))
    )
)
def test_no_marks_break_the_parser_or_depend_on_how_they_are_cut(pieces):
    text = "".join(pieces)
    whole = parse_tool_calls(text, TOOLS)
    stream, out = streamed(text, list(range(1, len(text))))
    assert plain(stream.answer) == plain(whole)
    assert stream.answer.reasoning == whole.reasoning
    assert "".join(part for part in out if isinstance(part, str)) == whole.content


# What may be offered


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": [tool("a"), tool("b"), tool("a")]}, "2 tools of the name 'a'"),
        ({"tools": [tool("auto")]}, "rename the tool"),
        ({"tools": [tool("required")]}, "rename the tool"),
        ({"tools": [{"name": "a"}]}, '{"type": "function", "function"'),
        ({"tools": [{"type": "web_search", "function": {"name": "a"}}]}, "must look like"),
        ({"tools": [tool("")]}, "at least one character"),
        ({"tools": [tool("a", {"type": "string"})]}, "must have type 'object', not 'string'"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "must be a JSON schema"),
        ({"tools": [tool("a", {"default": {1, 2}})]}, "the tool 'a' is not JSON"),
        ({"tools": [tool("a\ud800")]}, "is not JSON"),
        ({"tools": "search"}, "tools="),
        ({"tool_choice": "any"}, "tool_choice='any' without tools"),
        ({"tool_choice": "search"}, "without tools"),
        ({"tools": TOOLS, "tool_choice": "find"}, "none of 'auto', 'none', 'any', 'search', 'look_up'"),
        ({"tools": TOOLS, "tool_choice": "any", "json_schema": {}}, "give one of them"),
        ({"tools": TOOLS, "tool_choice": "search", "json_schema": {}}, "give one of them"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema is not JSON"),
        ({"json_schema": "object"}, "json_schema="),
    ],
)
def test_contradictions_are_typed_errors_that_say_what_to_do(options, said):
    with pytest.raises(OptionError) as caught:
        make_options(options)
    assert said in str(caught.value)


def test_openais_word_and_what_is_offered():
    assert make_options({"tools": TOOLS, "tool_choice": "required"}).tool_choice == "any"
    assert make_options({"tools": TOOLS, "tool_choice": "none"}).offered_tools == ()
    assert make_options({"tools": TOOLS}).offered_tools == tuple(TOOLS)
    assert make_options({"tools": None}).tools == ()


@pytest.mark.parametrize("written", ['"\\u000F"', '"\\u000f"', '"\\u000F\\u00E9\\uD83D\\ude00/"', '"\\u000fé😀\\/"'])
def test_a_name_is_known_however_it_is_written(written):
    name = json.loads(written)
    (call,) = parse_tool_calls(f'{{"name": {written}, "arguments": {{}}}}', [tool(name)]).calls
    assert call.name == name
