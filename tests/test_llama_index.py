"""The LlamaIndex adapter: what INTEGRATION.md asks of completion and chat, and that it says what Pack says."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import copy
import functools
import gc
import importlib.util
import itertools
import json
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core import Document, PromptTemplate, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import llm as llm_events
from llama_index.core.llms import CustomLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from transformers import LlamaConfig, LlamaForCausalLM

import packllm
from llama_index.llms.packllm import PackLLM
from packllm import Chunk, Generation, OptionError, Options, Pack, PackError, PromptError, Usage, Weights

COMPLETION = ["complete", "stream_complete", "acomplete", "astream_complete"]
CHAT = ["chat", "stream_chat", "achat", "astream_chat"]
PATHS = COMPLETION + CHAT
STREAMS = [path for path in PATHS if "stream" in path]
ASYNC = [path for path in PATHS if path.startswith("a")]
PROMPT = "the heart is"
MESSAGES = [ChatMessage("be brief", role="system"), ChatMessage("what is the heart?", role="user")]
AS_DICTS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is the heart?"}]
WEIGHTS = Weights((0.75, 0.25), ("a", "b"), "linear", (1.0, 2.0), "token", "em", scored=4)


class ScriptedPack:
    """Says given pieces at a given pace, then perhaps fails; records what it was asked."""

    name, fingerprint, context_window, has_chat_template, members = "packllm:a+b", "scripted", 512, True, ()
    template_tokens = 0
    astream, agenerate = Pack.astream, Pack.agenerate

    def __init__(self, pieces=("one ", "two ", "three"), *, error=None, delay=0.0, **options: Any) -> None:
        self.pieces, self.error, self.delay, self.recipe = pieces, error, delay, None
        self.options = Options().override(options)
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.said = 0
        self.closed = threading.Event()

    def check(self, **options):
        return self.options.override(options)

    def stream(self, prompt, *, cancel=None, **options):
        self.check(**options)
        self.asked.append((prompt, options))
        return self._chunks()

    def _chunks(self):
        try:
            for piece in self.pieces:
                time.sleep(self.delay)
                self.said += 1
                yield Chunk(piece, WEIGHTS)
            if self.error:
                raise self.error
            yield Chunk("", WEIGHTS, "stop", Usage(7, len(self.pieces)), {"total": 0.5})
        finally:
            self.closed.set()

    def generate(self, prompt, **options):
        chunks = list(self.stream(prompt, **options))
        last = chunks[-1]
        text = "".join(chunk.text for chunk in chunks)
        return Generation(text, last.weights, last.finish_reason, last.usage, last.timings)

    @property
    def last(self):
        return self.asked[-1]


async def responses(llm: PackLLM, path: str, prompt: Any = None, **kwargs: Any) -> list[Any]:
    """Everything a path answers, as a list of responses."""
    answer = getattr(llm, path)(prompt or (PROMPT if path in COMPLETION else MESSAGES), **kwargs)
    if path.startswith("a"):
        answer = await answer
    if path not in STREAMS:
        return [answer]
    return [step async for step in answer] if path.startswith("a") else list(answer)


def text_of(response: Any) -> str:
    return response.message.content or "" if hasattr(response, "message") else response.text


def asked(path: str) -> Any:
    return PROMPT if path in COMPLETION else AS_DICTS


def one_event(events: LlamaDebugHandler) -> bool:
    """Whether exactly one LLM event started and exactly one ended (a failing trace adds an event of another type)."""
    return [len(pair) for pair in events.get_event_pairs(CBEventType.LLM)] == [2]


@pytest.fixture(scope="module")
def saved_pack(byte_tokenizer, tmp_path_factory):
    """A pack that was loaded from folders, with room for LlamaIndex's own templates."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(byte_tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.5,
        )
        folders.append(str(tmp_path_factory.mktemp("models") / f"tiny-{seed}"))
        LlamaForCausalLM(config).save_pretrained(folders[-1])
        byte_tokenizer.save_pretrained(folders[-1])
    return Pack.load(folders, max_tokens=6)


