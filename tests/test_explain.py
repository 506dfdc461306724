"""Explanations: shares by hand, parts against scores, pictures of texts that nobody vouches for."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from threading import Event

import naive
import pytest
from conftest import TextPack

from packllm import CancelledError, ContextOverflowError, Explanation, Pack, PromptError
from packllm.carried import part, shares

PROMPT = "Insulin helps glucose. The court shall order relief. What is the capital of France?"
PASSAGES = ["Insulin helps glucose.", "The court shall order relief."]
EVEN = {"llama-0": 0.5, "gpt2-1": 0.3, "qwen-2": 0.2}


def test_shares_by_hand():
    log = math.log
    assert shares({"a": 0.5, "b": 0.5}, {"a": log(0.3), "b": log(0.1)}) == pytest.approx({"a": 0.75, "b": 0.25})
    assert shares({"a": 0.2, "b": 0.8}, {"a": log(0.4), "b": log(0.1)}) == pytest.approx({"a": 0.5, "b": 0.5})
    assert shares({"a": 0.2, "b": 0.8, "c": 0.0}, {"a": -2000.0, "b": -2000.0}) == pytest.approx(
        {"a": 0.2, "b": 0.8, "c": 0.0}
    )
    assert shares({"a": 2.0, "b": -1.0}, {"a": -1.0, "b": -1.0}) == {"a": 1.0, "b": 0.0}  # DExperts
    assert shares({"a": 0.2, "b": 0.8}, {"a": -math.inf, "b": -math.inf}) == pytest.approx({"a": 0.2, "b": 0.8})
    told = part("xy", {"a": 0.5, "b": 0.5, "c": 0.0}, {"a": [log(0.3), log(0.1)], "b": [log(0.1), log(0.1)]}, [1, 1])
    assert told.share == pytest.approx({"a": 0.625, "b": 0.375, "c": 0})
    assert told.perplexity == pytest.approx({"a": 0.03**-0.5, "b": 10.0, "c": None})
    assert part("", {"a": 1.0}, {"a": []}, []).as_dict() == {
        "text": "", "scored": 0, "perplexity": {"a": None}, "share": {}
    }  # fmt: skip


def test_passages_are_as_full_passes_have_them(members):
    told = TextPack(members, weighting=EVEN).weigh(PROMPT, passages=PASSAGES).explanation
    assert told.unit == "token"
    assert [one.text for one in told.passages] == PASSAGES
    assert [one.text for one in told.messages] == [PROMPT]
    encoded = members[0].encoder.encode(PROMPT)
    given = {member.name: naive.token_logprobs(member, encoded.ids).tolist() for member in members}
    places = dict(zip(encoded.positions, zip(encoded.starts, encoded.ends, strict=True), strict=True))
    for one in told.passages:
        start = PROMPT.index(one.text)
        end = start + len(one.text)
        inside = [
            p - 1 for p, (s, e) in places.items() if start <= s + PROMPT[s:e].startswith(" ") and start < e <= end
        ]
        assert one.scored == len(inside) > 3
        for name, logprobs in given.items():
            mean = -sum(logprobs[p] for p in inside) / len(inside)
            assert one.perplexity[name] == pytest.approx(math.exp(mean), rel=1e-3)
        carried = [shares(EVEN, {name: logprobs[p] for name, logprobs in given.items()})["gpt2-1"] for p in inside]
        assert one.share["gpt2-1"] == pytest.approx(sum(carried) / len(carried), abs=1e-3)
        assert math.fsum(one.share.values()) == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"weighting": "exact"}, {"pool": "log"}, {"unit": "byte"}])
def test_the_whole_prompt_is_what_the_weights_say(members, options):
    pack = TextPack(members, **options)
    plain = pack.weigh(PROMPT)
    weights = pack.weigh(PROMPT, explain=True)
    assert weights.values == pytest.approx(plain.values, abs=1e-3)
    assert plain.explanation is None
    (message,) = weights.explanation.messages
    assert message.scored == weights.scored
    assert list(message.perplexity.values()) == pytest.approx(list(weights.perplexity), rel=1e-3)
    assert json.loads(json.dumps(weights.as_dict(), allow_nan=False))["explanation"]["unit"] == weights.unit


def test_each_message_of_the_user_is_told(members):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PASSAGES[0]},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": PROMPT},
    ]
    told = Pack(members).weigh(chat, passages=PASSAGES).explanation
    assert [one.text for one in told.messages] == [PASSAGES[0], PROMPT]
    assert told.passages[0] == told.messages[0]  # where it is first
    with pytest.raises(PromptError, match=r"passages\[0\]='Be brief.'"):
        Pack(members).stream(chat, passages=["Be brief."])
    with pytest.raises(PromptError, match=r"passages\[2\].*again"):
        Pack(members).weigh(chat, passages=[PASSAGES[0]] * 3)
    question = "What is the capital of France?"
    with pytest.raises(PromptError, match=r"passages\[0\]='Insulin helps glucose.' .*score_on='What is the"):
        Pack(members).weigh(PROMPT, passages=PASSAGES, score_on=question)
    for length in (600, 9000):
        long = [PASSAGES[0], "7" * length, PASSAGES[1]]
        with pytest.raises(ContextOverflowError, match=r"shorten passages\[1\], the longest with \d+ tokens") as caught:
            Pack(members).generate("\n".join(long), passages=long)
        assert caught.value.longest[0] == 1
        assert caught.value.longest[1] > 500


@pytest.mark.parametrize(
    "options", [{}, {"pool": "log"}, {"decoding": "lazy", "temperature": 1.0, "seed": 1}, {"draft_tokens": 4}]
)
def test_each_token_by_who_carried_it(members, options):
    pack = TextPack(members, weighting=EVEN, max_tokens=8, **options)
    answer = pack.generate(PROMPT, explain=True)
    plain = pack.generate(PROMPT, logprobs=True)
    assert answer.text == plain.text == "".join(token.text for token in answer.explanation.tokens)
    assert answer.logprobs is None
    assert len(answer.explanation.tokens) == 8
    for token, told in zip(answer.explanation.tokens, plain.logprobs, strict=True):
        parts = {name: EVEN[name] * math.exp(told.members[name]) for name in EVEN}
        assert token.share == pytest.approx({name: p / sum(parts.values()) for name, p in parts.items()}, abs=1e-4)
        assert math.fsum(token.share.values()) == pytest.approx(1)
        assert token.weights == EVEN
        assert token.logprob == pytest.approx(told.logprob, abs=1e-4)


def test_streams_batches_and_several_answers(pack):
    *before, last = pack.stream(PROMPT, explain=True, logprobs=True)
    assert all(chunk.explanation is None for chunk in before)
    assert before[0].logprobs
    alone = pack.generate(PROMPT, explain=True).explanation
    assert last.explanation == alone
    batch = pack.generate_batch([PROMPT, "Once upon a time"], explain=True)
    assert [one.explanation.messages[0].text for one in batch] == [PROMPT, "Once upon a time"]
    assert [t.text for t in batch[0].explanation.tokens] == [t.text for t in alone.tokens]
    several = pack.generate(PROMPT, n=2, explain=True, temperature=1.0, seed=3)
    assert all("".join(t.text for t in one.explanation.tokens) == one.text for one in several)
    assert several[0].explanation.messages == several[1].explanation.messages


def test_streams_that_end_early_have_none(pack):
    stream = pack.stream(PROMPT, explain=True)
    assert next(stream).explanation is None
    stream.close()
    assert list(stream) == []
    cancel = Event()
    stream = pack.stream(PROMPT, explain=True, cancel=cancel)
    next(stream)
    cancel.set()
    with pytest.raises(CancelledError):
        list(stream)


async def test_streams_of_adapters_that_end_early_have_none_and_the_next_one_has(members):
    langchain_packllm = pytest.importorskip("langchain_packllm")
    pytest.importorskip("llama_index.core")
    from llama_index.llms.packllm import PackLLM

    pack = Pack(members, max_tokens=200, explain=True)
    chat, llm, index = (
        langchain_packllm.ChatPackLLM(pack=pack),
        langchain_packllm.PackLLM(pack=pack),
        PackLLM(pack=pack),
    )
    for stream in (chat.stream(PROMPT), llm.stream(PROMPT), index.stream_complete(PROMPT)):
        assert "explanation" not in str(next(stream))
        stream.close()
    for stream in (chat.astream(PROMPT), llm.astream(PROMPT), await index.astream_complete(PROMPT)):
        assert "explanation" not in str(await anext(stream))
        await stream.aclose()
    answer = chat.invoke(PROMPT, max_tokens=3)
    assert len(answer.response_metadata["packllm"]["explanation"]["tokens"]) == 3


def test_several_vocabularies_by_words_and_segments(make_member):
    pack = TextPack([make_member("llama", 0), make_member("gpt2", 1, "word")], min_weight=0.0, max_tokens=24)
    answer = pack.generate(PROMPT, passages=PASSAGES, decoding="cool")
    told = answer.explanation
    assert told.unit == "word"
    assert all(math.fsum(one.share.values()) == pytest.approx(1) for one in (*told.messages, *told.passages))
    assert told.passages[1].scored == 6  # five words and the full stop
    assert "".join(token.text for token in told.tokens) == answer.text
    assert all(math.fsum(token.share.values()) == pytest.approx(1) for token in told.tokens)
    whole = pack.generate(PROMPT, explain=True, decoding="cool+rerank")
    assert whole.explanation.tokens == ()
    assert whole.explanation.messages == told.messages
    mined = pack.generate(PROMPT, explain=True, decoding="mined").explanation
    assert all(math.fsum(token.share.values()) == pytest.approx(1) for token in mined.tokens)


HARMLESS = {"html", "head", "meta", "title", "body", "div", "style", "p", "span", "h3", "table", "tr", "th", "td"}
HARMLESS |= {"details", "summary", "svg", "polyline"}


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_pages_escape_what_they_show(make_member):
    evil = '<script>alert(\'1\')</script> " onmouseover="x" & </td>' + "long " * 40
    member = make_member("llama", 0, name='<img src=x onerror="y">')
    pack = TextPack([member, make_member("gpt2", 1)], min_weight=0.0, max_tokens=4)
    told = pack.generate(evil, passages=[evil]).explanation
    pages = told.html(), told._repr_html_()
    assert pages[0].startswith("<!doctype html>")
    assert pages[1] in pages[0]
    found = Tags(pages[0])
    assert {tag for tag, _ in found.tags} <= HARMLESS
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") or name == "src" for name in attrs)]
    assert evil in found.text
    assert member.name in found.text
    assert "http" not in pages[0]
    shaded = [attrs for tag, attrs in found.tags if tag == "span" and "log p" in attrs.get("title", "")]
    assert len(shaded) == len(told.tokens) == 4


def test_figures(pack):
    pytest.importorskip("matplotlib")
    told = pack.generate("$x_1$ costs $5 and " + PROMPT, passages=["$x_1$ costs $5"]).explanation
    figure = told.plot()
    figure.canvas.draw()
    prompt, answer = figure.axes
    assert [label.get_text() for label in prompt.get_yticklabels()][1] == "passage 1: $x_1$ costs $5"
    assert len(answer.lines) == 3
    assert len(pack.weigh(PROMPT, explain=True).explanation.plot().axes) == 1


def test_without_matplotlib_an_error_names_the_extra(monkeypatch):
    from packllm import ExtraError

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ExtraError, match=r"packllm\[eval\]"):
        Explanation(("a",), (1.0,), "token", ()).plot()


def test_langchain_and_llama_index_carry_it(members):
    pack = Pack(members, weighting=EVEN, max_tokens=5)
    expected = pack.generate(PROMPT, passages=PASSAGES).explanation.as_dict()
    langchain_packllm = pytest.importorskip("langchain_packllm")
    model = langchain_packllm.ChatPackLLM(pack=pack, passages=PASSAGES)
    assert model.invoke(PROMPT).response_metadata["packllm"]["explanation"] == expected
    chunks = list(model.stream(PROMPT))
    whole = sum(chunks[1:], chunks[0])
    assert whole.response_metadata["packllm"]["explanation"] == expected
    llm = langchain_packllm.PackLLM(pack=pack)
    told = llm.generate([PROMPT], passages=PASSAGES).generations[0][0].generation_info["packllm"]["explanation"]
    assert [one["text"] for one in told["passages"]] == PASSAGES
    assert len(told["tokens"]) == 5
    assert "explanation" not in langchain_packllm.ChatPackLLM(pack=pack).invoke(PROMPT).response_metadata["packllm"]
    pytest.importorskip("llama_index.core")
    from llama_index.llms.packllm import PackLLM

    llm = PackLLM(pack=pack, passages=PASSAGES)
    for response in (llm.complete(PROMPT), list(llm.stream_complete(PROMPT))[-1]):
        assert response.raw["explanation"] == response.raw["packllm"]["explanation"] == expected
    assert "explanation" not in PackLLM(pack=pack).complete(PROMPT).raw["packllm"]


def test_the_documented_program_runs(members, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "explain.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.setattr(Pack, "starter", classmethod(lambda cls, **options: Pack(members, **options)))
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "explain.md", "exec"), {})
    assert "Insulin lowers" in (tmp_path / "explanation.html").read_text(encoding="utf-8")
    assert len(capsys.readouterr().out.splitlines()) > 5
