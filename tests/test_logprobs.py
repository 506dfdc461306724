"""What answers tell of their tokens, against full passes of each member by itself."""

from __future__ import annotations

import json
import math

import naive
import pytest
from conftest import TextPack

from packllm import Pack
from packllm.errors import OptionError

PROMPT = "The capital of France is"
OTHER = "Insulin lowers glucose, and the court shall"
EVEN = {"llama-0": 0.5, "gpt2-1": 0.3, "qwen-2": 0.2}


def truth(members, weights, pool, prompt: list[int], tokens: list[int]):
    """At each place: the fused log-probabilities, and each member's, by fresh passes."""
    for place in range(len(tokens)):
        parts = [naive.next_logprobs(m, [*prompt, *tokens[:place]]) for m in members]
        yield naive.fused(parts, list(weights), pool).log(), parts


def assert_true(told, members, weights, pool, prompt, top):
    tokens = [one.id for one in told]
    assert tokens
    for one, (fused, parts) in zip(told, truth(members, weights, pool, prompt, tokens), strict=True):
        best = fused.topk(top)
        assert [other.id for other in one.top_logprobs] == best.indices.tolist()
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        for other in (one, *one.top_logprobs):
            assert other.logprob == pytest.approx(float(fused[other.id]), abs=1e-4)
            given = {m.name: float(part[other.id]) for m, part in zip(members, parts, strict=True)}
            assert other.members == pytest.approx(given, abs=1e-4)


@pytest.mark.parametrize("pool", ["linear", "log"])
@pytest.mark.parametrize("options", [{"draft_tokens": 1}, {"draft_tokens": 4}, {"temperature": 0.7, "draft_tokens": 3}])
def test_each_token_is_told_as_full_passes_have_it(members, pool, options):
    pack = TextPack(members, weighting=EVEN, pool=pool, max_tokens=9)
    answer = pack.generate(PROMPT, top_logprobs=3, seed=1, **options)
    assert len(answer.logprobs) == answer.usage.completion_tokens
    assert b"".join(bytes(one.bytes) for one in answer.logprobs).decode(errors="replace") == answer.text
    assert_true(answer.logprobs, members, EVEN.values(), pool, pack.tokenize(PROMPT), 3)


def test_lazily_all_members_are_asked_and_the_text_stays(members):
    pack = TextPack(members, weighting=EVEN, max_tokens=9, decoding="lazy", temperature=1.0, seed=4)
    answer = pack.generate(PROMPT, top_logprobs=2)
    assert answer.text == pack.generate(PROMPT).text
    assert_true(answer.logprobs, members, EVEN.values(), "linear", pack.tokenize(PROMPT), 2)


def test_a_stream_tells_them_with_the_text_and_a_batch_each_its_own(pack):
    alone = [pack.generate(prompt, logprobs=True) for prompt in (PROMPT, OTHER)]
    assert alone[0].logprobs != alone[1].logprobs
    batch = pack.generate_batch([PROMPT, OTHER], logprobs=True)
    for one, other in zip(alone, batch, strict=True):
        assert [(t.id, t.token) for t in one.logprobs] == [(t.id, t.token) for t in other.logprobs]
        assert [t.logprob for t in one.logprobs] == pytest.approx([t.logprob for t in other.logprobs], abs=1e-4)
    chunks = list(pack.stream(PROMPT, logprobs=True))
    assert len(chunks) > 2
    assert tuple(t for chunk in chunks for t in chunk.logprobs) == alone[0].logprobs
    for end in range(1, len(chunks)):  # text is never ahead of what is told of it
        told = b"".join(bytes(t.bytes) for c in chunks[:end] for t in c.logprobs).decode(errors="replace")
        assert told.startswith("".join(c.text for c in chunks[:end]))
    assert all(token.top_logprobs == () for token in alone[0].logprobs)