@pytest.fixture
def events():
    """LlamaIndex's callback events, kept as LlamaDebugHandler keeps them."""
    return LlamaDebugHandler(print_trace_on_end=False)


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "IS_TESTING"):
        monkeypatch.delenv(name, raising=False)


# -- the same answer on every path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_every_path_says_what_pack_says(pack, path):
    llm = PackLLM(pack=pack, max_tokens=12)
    expected = pack.generate(asked(path), max_tokens=12)
    steps = await responses(llm, path)
    assert text_of(steps[-1]) == expected.text
    assert not expected.text.startswith((PROMPT, "be brief", "system"))  # never an echo of the prompt
    if path in STREAMS:
        assert "".join(step.delta for step in steps) == expected.text
        assert all(text_of(b).startswith(text_of(a)) for a, b in itertools.pairwise(steps))
    else:
        assert steps[-1].delta is None
    if path in CHAT:
        assert steps[-1].message.role is MessageRole.ASSISTANT
    raw = steps[-1].raw
    assert json.loads(json.dumps(raw)) == raw
    assert raw["packllm"] == {**expected.weights.as_dict(), "usage": raw["usage"], "timings": raw["timings"]}
    assert raw["timings"]["total"] > 0
    assert raw["usage"] == expected.usage.as_dict()
    assert raw["finish_reason"] == expected.finish_reason
    assert raw["text"] == expected.text
    json.loads(steps[-1].model_dump_json())


@pytest.mark.parametrize("path", PATHS)
async def test_stop_inside_the_text(pack, path):
    full = pack.generate(asked(path), max_tokens=10).text
    assert len(full) >= 6, "the fixture's models say too little to test a stop"
    at = len(full) // 2
    stop = full[at : at + 3]
    cut = full[: full.index(stop)]
    per_call = await responses(PackLLM(pack=pack, max_tokens=10), path, stop=[stop])
    of_instance = await responses(PackLLM(pack=pack, max_tokens=10, stop=stop), path)
    for steps in (per_call, of_instance):
        assert text_of(steps[-1]) == cut
        assert not any(stop in text_of(step) for step in steps)
        assert steps[-1].raw["finish_reason"] == "stop"


@pytest.mark.parametrize("path", PATHS)
async def test_call_options_win_over_the_adapter_and_it_over_the_pack(make_pack, path):
    pack = make_pack(max_tokens=9)
    for llm, kwargs, expected in [
        (PackLLM(pack=pack), {}, 9),
        (PackLLM(pack=pack, max_tokens=6), {}, 6),
        (PackLLM(pack=pack, max_tokens=6), {"max_tokens": 3}, 3),
    ]:
        steps = await responses(llm, path, **kwargs)
        assert text_of(steps[-1]) == pack.generate(asked(path), max_tokens=expected).text


@given(st.lists(st.text(max_size=5), max_size=6))
def test_deltas_join_to_the_text(pieces):
    steps = list(PackLLM(pack=ScriptedPack(pieces)).stream_complete("x"))
    assert "".join(step.delta for step in steps) == "".join(pieces) == steps[-1].text
    assert all(step.raw["packllm"]["weights"] == [0.75, 0.25] for step in steps)
    assert [step.raw.get("usage") for step in steps[:-1]] == [None] * len(pieces)


async def test_concurrent_calls_do_not_mix(pack):
    llm = PackLLM(pack=pack, max_tokens=8)
    prompts = [f"{PROMPT} {word}" for word in ("red", "blue", "green", "old")]
    together = await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts))
    assert [answer.text for answer in together] == [pack.generate(prompt, max_tokens=8).text for prompt in prompts]


# -- options and construction -----------------------------------------------------------------------------------------


def test_only_options_set_here_are_forwarded():
    pack = ScriptedPack(temperature=0.5)
    PackLLM(pack=pack).complete("x")
    assert pack.last == ("x", {})
    llm = PackLLM(pack=pack, top_k=5, stop="end")
    llm.chat(MESSAGES, seed=3)
    assert pack.last == (AS_DICTS, {"top_k": 5, "stop": ("end",), "seed": 3})
    llm.temperature = 0.25
    llm.complete("x", top_k=None)
    assert pack.last == ("x", {"temperature": 0.25, "top_k": None, "stop": ("end",)})


