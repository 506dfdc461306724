"""packllm serve for the clients that people have, without patches; each is skipped where it is not installed."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from conftest import _config, byte_level_tokenizer
from pydantic import BaseModel
from pytest_socket import enable_socket
from scripted import follows, llama3_like
from served import QUESTION, failing, listening
from transformers import AutoModelForCausalLM

from packllm import Member, Pack
from packllm.serve.app import create_app

pytestmark = pytest.mark.enable_socket

TEXT = "The court shall order relief under chapter 7 unless the debtor objects"
KEY = {"api_key": "none"}


class Answer(BaseModel):
    sure: bool


@pytest.fixture(scope="module")
def pack(make_member) -> Pack:
    members = [make_member("llama", 0, name="general"), make_member("gpt2", 1, name="law")]
    return Pack(members, max_tokens=8, weighting={"general": 0.6, "law": 0.4})


@pytest.fixture(scope="module")
def url(pack) -> Iterator[str]:
    """Where the server listens, on loopback."""
    with on_loopback(create_app(pack)) as address:
        yield address


@contextlib.contextmanager
def on_loopback(app: Any) -> Iterator[str]:
    enable_socket()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with listening(app, host="127.0.0.1", port=port):
        yield f"http://127.0.0.1:{port}/v1"


def look_up(sure: bool) -> str:
    """Look something up."""
    return f"looked up: {sure}"


# OpenAI's own


@pytest.fixture
def openai(url) -> Any:
    return pytest.importorskip("openai", reason="openai is not installed").OpenAI(base_url=url, **KEY)


def test_openai_chats(openai, pack):
    expected = pack.generate(QUESTION)
    asked: dict[str, Any] = {"model": "pack", "messages": QUESTION}
    answer = openai.chat.completions.create(**asked, extra_body={"packllm": {"pool": "linear"}})
    assert answer.choices[0].message.content == expected.text
    assert answer.packllm["weights"]["end"]["weights"] == [0.6, 0.4]
    chunks = list(openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == expected.text
    assert chunks[-1].usage.completion_tokens == expected.usage.completion_tokens
    told = openai.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    expected = pack.generate(QUESTION, top_logprobs=3)
    assert [one.logprob for one in told.choices[0].logprobs.content] == [one.logprob for one in expected.logprobs]
    assert all(len(one.top_logprobs) == 3 for one in told.choices[0].logprobs.content)
    assert {one.id for one in openai.models.list()} == {"pack", "general", "law"}


def test_openai_completes(openai, pack):
    ids = pack.tokenize(TEXT)
    told = openai.completions.create(model="pack", prompt=ids, echo=True, logprobs=2, max_tokens=2).choices[0]
    assert told.text == TEXT + pack.generate(TEXT, chat_template=False, max_tokens=2).text
    assert len(told.logprobs.token_logprobs) == len(ids) + 2
    chunks = openai.completions.create(model="law", prompt=[TEXT, "a b"], stream=True)
    texts = ["", ""]
    for one in chunks:
        texts[one.choices[0].index] += one.choices[0].text
    law = Pack([pack.members[1]], max_tokens=8, chat_template=False)
    assert texts == [one.text for one in law.generate_batch([TEXT, "a b"])]


def test_openai_parses_and_calls(openai):
    pytest.importorskip("llguidance")
    import openai as package

    parsed = openai.chat.completions.parse(model="pack", messages=QUESTION, response_format=Answer, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    tool = package.pydantic_function_tool(Answer)
    called = openai.chat.completions.parse(
        model="pack", messages=QUESTION, tools=[tool], tool_choice="required", max_tokens=60
    )
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Answer)
    with openai.chat.completions.stream(
        model="pack", messages=QUESTION, tools=[tool], tool_choice="required", max_tokens=60
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments
    assert final.choices[0].finish_reason == "tool_calls"


def test_openai_knows_the_errors(openai):
    import openai as package

    for error, asked in (
        (package.NotFoundError, {"model": "nobody"}),
        (package.BadRequestError, {"model": "pack", "temperature": -1}),
        (package.BadRequestError, {"model": "pack", "max_tokens": 10**6}),
    ):
        with pytest.raises(error) as raised:
            openai.chat.completions.create(messages=QUESTION, **asked)
        assert raised.value.body["message"]
    assert raised.value.code == "context_length_exceeded"


def test_openai_responses(openai, pack):
    expected = pack.generate(QUESTION)
    answer = openai.responses.create(model="pack", input=QUESTION)
    assert answer.output_text == expected.text
    assert answer.usage.output_tokens == expected.usage.completion_tokens
    assert answer.status == ("completed" if expected.finish_reason == "stop" else "incomplete")
    with openai.responses.stream(model="pack", input=QUESTION) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == expected.text
    pytest.importorskip("llguidance")
    tool = {"type": "function", "name": "look_up", "parameters": Answer.model_json_schema()}
    asked: dict[str, Any] = {"model": "pack", "tools": [tool], "tool_choice": "required", "max_output_tokens": 60}
    answer = openai.responses.create(input=QUESTION, **asked)
    (call,) = answer.output
    assert call.type == "function_call"
    assert isinstance(json.loads(call.arguments)["sure"], bool)
    with openai.responses.stream(input=QUESTION, **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output[0].arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}
    said = [*QUESTION, {"role": "assistant", "content": "let me see"}, call.model_dump(exclude_none=True), result]
    history = [
        *QUESTION,
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [
                {"id": call.call_id, "type": "function", "function": {"name": "look_up", "arguments": call.arguments}}
            ],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "yes"},
    ]
    assert openai.responses.create(model="pack", input=said).output_text == pack.generate(history).text
    parsed = openai.responses.parse(model="pack", input="Sure?", text_format=Answer, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Answer)


# Frameworks


def _sdk(url: str, more: dict[str, Any]) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=url, max_retries=0, **KEY)
    return iter(client.responses.create(model="pack", input="Why?", stream=True, extra_body=more))


def _langchain(url: str, more: dict[str, Any]) -> Iterator[Any]:
    openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    asked = {"use_responses_api": True, "extra_body": more, "max_retries": 0}
    return openai.ChatOpenAI(base_url=url, model="pack", **asked, **KEY).stream("Why?")


def _llama_index(url: str, more: dict[str, Any]) -> Iterator[Any]:
    openai = pytest.importorskip("llama_index.llms.openai", reason="llama-index-llms-openai is not installed")
    from llama_index.core.base.llms.types import ChatMessage

    asked = {"additional_kwargs": {"model": "pack", "extra_body": more}, "max_retries": 0}
    return openai.OpenAIResponses(model="gpt-4o", api_base=url, **asked, **KEY).stream_chat([ChatMessage("Why?")])


@pytest.mark.parametrize("ask", [_sdk, _langchain, _llama_index])
def test_a_response_that_fails_in_the_middle_is_no_short_answer(url, pack, ask):
    with failing(pack.members[0], 6):
        pieces = ask(url, {"logit_bias": {"<|im_end|>": -100}, "max_output_tokens": 60})
        assert next(pieces)
        with pytest.raises(Exception, match="out of everything"):
            list(pieces)


async def test_langchain(url, pack):
    openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = openai.ChatOpenAI(base_url=url, model="pack", max_tokens=8, **KEY)
    expected = pack.generate(QUESTION).text
    assert model.invoke(QUESTION).content == expected
    assert "".join([one.content async for one in model.astream(QUESTION)]) == expected
    text = openai.OpenAI(base_url=url, model="pack", max_tokens=8, temperature=0, **KEY)
    assert text.invoke(TEXT) == pack.generate(TEXT, chat_template=False).text
    pytest.importorskip("llguidance")
    roomy = openai.ChatOpenAI(base_url=url, model="pack", max_tokens=60, **KEY)
    called = roomy.bind_tools([look_up], tool_choice="any").invoke(QUESTION)
    assert isinstance(called.tool_calls[0]["args"]["sure"], bool)
    assert isinstance(roomy.with_structured_output(Answer).invoke(QUESTION), Answer)


async def test_llama_index(url, pack):
    like = pytest.importorskip("llama_index.llms.openai_like", reason="llama-index-llms-openai-like is not installed")
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.tools import FunctionTool

    options = {"api_base": url, "model": "pack", "is_chat_model": True, "is_function_calling_model": True, **KEY}
    llm = like.OpenAILike(max_tokens=8, temperature=0, **options)
    expected = pack.generate(QUESTION).text
    asked = [ChatMessage(role="user", content=QUESTION[0]["content"])]
    assert llm.chat(asked).message.content == expected
    assert "".join([one.delta async for one in await llm.astream_chat(asked)]) == expected
    text = like.OpenAILike(max_tokens=8, temperature=0, **{**options, "is_chat_model": False})
    assert text.complete(TEXT).text == pack.generate(TEXT, chat_template=False).text
    pytest.importorskip("llguidance")
    roomy = like.OpenAILike(max_tokens=60, temperature=0, **options)
    tool = FunctionTool.from_defaults(look_up)
    found = roomy.chat_with_tools([tool], user_msg=QUESTION[0]["content"], tool_required=True)
    (call,) = roomy.get_tool_calls_from_response(found)
    assert isinstance(call.tool_kwargs["sure"], bool)


async def test_a_llama_index_query_engine_and_agent():
    """The same as in process, and a tool that is called; with members that read more than the other tiny ones."""
    like = pytest.importorskip("llama_index.llms.openai_like", reason="llama-index-llms-openai-like is not installed")
    pytest.importorskip("llguidance")
    from llama_index.core import Document, SummaryIndex
    from llama_index.core.agent.workflow import FunctionAgent

    from llama_index.llms.packllm import PackLLM

    tokenizer = byte_level_tokenizer()
    config = _config("llama", len(tokenizer))
    config.max_position_embeddings = 4096
    pack = Pack([Member(AutoModelForCausalLM.from_config(config).eval(), tokenizer)], max_tokens=60)
    called = []

    def look_up(sure: bool) -> str:
        """Look something up."""
        called.append(sure)
        return "found"

    with on_loopback(create_app(pack)) as url:
        options = {"api_base": url, "model": "pack", "is_chat_model": True, "is_function_calling_model": True, **KEY}
        llm = like.OpenAILike(max_tokens=60, temperature=0, **options)
        index = SummaryIndex.from_documents([Document(text=TEXT)])
        both = llm, PackLLM(pack=pack, max_tokens=60)
        found = [str(index.as_query_engine(llm=one).query("Who?")) for one in both]
        assert found[0] == found[1] != ""
        agent = FunctionAgent(tools=[look_up], llm=llm, initial_tool_choice="look_up")
        answer = await agent.run("Who may appeal?")
    assert [type(one) for one in called] == [bool]
    assert str(answer)


def test_litellm(url, pack, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    expected = pack.generate(QUESTION).text
    asked: dict[str, Any] = {"model": "openai/pack", "api_base": url, "messages": QUESTION, **KEY}
    assert litellm.completion(**asked).choices[0].message.content == expected
    chunks = litellm.completion(**asked, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == expected


def test_lm_evaluation_harness(url, pack, tmp_path):
    """The numbers that the in-process model class gives, under weights that the prompt does not move."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from packllm_eval.harness import PackLM

    byte_level_tokenizer().save_pretrained(tmp_path)
    remote = LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model="pack",
        tokenizer=str(tmp_path),
        batch_size=2,
        tokenizer_backend="huggingface",
    )
    local = PackLM(pack)
    pairs = [(TEXT, " within 30 days"), (TEXT, " is"), ("A query planner chooses", " an index scan")]

    def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
        return [Instance(kind, {}, one, at) for at, one in enumerate(arguments)]

    expected = local.loglikelihood(instances("loglikelihood", pairs))
    found = remote.loglikelihood(instances("loglikelihood", pairs))
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    texts = [(TEXT, {"until": ["\n\n"], "max_gen_toks": 8}), ("Once upon a time", {"until": ["a"], "max_gen_toks": 8})]
    written = remote.generate_until(instances("generate_until", texts))
    assert written == local.generate_until(instances("generate_until", texts))


