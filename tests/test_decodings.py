"""The registry of decodings: what is named, what is refused before anything runs, and how one is added."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import TextPack as Pack

from packllm import OptionError, VocabularyError
from packllm.decode import DECODINGS, Decoding
from packllm.decode.by_tokens import check_tokens

PROMPT = "The capital of France is"


def test_an_unknown_decoding_is_answered_with_the_valid_ones(members, make_pack):
    valid = "decoding='fast' is unknown; valid: auto, tokens, lazy, cool, cool\\+rerank, mined"
    with pytest.raises(OptionError, match=valid):
        Pack(members, decoding="fast")
    with pytest.raises(OptionError, match=valid):
        make_pack().stream(PROMPT, decoding="fast")
    with pytest.raises(OptionError, match=valid):
        Pack.load(["no/such-model"], decoding="fast")  # before anything is loaded


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"decoding": "tokens"}, VocabularyError),
        ({"decoding": "lazy", "temperature": 1.0}, VocabularyError),
        ({"decoding": "lazy"}, OptionError),
        ({"decoding": "cool", "json_schema": {"type": "integer"}}, OptionError),
        ({"decoding": "cool+rerank", "json_schema": {"type": "integer"}}, OptionError),
    ],
)
def test_what_a_decoding_cannot_serve_is_refused_before_anything_runs(make_member, monkeypatch, options, error):
    if "json_schema" in options:
        pytest.importorskip("llguidance", reason="needs the extra `structured`")
    pack = Pack([make_member("llama", 0), make_member("llama", 1, "word")])
    opened: list[int] = []
    for engine in (member.engine for member in pack.members):
        monkeypatch.setattr(engine, "open", lambda *given, own=engine.open: opened.append(1) or own(*given))
    with pytest.raises(error):
        list(pack.stream(PROMPT, **options))
    assert not opened
    assert pack.generate(PROMPT, max_tokens=1).usage.completion_tokens == 1
    assert opened  # they are counted


def test_a_decoding_of_ones_own(make_member, monkeypatch):
    """Backwards: every answer is turned round, chunk by chunk."""

    def decode(request, rows):
        for r, chunk in DECODINGS["tokens"].decode(request, rows):
            yield r, replace(chunk, text=chunk.text[::-1])

    monkeypatch.setitem(DECODINGS, "backwards", Decoding(check_tokens, decode))
    pack = Pack([make_member("llama", 0), make_member("gpt2", 1)], max_tokens=6)
    forwards = [chunk.text for chunk in pack.stream(PROMPT)]
    assert "".join(forwards).strip()
    assert [chunk.text for chunk in pack.stream(PROMPT, decoding="backwards")] == [text[::-1] for text in forwards]