def test_models_are_loaded_with_the_given_words(monkeypatch):
    seen = {}

    def load(models, **words):
        seen.update(models=models, **words)
        pack = ScriptedPack()
        pack.recipe = {"models": list(models), "dtype": words["dtype"], "device_map": "auto"}
        return pack

    monkeypatch.setattr(packllm.Pack, "load", load)
    llm = PackLLM(models=["a", "b"], weighting="sim", max_tokens=4, dtype="bfloat16", trust_remote_code=True)
    assert seen == {
        "models": ["a", "b"],
        "weighting": "sim",
        "max_tokens": 4,
        "dtype": "bfloat16",
        "trust_remote_code": True,
    }
    assert (llm.models, llm.dtype, llm.device_map, llm.max_tokens) == (["a", "b"], "bfloat16", "auto", 4)


def test_several_answers_are_refused_when_the_model_is_made_and_when_it_is_asked(pack):
    for refused in (lambda: PackLLM(pack=pack, n=2), lambda: PackLLM(pack=pack).complete("Hello", n=2)):
        with pytest.raises(OptionError, match=r"n=2: .*call pack\.generate\(prompt, n=2\)"):
            refused()
    assert PackLLM(pack=pack, n=1).complete("Hello").text == PackLLM(pack=pack).complete("Hello").text


def test_wrong_words_are_refused_before_loading(monkeypatch):
    monkeypatch.setattr(packllm.Pack, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(OptionError, match=r"'temprature'.*temperature.*system_prompt"):
        PackLLM(models=["a"], temprature=1.0)
    with pytest.raises(OptionError, match="temperature=-1"):
        PackLLM(models=["a"], temperature=-1)
    with pytest.raises(OptionError, match="one of the two"):
        PackLLM()
    with pytest.raises(OptionError, match="one of the two"):
        PackLLM(models=["a"], pack=ScriptedPack())
    with pytest.raises(OptionError, match=r"dtype belongs to models="):
        PackLLM(pack=ScriptedPack(), dtype="float16")


@pytest.mark.parametrize("path", PATHS)
async def test_unknown_call_option_is_refused_at_the_call(pack, path):
    call = functools.partial(getattr(PackLLM(pack=pack), path), PROMPT if path in COMPLETION else MESSAGES)
    with pytest.raises(OptionError, match=r"'temprature'.*did you mean 'temperature'"):  # before any next()
        await call(temprature=1.0) if path.startswith("a") else call(temprature=1.0)


def test_metadata(make_pack):
    pack = make_pack()
    metadata = PackLLM(pack=pack, max_tokens=17).metadata
    assert metadata.context_window == pack.context_window - pack.template_tokens  # LlamaIndex counts text alone
    assert metadata.num_output == 17
    assert metadata.is_chat_model is pack.has_chat_template is True
    assert metadata.is_function_calling_model is True
    assert metadata.model_name == pack.name
    assert PackLLM(pack=make_pack(max_tokens=5)).metadata.num_output == 5


def test_metadata_where_nothing_is_known():
    pack = ScriptedPack()
    pack.context_window, pack.has_chat_template = None, False
    metadata = PackLLM(pack=pack).metadata
    assert (metadata.context_window, metadata.num_output, metadata.is_chat_model) == (3900, 256, False)
    for window, answer in ((100, 50), (128, 64), (512, 128), (8192, 256)):
        pack.context_window = window
        assert PackLLM(pack=pack).metadata.num_output == answer


def test_class():
    assert issubclass(PackLLM, CustomLLM)
    assert PackLLM.class_name() == "PackLLM"
    assert PackLLM.class_name() != CustomLLM.class_name()


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMPLETION)
async def test_completion_to_prompt(path):
    pack = ScriptedPack(chat_template=True)
    llm = PackLLM(pack=pack, completion_to_prompt=lambda prompt: f"<<{prompt}>>")
    await responses(llm, path)
    assert pack.last == (f"<<{PROMPT}>>", {})
    await responses(llm, path, formatted=True)
    assert pack.last == (PROMPT, {"chat_template": False})