def test_another_pack_takes_it_for_a_judge(tmp_path):
    """The probe of server members: its log-probabilities of prompts are right, token by token."""
    judges = pytest.importorskip("packllm.engines.server.judge", reason="there are no members on servers")
    from packllm.engines.load import Loader
    from packllm.engines.server.http import Endpoint
    from packllm.engines.server.tops import Tops

    text = " ".join([*judges.FLUENT, *judges.BEGUN])
    tokenizer = llama3_like(sorted({*re.findall(r" ?\w+", text), *re.findall(r"[^\w\s]", text)}))
    names = ("general", "law")
    encoder = follows(tokenizer, {}, "empty").encoder
    after: dict[str, Counter[str]] = defaultdict(Counter)
    for one in judges.FLUENT:
        pieces = [encoder.vocabulary.tokens[i].decode() for i in encoder.plain(one)]
        for first, second in pairwise(pieces):
            after[first][second] += 1
    members = []
    for name, sure in zip(names, (0.9, 0.6), strict=True):
        table = {a: {b: sure * n / found.total() for b, n in found.items()} for a, found in after.items()}
        members.append(follows(tokenizer, table, name))
    tokenizer.save_pretrained(tmp_path)
    fixed = {"general": 0.7, "law": 0.3}
    with on_loopback(create_app(Pack(members, chat_template=False, weighting=fixed))) as url:
        for model in ("pack", *names):
            for known in (None, encoder):
                judge, found = judges.Judge.of(Endpoint(url, None, 30.0), model, known)
                assert judge is not None, found
            tops, found = Tops.of(Endpoint(url, None, 30.0), model, encoder)
            assert tops is not None, found
            assert tops.named
        # Three tenths and half of one: what the server proves is what one pack here decodes.
        (far,) = Loader().members([f"far={url}#pack?tokenizer={tmp_path}"])
        both = Pack([far, members[1]], chat_template=False, weighting={"far": 0.5, "law": 0.5}, max_tokens=12)
        here = Pack(members, chat_template=False, weighting={"general": 0.35, "law": 0.65}, max_tokens=12)
        for prompt in judges.BEGUN:
            proved, plain = both.generate(prompt), here.generate(prompt)
            assert (proved.text, proved.decoding) == (plain.text, "tokens")
            assert proved.usage.rounds >= plain.usage.completion_tokens > 0
