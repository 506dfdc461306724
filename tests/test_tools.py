"""Tools: what may be offered, and calls read out of answers, whole and while they stream."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packllm import InvalidToolCall, OptionError, ToolCall, ToolStream, parse_tool_calls
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