@pytest.mark.parametrize("path", CHAT)
async def test_messages_to_prompt(path):
    pack = ScriptedPack()
    await responses(PackLLM(pack=pack, messages_to_prompt=lambda m: "|".join(x.content for x in m)), path)
    assert pack.last == ("be brief|what is the heart?", {})


def test_system_prompt_is_cores_business():
    pack = ScriptedPack()
    llm = PackLLM(pack=pack, system_prompt="be kind")
    llm.complete("x")
    assert pack.last[0] == "x"
    llm.predict(PromptTemplate("say {word}"), word="hi")
    assert pack.last[0] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "say hi"}]
    pack.has_chat_template = False
    llm.predict(PromptTemplate("say {word}"), word="hi")
    assert pack.last[0] == "be kind\n\nsay hi"


@pytest.mark.parametrize("path", CHAT)
async def test_blocks(path):
    pack = ScriptedPack()
    llm = PackLLM(pack=pack)
    await responses(llm, path, [ChatMessage(blocks=[TextBlock(text="a"), TextBlock(text="b")]), ChatMessage()])
    assert pack.last[0] == [{"role": "user", "content": "a\nb"}, {"role": "user", "content": ""}]
    image = ChatMessage(blocks=[TextBlock(text="what is this?"), ImageBlock(url="http://localhost/x.png")])
    with pytest.raises(PromptError, match=r"ImageBlock.*'user'.*text only"):
        await responses(llm, path, [image])


def test_roles():
    pack = ScriptedPack()
    roles = {role: role.value for role in MessageRole} | {
        MessageRole.DEVELOPER: "system",
        MessageRole.CHATBOT: "assistant",
        MessageRole.MODEL: "assistant",
        MessageRole.FUNCTION: "tool",
    }
    PackLLM(pack=pack).chat([ChatMessage("x", role=role) for role in roles])
    assert [message["role"] for message in pack.last[0]] == list(roles.values())


# -- events -----------------------------------------------------------------------------------------------------------


class _Instrumented(BaseEventHandler):
    seen: list[Any] = []  # noqa: RUF012  (pydantic copies it per instance)

    def handle(self, event: Any, **_: Any) -> None:
        self.seen.append(type(event))


@pytest.mark.parametrize("path", PATHS)
async def test_one_event_and_exact_counts(pack, events, path):
    counter = TokenCountingHandler(tokenizer=lambda text: pytest.fail("token counts were guessed"))
    llm = PackLLM(pack=pack, max_tokens=10, callback_manager=CallbackManager([events, counter]))
    instrumented = _Instrumented()
    root = get_dispatcher()
    root.add_event_handler(instrumented)
    try:
        steps = await responses(llm, path)
    finally:
        root.event_handlers.remove(instrumented)
    usage = pack.generate(asked(path), max_tokens=10).usage
    assert one_event(events)
    assert [(c.prompt_token_count, c.completion_token_count) for c in counter.llm_token_counts] == [
        (usage.prompt_tokens, usage.completion_tokens)
    ]
    kind = "Completion" if path in COMPLETION else "Chat"
    assert instrumented.seen.count(getattr(llm_events, f"LLM{kind}StartEvent")) == 1
    assert instrumented.seen.count(getattr(llm_events, f"LLM{kind}EndEvent")) == 1
    in_progress = len(steps) if path in STREAMS else 0
    assert instrumented.seen.count(getattr(llm_events, f"LLM{kind}InProgressEvent")) == in_progress
    assert len(instrumented.seen) == 2 + in_progress