def test_nobody_asks_nothing_is_told(pack):
    assert pack.generate(PROMPT).logprobs is None
    assert [chunk.logprobs for chunk in pack.stream(PROMPT)][-1] is None
    assert pack.generate(PROMPT, top_logprobs=2, logprobs=False).logprobs is None


def test_what_is_told_is_json(pack):
    answer = pack.generate(PROMPT, top_logprobs=2)
    data = json.loads(json.dumps(answer.as_dict(), allow_nan=False))["logprobs"]
    assert [one["id"] for one in data] == [token.id for token in answer.logprobs]
    assert data[0].keys() == {"token", "logprob", "bytes", "id", "members", "top_logprobs"}
    assert bytes(data[0]["bytes"]).decode(errors="replace") == data[0]["token"]
    assert len(data[0]["top_logprobs"]) == 2


def test_a_form_is_told_as_chosen_from(members):
    pytest.importorskip("llguidance")
    pack = TextPack(members, weighting=EVEN, max_tokens=20)
    answer = pack.generate(PROMPT, json_schema={"enum": ["yes", "no"]}, top_logprobs=20)
    assert json.loads(answer.text) in ("yes", "no")
    for token in answer.logprobs:  # all that may come is among the 20
        assert math.fsum(math.exp(other.logprob) for other in token.top_logprobs) == pytest.approx(1, abs=1e-4)
    fused, _ = next(truth(members, EVEN.values(), "linear", pack.tokenize(PROMPT), [answer.logprobs[0].id]))
    allowed = [other.id for other in answer.logprobs[0].top_logprobs]
    renormalised = fused[allowed].log_softmax(-1)
    assert [o.logprob for o in answer.logprobs[0].top_logprobs] == pytest.approx(renormalised.tolist(), abs=1e-4)


@pytest.mark.parametrize("wrong", [{"top_logprobs": 21}, {"top_logprobs": -1}, {"logprobs": 7}])
def test_values_out_of_range(pack, wrong):
    with pytest.raises(OptionError, match=next(iter(wrong))):
        pack.generate(PROMPT, **wrong)


def test_segments_are_told_as_the_members_judge_them(make_member):
    """Two vocabularies: each segment's log-likelihood by full passes over its own ids."""
    both = [make_member("llama", 0), make_member("gpt2", 1, "word")]
    pack = TextPack(both, weighting={"llama-0": 0.6, "gpt2-1": 0.4}, max_tokens=48, decoding="cool")
    answer = pack.generate(PROMPT, top_logprobs=2)
    assert answer.text == pack.generate(PROMPT).text == "".join(one.token for one in answer.logprobs)
    assert len(answer.logprobs) > 1
    text = ""
    judged = 0
    for one in answer.logprobs:
        assert one.id is None
        assert bytes(one.bytes).decode() == one.token
        for other in (one, *one.top_logprobs):
            parts = {"llama-0": 0.6, "gpt2-1": 0.4}
            likely = [weight * math.exp(other.members[name]) for name, weight in parts.items() if name in other.members]
            weight = sum(parts[name] for name in other.members)
            assert other.logprob == pytest.approx(math.log(sum(likely) / weight), abs=1e-4)
        assert {other.token for other in one.top_logprobs} >= {one.token} or one.logprob < one.top_logprobs[-1].logprob
        judged += len(one.members) == 2
        text += one.token
    assert judged
    first, agreed = answer.logprobs[0], []
    for member in both:  # who did not write it read it in tokens of its own
        ids = member.encoder.continuation(first.token)
        prompt = member.encoder.encode(PROMPT).ids
        truth = float(naive.token_logprobs(member, [*prompt, *ids])[-len(ids) :].sum())
        agreed.append(first.members[member.name] == pytest.approx(truth, abs=1e-3))
    assert any(agreed)


def test_whole_answers_that_are_reranked_are_not_told(make_member):
    pack = TextPack([make_member("llama", 0), make_member("gpt2", 1, "word")], decoding="cool+rerank", max_tokens=4)
    with pytest.raises(OptionError, match="cool\\+rerank"):
        pack.stream(PROMPT, logprobs=True)


