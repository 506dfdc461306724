"""TextStream against a slow definition: whole prefixes decoded and searched anew after every token."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packllm.align import Vocabulary
from packllm.decode.text import TextStream

TEXTS = [
    "plain ASCII",
    "emoji 😀 and a family 👨‍👩‍👧‍👦, a flag 🇫🇷, a skin tone 👍🏽",
    "日本語と中文，한국어",
    "combining: e\u0301 a\u0308\u0323, ไม่ได้, हिन्दी",
    "\U0010ffff\u0000\u200d\ufeff",
]


def vocabulary(pieces: list[bytes], control: frozenset[int] = frozenset()) -> Vocabulary:
    return Vocabulary(list(pieces), {}, control, frozenset())


def stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What each push gives, then what finish gives; and whether a stop string occurred."""
    text = TextStream(vocabulary(pieces), stop)
    given_out = [text.push(i) for i in range(len(pieces))]
    given_out.append(text.finish())
    return given_out, text.stopped


def complete(data: bytes) -> str:
    """The text of `data` without the unfinished character that it may end in."""
    for length in (1, 2, 3):
        try:
            data[-length:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                data = data[:-length]
                break
    return data.decode(errors="replace")


def slow(pieces: list[bytes], stop: tuple[str, ...]) -> tuple[str, bool]:
    """Text before the earliest stop in the shortest prefix of pieces that has one; else all text."""
    data = b"".join(pieces)
    prefixes = [complete(b"".join(pieces[:n])) for n in range(1, len(pieces) + 1)]
    for text in [*prefixes, data.decode(errors="replace")]:
        found = [text.index(s) for s in stop if s in text]
        if found:
            return text[: min(found)], True
    return data.decode(errors="replace"), False


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_characters_split_across_tokens_arrive_whole(text, size):
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    given_out, stopped = stream(pieces)
    assert "".join(given_out) == text
    assert not any("\ufffd" in piece for piece in given_out)
    assert not stopped


@pytest.mark.parametrize("text", TEXTS)
def test_fixture_tokenizers(text, byte_tokenizer, word_tokenizer):
    for tokenizer, expected in ((byte_tokenizer, text), (word_tokenizer, " " + text)):
        words = Vocabulary.from_tokenizer(tokenizer)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        text_stream = TextStream(words)
        assert "".join([*(text_stream.push(i) for i in ids), text_stream.finish()]) == expected


def test_a_character_is_given_out_with_its_last_byte():
    assert stream([b"a\xf0", b"\x9f", b"\x98", b"\x80b"])[0] == ["a", "", "", "😀b", ""]


def test_invalid_bytes_become_replacement_characters():
    assert stream([b"a\xff", b"b"])[0] == ["a\ufffd", "b", ""]
    assert stream([b"a\xe6\x97", b"b"])[0] == ["a", "\ufffdb", ""]
    assert stream([b"a\xe6\x97"])[0] == ["a", "\ufffd"]


def test_control_tokens_give_no_text():
    words = vocabulary([b"a", b"<|im_end|>", b"\xf0\x9f", b"\x98\x80"], frozenset({1}))
    text = TextStream(words, ("<|im_start|>",))
    assert [text.push(i) for i in (0, 1, 2, 1, 3)] == ["a", "", "", "", "😀"]
    assert not text.stopped


@pytest.mark.parametrize(
    ("stop", "said", "stopped"),
    [
        (("<|a|>",), "x", True),
        (("<|a|><|b|>",), "x", True),
        (("x<|a|><|b|>", "<|b|>"), "", True),
        (("y<|a|>", "<|b|>x"), "xy", False),
    ],
)
def test_control_tokens_stop_alone_and_within_stop_strings_but_are_never_text(stop, said, stopped):
    words = vocabulary([b"x", b"<|a|>", b"<|b|>", b"y", b"<|"], frozenset({1, 2}))
    text = TextStream(words, stop)
    assert "".join(text.push(i) for i in (0, 1, 2, 3)) + text.finish() == said
    assert text.stopped == stopped
    spelled = TextStream(words, ("<||b",))  # what is spelled as text is found as text
    assert spelled.push(4) + spelled.push(2) + spelled.finish() == "<|"


def test_stop_across_tokens_is_held_back_and_never_given_out():
    assert stream([b"one\n", b"\nQues", b"tion", b": two"], ("\n\nQuestion:",)) == (["one", "", "", "", ""], True)


def test_hold_back_is_released_when_no_stop_comes():
    assert stream([b"a E", b"N", b"D", b"ING"], ("ENDED",)) == (["a ", "", "", "ENDING", ""], False)
    assert stream([b"a EN"], ("END",)) == (["a ", "EN"], False)


def test_stop_that_begins_inside_a_failed_start():
    assert stream([b"xa", b"a", b"b", b"y"], ("ab",)) == (["x", "a", "", "", ""], True)


def test_of_several_stops_the_earliest_occurrence_counts():
    assert stream([b"one two three"], ("three", "two")) == (["one ", ""], True)
    # "bc" is complete first, though "bcd!" begins at the same place and "abcx" before it.
    assert stream([b"a", b"b", b"c", b"d!"], ("abcx", "bcd!", "bc")) == (["", "", "a", "", ""], True)


def test_nothing_follows_a_stop():
    assert stream([b"a.", b"b", b".c"], (".",)) == (["a", "", "", ""], True)


def test_stop_may_be_completed_by_finish():
    assert stream([b"ab\xe6"], ("b\ufffd",)) == (["a", ""], True)


PARTS = st.sampled_from(["a", "b", "ab", "ba", "aab", "\n", " ", "é", "e\u0301", "日", "本", "😀", "👍🏽", "\ufffd"])
PHRASES = st.lists(PARTS, min_size=1, max_size=4).map("".join)


@settings(max_examples=400, deadline=None)
@given(
    data=st.lists(PARTS | st.text(max_size=3), max_size=12).map("".join).map(str.encode)
    | st.lists(st.sampled_from([b"a", b"b", b"\xe6", b"\x97", b"\xf0\x9f", b"\xff", "日".encode()]), max_size=10).map(
        b"".join
    ),
    cuts=st.lists(st.integers(0, 200), max_size=30),
    stop=st.lists(PHRASES, max_size=3).map(tuple),
)
@example(data=b"aab", cuts=[1, 2], stop=("ab",))
@example(data=b"\xe6\x97", cuts=[1], stop=("\ufffd",))
def test_any_cutting_gives_the_slow_definition(data, cuts, stop):
    pieces = cut(data, cuts)
    given_out, stopped = stream(pieces, stop)
    expected, expected_stop = slow(pieces, stop)
    assert "".join(given_out) == expected
    assert stopped == expected_stop
    for n in range(1, len(pieces) + 1):
        so_far = "".join(given_out[:n])
        assert expected.startswith(so_far)  # nothing is ever taken back
        held = complete(b"".join(pieces[:n]))[len(so_far) :]
        if not any(s in complete(b"".join(pieces[:n])) for s in stop):  # no more is held back than must be
            assert held == "" or any(s != held and s.startswith(held) for s in stop)


@settings(max_examples=100, deadline=None)
@given(text=st.text(), cuts=st.lists(st.integers(0, 400), max_size=40))
def test_valid_text_never_shows_a_replacement_character(text, cuts):
    given_out, _ = stream(cut(text.encode(), cuts))
    assert "".join(given_out) == text
    assert sum(piece.count("\ufffd") for piece in given_out) == text.count("\ufffd")