@pytest.mark.parametrize("path", PATHS)
async def test_errors_pass_through_unchanged_and_at_once(events, path):
    error = PackError("member 'b' failed")
    llm = PackLLM(pack=ScriptedPack(error=error), callback_manager=CallbackManager([events]))
    started = time.monotonic()
    with pytest.raises(PackError) as raised:
        await responses(llm, path)
    assert raised.value is error
    assert time.monotonic() - started < 2
    assert one_event(events)


@pytest.mark.parametrize("path", PATHS)
async def test_too_long_is_a_typed_error(pack, path):
    words = "heart " * 4000
    with pytest.raises(PackError, match=r"prompt of \d+ tokens .* context window"):
        await responses(PackLLM(pack=pack), path, words if path in COMPLETION else [ChatMessage(words)])


# -- the event loop, and closing --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def heartbeats():
    beats = [0]

    async def beat():
        while True:
            await asyncio.sleep(0.005)
            beats[0] += 1

    task = asyncio.create_task(beat())
    yield beats
    task.cancel()


@pytest.mark.parametrize("path", ASYNC)
async def test_the_loop_stays_free(path):
    llm = PackLLM(pack=ScriptedPack(["word "] * 10, delay=0.03))
    async with heartbeats() as beats:
        await responses(llm, path)
    assert beats[0] >= 10


@pytest.mark.parametrize("path", [path for path in STREAMS if path not in ASYNC])
def test_closing_a_stream_ends_the_work(events, path):
    pack = ScriptedPack(["word "] * 100)
    llm = PackLLM(pack=pack, callback_manager=CallbackManager([events]))
    gc.disable()  # closing must do it, not a lucky collection
    try:
        stream = getattr(llm, path)("x" if path in COMPLETION else MESSAGES)
        next(stream)
        stream.close()
        assert pack.closed.is_set()
    finally:
        gc.enable()
    assert pack.said == 1
    assert one_event(events)


@pytest.mark.parametrize("path", [path for path in STREAMS if path in ASYNC])
async def test_closing_an_async_stream_ends_the_work(events, path):
    pack = ScriptedPack(["word "] * 100)
    llm = PackLLM(pack=pack, callback_manager=CallbackManager([events]))
    stream = await getattr(llm, path)("x" if path in COMPLETION else MESSAGES)
    await anext(stream)
    await stream.aclose()
    assert pack.closed.is_set()
    assert pack.said == 1
    assert one_event(events)


@pytest.mark.parametrize("path", ASYNC)
async def test_cancelling_ends_the_work(events, path):
    pack = ScriptedPack(["word "] * 100, delay=0.05)
    llm = PackLLM(pack=pack, callback_manager=CallbackManager([events]))
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(responses(llm, path), 0.12)
    assert time.monotonic() - started < 2
    assert await asyncio.to_thread(pack.closed.wait, 2)
    assert pack.said < 50
    assert one_event(events)


async def test_one_thread_steps_a_stream_and_then_ends():
    threads = set()

    class Watched(ScriptedPack):
        def _chunks(self):
            for chunk in super()._chunks():
                threads.add(threading.current_thread())
                yield chunk

    before = threading.active_count()
    await responses(PackLLM(pack=Watched()), "astream_complete")
    (thread,) = threads
    thread.join(2)
    assert not thread.is_alive()
    assert threading.active_count() == before


# -- copies -----------------------------------------------------------------------------------------------------------


def test_pickle_loads_again_and_leaves_the_live_one_whole(saved_pack):
    llm = PackLLM(pack=saved_pack, stop=["zzz"], system_prompt="be brief")
    before = dict(vars(llm))
    again = pickle.loads(pickle.dumps(llm))
    assert vars(llm) == before
    assert again.pack is not llm.pack
    assert again.pack.recipe == llm.pack.recipe
    assert (again.stop, again.system_prompt, again.metadata) == (("zzz",), "be brief", llm.metadata)
    assert again.complete(PROMPT).text == llm.complete(PROMPT).text
    assert llm.stop == ("zzz",)


def test_members_cannot_be_pickled():
    with pytest.raises(PackError, match="Member objects"):
        pickle.dumps(PackLLM(pack=ScriptedPack()))