# Where the frameworks look


@pytest.fixture
def chat_pack(members):
    return Pack(members, weighting=EVEN, max_tokens=8)


def openai_form(answer):
    return {"content": [token.as_dict() for token in answer.logprobs]}


def test_langchain_messages_tell_them_as_openai_does(chat_pack):
    chat_models = pytest.importorskip("langchain_packllm.chat_models")
    model = chat_models.ChatPackLLM(pack=chat_pack, logprobs=True, top_logprobs=2)
    expected = openai_form(chat_pack.generate([{"role": "user", "content": PROMPT}], top_logprobs=2))
    assert len(expected["content"][0]["top_logprobs"]) == 2
    assert model.invoke(PROMPT).response_metadata["logprobs"] == expected
    chunks = list(model.stream(PROMPT))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert whole.response_metadata["logprobs"] == expected
    assert sum("logprobs" in chunk.response_metadata for chunk in chunks) > 2
    bound = chat_models.ChatPackLLM(pack=chat_pack).bind(logprobs=True, top_logprobs=2)
    assert bound.invoke(PROMPT).response_metadata["logprobs"] == expected
    assert "logprobs" not in chat_models.ChatPackLLM(pack=chat_pack).invoke(PROMPT).response_metadata


def test_langchain_structured_output_and_calls_tell_them(chat_pack):
    pytest.importorskip("llguidance")
    chat_models = pytest.importorskip("langchain_packllm.chat_models")
    model = chat_models.ChatPackLLM(pack=chat_pack, max_tokens=60)
    schema = {"title": "answer", "type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    for method in ("json_schema", "function_calling"):
        raw = model.with_structured_output(schema, method=method, include_raw=True, logprobs=True).invoke(PROMPT)["raw"]
        tokens = raw.response_metadata["logprobs"]["content"]
        spelled = b"".join(bytes(token["bytes"]) for token in tokens).decode()
        assert '"a"' in spelled
        assert len(tokens) == raw.usage_metadata["output_tokens"]


FORCED = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {
    "type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}}}  # fmt: skip


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream", "batch"])
async def test_calls_tell_and_explain_their_tokens_by_every_way_of_langchain(chat_pack, way):
    pytest.importorskip("llguidance")
    chat_models = pytest.importorskip("langchain_packllm.chat_models")
    model = chat_models.ChatPackLLM(pack=chat_pack, max_tokens=60, top_logprobs=1, explain=True)
    bound = model.bind_tools([FORCED], tool_choice="any")
    if way == "batch":
        said, _ = bound.batch([PROMPT, "Insulin"])
    elif way == "invoke":
        said = bound.invoke(PROMPT)
    elif way == "ainvoke":
        said = await bound.ainvoke(PROMPT)
    else:
        chunks = [chunk async for chunk in bound.astream(PROMPT)] if way == "astream" else list(bound.stream(PROMPT))
        said = sum(chunks[1:], chunks[0])
    (call,) = said.tool_calls
    assert call["args"]["a"] in ("x", "y")
    told, explained = said.response_metadata["logprobs"]["content"], said.response_metadata["packllm"]["explanation"]
    assert_spelt(told, explained["tokens"], said.usage_metadata["output_tokens"])


@pytest.mark.parametrize("way", ["chat", "stream_chat", "achat", "astream_chat"])
async def test_calls_tell_and_explain_their_tokens_by_every_way_of_llama_index(chat_pack, way):
    pytest.importorskip("llguidance")
    pytest.importorskip("llama_index.core")
    from llama_index.core.llms import ChatMessage

    from llama_index.llms.packllm import PackLLM

    llm = PackLLM(pack=chat_pack, max_tokens=60, top_logprobs=1, explain=True)
    answer = getattr(llm, way)([ChatMessage(PROMPT)], tools=[FORCED], tool_choice="any")
    if way.startswith("a"):
        answer = await answer
    if "stream" in way:
        answer = [step async for step in answer][-1] if way.startswith("a") else list(answer)[-1]
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_kwargs["a"] in ("x", "y")
    told, usage = answer.raw["logprobs"], answer.raw["usage"]
    assert_spelt(told, answer.raw["explanation"]["tokens"], usage["completion_tokens"])
    assert [place[0].logprob for place in answer.logprobs] == [token["logprob"] for token in told]


def assert_spelt(told, explained, count):
    spelled = b"".join(bytes(token["bytes"]) for token in told).decode()
    assert json.loads(spelled.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))["name"] == "f"
    assert len(told) == len(explained) == count
    for token, carried in zip(told, explained, strict=True):
        parts = {name: weight * math.exp(token["members"][name]) for name, weight in carried["weights"].items()}
        shares = {name: part / sum(parts.values()) for name, part in parts.items()}
        assert carried["share"] == pytest.approx(shares, abs=1e-4)


def test_langchain_gives_n_answers_and_takes_openais_names(chat_pack):
    langchain_packllm = pytest.importorskip("langchain_packllm")
    from langchain_core.messages import HumanMessage

    told = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {"9": -1}, "temperature": 1.0, "seed": 3}
    model = langchain_packllm.ChatPackLLM(pack=chat_pack, n=2, **told)
    prompt = [{"role": "user", "content": PROMPT}]
    expected = [answer.text for answer in chat_pack.generate(prompt, n=2, **told)]
    assert expected[0] != expected[1]
    result = model.generate([[HumanMessage(PROMPT)]])
    assert [one.text for one in result.generations[0]] == expected
    usage = model._generate([HumanMessage(PROMPT)]).llm_output["token_usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == chat_pack.count_tokens(prompt)
    assert model.invoke(PROMPT).content == expected[0]
    llm = langchain_packllm.PackLLM(pack=chat_pack, **told)
    result = llm.generate([PROMPT, "Insulin"], n=2, top_logprobs=1)
    assert [one.text for one in result.generations[0]] == expected
    assert len(result.generations[1]) == 2
    assert result.llm_output["token_usage"]["prompt_tokens"] == sum(
        chat_pack.count_tokens([{"role": "user", "content": text}]) for text in (PROMPT, "Insulin")
    )
    tokens = result.generations[0][1].generation_info["logprobs"]["content"]
    others = chat_pack.generate(prompt, n=2, top_logprobs=1, **told)[1].logprobs
    assert [token["id"] for token in tokens] == [other.id for other in others]
    assert [t["logprob"] for t in tokens] == pytest.approx([other.logprob for other in others], abs=1e-4)
    with pytest.raises(OptionError, match="stream_batch"):
        list(model.stream(PROMPT))


def test_llama_index_responses_tell_them(chat_pack):
    pytest.importorskip("llama_index.core")
    from llama_index.core.llms import ChatMessage

    from llama_index.llms.packllm import PackLLM

    llm = PackLLM(pack=chat_pack, top_logprobs=2)
    expected = chat_pack.generate(PROMPT, top_logprobs=2).logprobs
    for response in (llm.complete(PROMPT), llm.chat([ChatMessage(PROMPT)]), list(llm.stream_complete(PROMPT))[-1]):
        assert [(place[0].token, place[0].bytes) for place in response.logprobs] == [
            (token.token, list(token.bytes)) for token in expected
        ]
        for place, token in zip(response.logprobs, expected, strict=True):
            likely = {other.logprob for other in (token, *token.top_logprobs)}
            assert {other.logprob for other in place} == likely
        assert json.loads(json.dumps(response.raw["logprobs"]))[0]["members"].keys() == EVEN.keys()
    assert PackLLM(pack=chat_pack).complete(PROMPT).logprobs is None
    with pytest.raises(OptionError, match="n=2"):
        llm.complete(PROMPT, n=2)