def test_copies_share_the_loaded_models(pack):
    llm = PackLLM(pack=pack, max_tokens=5)
    for other in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy(update={"max_tokens": 5})):
        assert other.pack is pack
        assert other.complete(PROMPT).text == llm.complete(PROMPT).text
    assert llm.model_copy(update={"max_tokens": 2}).complete(PROMPT).text == pack.generate(PROMPT, max_tokens=2).text


def test_dict_and_json_load_again(saved_pack):
    llm = PackLLM(pack=saved_pack, stop=["zzz"])
    data = json.loads(llm.to_json())
    assert data["class_name"] == "PackLLM"
    assert "temperature" not in data  # nobody set it: it stays the pack's
    again = PackLLM.from_dict(data)
    assert again.complete(PROMPT).text == llm.complete(PROMPT).text
    assert again.model_fields_set & set(Options.model_fields) == {"max_tokens", "stop"}


# -- inside LlamaIndex ------------------------------------------------------------------------------------------------

DOCUMENTS = [Document(text="the heart moves blood."), Document(text="the river moves water.")]


async def test_query_engines(saved_pack):
    llm = PackLLM(pack=saved_pack)
    vectors = VectorStoreIndex.from_documents(DOCUMENTS, embed_model=MockEmbedding(embed_dim=4))
    retriever = vectors.as_retriever(similarity_top_k=2)
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm)
    answer = engine.query("what moves blood?")
    assert answer.response
    assert (await engine.aquery("what moves blood?")).response == answer.response
    streaming = RetrieverQueryEngine.from_args(retriever, llm=llm, streaming=True)
    assert "".join(streaming.query("what moves blood?").response_gen) == answer.response


def test_through_settings(saved_pack, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", None)
    monkeypatch.setattr(Settings, "_tokenizer", None)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    Settings.llm = PackLLM(pack=saved_pack)
    Settings.tokenizer = saved_pack.tokenize
    template = PromptTemplate("{context_str}\n{query_str}")
    engine = SummaryIndex.from_documents(DOCUMENTS[:1]).as_query_engine(text_qa_template=template)
    asked = [{"role": "user", "content": "the heart moves blood.\nwhat moves blood?"}]
    assert str(engine.query("what moves blood?")) == saved_pack.generate(asked).text


async def test_chat_engine(pack):
    engine = SimpleChatEngine.from_defaults(llm=PackLLM(pack=pack, max_tokens=6))
    first = engine.chat("what is the heart?").response
    second = (await engine.achat("and the river?")).response
    history = [
        {"role": "user", "content": "what is the heart?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "and the river?"},
    ]
    assert second == pack.generate(history, max_tokens=6).text


async def test_react_agent():
    """It sends no stop of its own: the one given here keeps a model from inventing observations."""
    said = ["Thought: I can answer without using any more tools.\n", "Answer: 42"]
    pack = ScriptedPack(said)
    agent = ReActAgent(tools=[], llm=PackLLM(pack=pack, stop=["Observation:"]))
    assert str(await agent.run("what is six times seven?")) == "42"
    assert pack.last[1] == {"stop": ("Observation:",)}
    assert [message["role"] for message in pack.last[0]] == ["system", "user"]


# -- what the package is made of --------------------------------------------------------------------------------------


def test_adapter_imports_public_names_only():
    root = Path(importlib.util.find_spec("llama_index.llms.packllm").origin).parent
    allowed = {"pydantic", *sys.stdlib_module_names}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.module == "packllm":
                assert {name.name for name in node.names} <= set(packllm.__all__), path
            elif isinstance(node, ast.ImportFrom):
                known = node.module.startswith(("llama_index.core", "llama_index.llms.packllm"))
                assert known or node.module.split(".")[0] in allowed, f"{path}: {node.module}"


def test_namespace_package():
    root = Path(importlib.util.find_spec("llama_index.llms.packllm").origin).parent
    assert not (root.parent / "__init__.py").exists()
    assert not (root.parent.parent / "__init__.py").exists()
