"""What users complain of in local models under LangChain and LlamaIndex (INTEGRATION.md, section 6), asked of
every adapter with real tiny models. `faces` puts the adapters behind one set of verbs.

The numbers are those of the issues: lc is langchain-ai/langchain, li is run-llama/llama_index.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from faces import CHATTING, FACES, Face, LangChain, call
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import packllm
from packllm import ContextOverflowError, Member, MemberError, Pack, PackError

PROMPT = "the patient has a fever and"
TOKENS = 12

every_face = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)
chatting = pytest.mark.parametrize("face", CHATTING, ids=lambda face: face.name)


class Listener(Member):
    """A real member that keeps the prompts it is given, as text."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heard: list[str] = []
        self.ids: list[list[int]] = []

        encode = self.encoder.encode

        def listen(*asked: Any, **more: Any) -> Any:
            encoded = encode(*asked, **more)
            self.ids.append(encoded.ids)
            self.heard.append(self.tokenizer.decode(encoded.ids))
            return encoded

        self.encoder.encode = listen


@pytest.fixture
def listener(make_member: Any) -> Listener:
    member = make_member("llama", 0)
    return Listener(member.model, member.tokenizer, "tiny")


@pytest.fixture
def hooked(make_member: Any) -> Callable[..., Member]:
    """hooked(before, name="tiny"): a real member whose model calls `before()` first of all in every pass."""

    def make(before: Callable[[], None], name: str = "tiny") -> Member:
        member = make_member("llama", 0)
        model = copy.deepcopy(member.model)
        model.get_decoder().register_forward_pre_hook(lambda *_: before())
        return Member(model, member.tokenizer, name)

    return make


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty environment; sockets are disabled for all tests (pyproject)."""
    for name in list(os.environ):
        if name != "PYTEST_CURRENT_TEST":
            monkeypatch.delenv(name)


async def every_way(face: Face, text: str, **options: Any) -> dict[str, str]:
    return {
        "ask": face.ask(text, **options),
        "stream": "".join(face.stream(text, **options)),
        "batch": face.batch([text, text], **options)[1],
        "aask": await face.aask(text, **options),
        "astream": "".join([piece async for piece in face.astream(text, **options)]),
    }


def same(text: str) -> dict[str, str]:
    return dict.fromkeys(("ask", "stream", "batch", "aask", "astream"), text)


# --- 1. Stop strings ignored (lc #22601) ---


@every_face
async def test_stop_across_tokens_by_every_way(pack: Pack, face: type[Face]) -> None:
    face = face(pack, max_tokens=TOKENS)
    pieces = [chunk.text for chunk in pack.stream(face.prompt(PROMPT), max_tokens=TOKENS) if chunk.text]
    full = "".join(pieces)
    # A stop string that no chunk holds: the end of one token and the beginning of the next.
    borders = [left[-1] + right[0] for left, right in itertools.pairwise(pieces[2:])]
    stop = next(border for border in borders if not any(border in piece for piece in pieces))
    expected = full[: full.index(stop)]
    assert expected != full
    assert await every_way(face, PROMPT, stop=[stop]) == same(expected)
    pieces = list(face.stream(PROMPT, stop=[stop]))
    assert all(stop not in "".join(pieces[: at + 1]) for at in range(len(pieces)))  # not even for a moment
    assert await every_way(type(face)(pack, max_tokens=TOKENS, stop=[stop]), PROMPT) == same(expected)


# --- 2. The prompt comes back with the answer (lc #25916, #22225) ---


@every_face
async def test_the_answer_does_not_begin_with_the_prompt(pack: Pack, face: type[Face]) -> None:
    face = face(pack, max_tokens=TOKENS)
    expected = pack.generate(face.prompt(PROMPT), max_tokens=TOKENS).text
    assert expected
    for text in (await every_way(face, PROMPT)).values():
        assert text == expected
        assert PROMPT not in text
        assert "<|im_start|>" not in text


# --- 3. Tools dropped (lc #30453, #22379) ---

WEATHER = {
    "type": "function",
    "function": {
        "name": "look_up_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@chatting
def test_tools_reach_the_rendered_prompt(listener: Listener, face: type[Face]) -> None:
    face = face(Pack([listener]), max_tokens=2)
    face.converse([{"role": "user", "content": "hot in Oslo?"}], [WEATHER])
    *_, heard = listener.heard
    assert "look_up_weather" in heard
    assert "The weather of a city." in heard
    assert '"city"' in heard
    assert "hot in Oslo?" in heard


# --- 4. Tool messages refused (lc #15232) ---


@chatting
@pytest.mark.parametrize("tools", [[WEATHER], []], ids=["tools", "history only"])
def test_user_assistant_tool_round_trip(listener: Listener, face: type[Face], tools: list[dict]) -> None:
    face = face(Pack([listener]), max_tokens=4)
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hot in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call("look_up_weather", {"city": "Oslo"})]},
        {"role": "tool", "content": "minus 4 degrees", "tool_call_id": "call_1"},
    ]
    text = face.converse(conversation, tools)
    *_, heard = listener.heard
    at = [heard.rindex(part) for part in ("be brief", "hot in Oslo?", '"Oslo"', "minus 4 degrees")]
    assert at == sorted(at), heard
    assert "look_up_weather" in heard
    assert "minus 4 degrees" not in text
    face.converse([*conversation, {"role": "assistant", "content": "no"}, {"role": "user", "content": "sure?"}], tools)
    assert "sure?" in listener.heard[-1]


# --- 5. Asynchronous chat (lc #31575, #35095) ---


@every_face
async def test_asynchronous_is_as_synchronous(pack: Pack, face: type[Face]) -> None:
    face = face(pack, max_tokens=TOKENS)
    expected = face.ask(PROMPT)
    assert await face.aask(PROMPT) == expected
    assert "".join([piece async for piece in face.astream(PROMPT)]) == expected
    assert [piece async for piece in face.astream(PROMPT)] == list(face.stream(PROMPT))
    assert await asyncio.gather(*[face.aask(PROMPT) for _ in range(4)]) == [expected] * 4


# --- 6. The event loop blocked (li #6615, #18182) ---


async def beats_during(work: Any) -> int:
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.001)
            beats += 1

    heart = asyncio.create_task(beat())
    try:
        await work
    finally:
        heart.cancel()
    return beats


async def drain(face: Face, text: str) -> None:
    async for _ in face.astream(text):
        pass


@every_face
async def test_the_event_loop_stays_free(hooked: Callable[..., Member], face: type[Face]) -> None:
    face = face(Pack([hooked(partial(time.sleep, 0.015))]), max_tokens=20)
    assert await beats_during(face.aask(PROMPT)) >= 10
    assert await beats_during(drain(face, PROMPT)) >= 10

    async def blocking() -> None:
        face.ask(PROMPT)

    assert await beats_during(blocking()) < 10, "the check must see a blocked loop"


# --- 7. Counted twice (li #8996) ---


class Counted(BaseCallbackHandler):
    """Starts and ends of a model's runs."""

    def __init__(self) -> None:
        self.starts = self.ends = 0

    def on_llm_start(self, *_: Any, **__: Any) -> None:
        self.starts += 1

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        self.starts += 1

    def on_llm_end(self, *_: Any, **__: Any) -> None:
        self.ends += 1


async def one_by_one(face: Face, text: str) -> Iterator[str]:
    yield face.ask(text)
    yield "".join(face.stream(text))
    yield await face.aask(text)
    yield "".join([piece async for piece in face.astream(text)])


@every_face
async def test_one_event_a_call_and_exact_counts(pack: Pack, face: type[Face]) -> None:
    usage = pack.generate(face(pack).prompt(PROMPT), max_tokens=TOKENS).usage
    if issubclass(face, LangChain):
        counted, tokens = Counted(), UsageMetadataCallbackHandler()
        face = face(pack, max_tokens=TOKENS, callbacks=[counted, tokens])
    else:
        counted = LlamaDebugHandler(print_trace_on_end=False)
        tokens = TokenCountingHandler(tokenizer=lambda text: pytest.fail("token counts were guessed"))
        face = face(pack, max_tokens=TOKENS, callback_manager=CallbackManager([counted, tokens]))
    calls = 0
    async for _ in one_by_one(face, PROMPT):
        calls += 1
        if isinstance(counted, Counted):
            assert (counted.starts, counted.ends) == (calls, calls)
            if face.chat:  # the handler knows no usage of completion models
                (total,) = tokens.usage_metadata.values()
                got = (total["input_tokens"], total["output_tokens"])
                assert got == (calls * usage.prompt_tokens, calls * usage.completion_tokens)
        else:
            assert [len(pair) for pair in counted.get_event_pairs(CBEventType.LLM)] == [2] * calls
            got = [(count.prompt_token_count, count.completion_token_count) for count in tokens.llm_token_counts]
            assert got == [(usage.prompt_tokens, usage.completion_tokens)] * calls


# --- 8. A cached answer to another question (lc #40403) ---


@pytest.mark.parametrize("face", [f for f in FACES if issubclass(f, LangChain)], ids=lambda face: face.name)
async def test_other_options_are_another_answer(pack: Pack, face: type[Face]) -> None:
    """LlamaIndex keeps no answers; LangChain's cache must tell calls with different options apart."""
    face = face(pack, max_tokens=TOKENS, cache=InMemoryCache())

    async def ran(**options: Any) -> tuple[bool, str]:
        before = sum(member.engine.forwards for member in pack.members)
        text = face.ask(PROMPT, **options)
        assert await face.aask(PROMPT, **options) == text
        return sum(member.engine.forwards for member in pack.members) > before, text

    greedy, warm = await ran(temperature=0.0), await ran(temperature=1.0, seed=1)
    assert greedy[0]
    assert warm[0]
    assert greedy[1] != warm[1]
    assert await ran(temperature=0.0) == (False, greedy[1])
    assert await ran(temperature=1.0, seed=1) == (False, warm[1])
    assert (await ran(temperature=1.0, seed=2))[0]


@pytest.mark.parametrize("face", [f for f in FACES if not issubclass(f, LangChain)], ids=lambda face: face.name)
async def test_without_a_cache_every_call_runs(pack: Pack, face: type[Face]) -> None:
    face = face(pack, max_tokens=TOKENS)
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 1}, {"temperature": 0.0}):
        before = sum(member.engine.forwards for member in pack.members)
        assert face.ask(PROMPT, **options) == pack.generate(face.prompt(PROMPT), max_tokens=TOKENS, **options).text
        assert sum(member.engine.forwards for member in pack.members) > before


# --- 9. A failing model hangs the stream (transformers #22576) ---


@every_face
@pytest.mark.parametrize("left", [0, 4], ids=["reading", "writing"])
@pytest.mark.parametrize("way", ["ask", "stream", "batch", "aask", "astream"])
async def test_a_failing_model_raises_at_once(
    hooked: Callable[..., Member], face: type[Face], left: int, way: str
) -> None:
    def fail() -> None:
        if next(passes) >= left:
            raise RuntimeError("CUDA error: device-side assert triggered")

    passes = itertools.count()
    face = face(Pack([hooked(fail, "broken")]), max_tokens=50)

    ways = {
        "ask": lambda: asyncio.to_thread(face.ask, PROMPT),
        "stream": lambda: asyncio.to_thread(list, face.stream(PROMPT)),
        "batch": lambda: asyncio.to_thread(face.batch, [PROMPT]),
        "aask": lambda: face.aask(PROMPT),
        "astream": lambda: drain(face, PROMPT),
    }
    with pytest.raises(MemberError, match=r"'broken'.*device-side assert"):
        await asyncio.wait_for(ways[way](), 2)  # HuggingFaceLLM hangs, HuggingFacePipeline waits for 60 s


# --- 9a. Work goes on for nobody ---


@every_face
@pytest.mark.parametrize("way", ["aask", "astream"])
async def test_a_cancelled_task_stops_before_the_next_pass(
    hooked: Callable[..., Member], face: type[Face], way: str
) -> None:
    """Also where the step under way is the whole answer, hundreds of passes."""
    loop, told, passes = asyncio.get_running_loop(), threading.Event(), itertools.count(1)
    seen = 0

    def before() -> None:
        nonlocal seen
        seen = next(passes)
        if seen == 8:
            loop.call_soon_threadsafe(task.cancel)
            assert told.wait(60)

    def caches() -> int:
        gc.collect()
        return sum(type(thing) is DynamicCache for thing in gc.get_objects())

    members = [hooked(before, "a"), hooked(before, "b")]
    options = {"max_tokens": 40, "decoding": "cool+rerank", "weighting": {"a": 0.5, "b": 0.5}, "prefix_cache_mb": 0}
    asked, held = face(Pack(members, **options)), caches()
    task = asyncio.ensure_future(asked.aask(PROMPT) if way == "aask" else drain(asked, PROMPT))
    with pytest.raises(asyncio.CancelledError):
        await task
    told.set()
    while caches() > held:  # until the thread has let go of its work
        await asyncio.sleep(0)
    assert seen == 8


# --- 10. Keys and network for models that are here (lc #25258, #22804, #30333) ---

ALONE = """
import asyncio, socket, sys

def refuse(*args, **kwargs):
    raise OSError("no network here")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
sys.path[:0] = [{tests!r}]
from faces import FACES
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.packllm import PackLLM
from packllm import Pack

pack = Pack.load([{folder!r}, {folder!r}], max_tokens=5)
for kind in FACES:
    face = kind(pack)
    expected = pack.generate(face.prompt("a fever")).text
    assert face.ask("a fever") == "".join(face.stream("a fever")) == asyncio.run(face.aask("a fever")) == expected
    print(kind.name, "answered")

def count_beds(ward: int) -> str:
    "How many beds a ward has."
    return "12 beds"

async def run():
    llm = PackLLM(pack=pack, max_tokens=60)
    return await FunctionAgent(tools=[count_beds], llm=llm, initial_tool_choice="count_beds").run("how many beds?")

print("agent called", *[call.tool_name for call in asyncio.run(run()).tool_calls])
"""


def test_no_keys_and_no_network(byte_tokenizer: Any, tmp_path: Any) -> None:
    """A process of its own with an empty environment, so that imports are under the same rule."""
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    program = ALONE.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [*(f"{face.name} answered" for face in FACES), "agent called count_beds"]


# --- What nobody has reported yet ---


@every_face
async def test_too_long_is_a_typed_error(make_member: Any, face: type[Face]) -> None:
    """300 tokens in a window of 128 raise nothing in either framework's own adapters."""
    member = make_member("llama", 0)
    member.context_window = 128
    face = face(Pack([member]), max_tokens=TOKENS)
    words = "x " * 300
    for ask in (face.ask, lambda text: list(face.stream(text)), lambda text: face.batch([text])):
        with pytest.raises(ContextOverflowError) as raised:
            ask(words)
        assert (raised.value.limit, raised.value.max_tokens) == (128, TOKENS)
        assert raised.value.prompt_tokens >= 300
    for aask in (face.aask(words), drain(face, words)):
        with pytest.raises(ContextOverflowError):
            await aask


@every_face
def test_one_bos(make_member: Any, word_tokenizer: Any, face: type[Face]) -> None:
    """A template that writes BOS itself, and a tokenizer that adds it (transformers #37686)."""
    tokenizer = copy.deepcopy(word_tokenizer)  # the fixture is shared
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    listener = Listener(make_member("llama", 0, "words").model, tokenizer, "tiny")
    face(Pack([listener]), max_tokens=2).ask(PROMPT)
    *_, ids = listener.ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@every_face
def test_errors_are_packllms_own(pack: Pack, face: type[Face]) -> None:
    with pytest.raises(PackError, match="temprature"):
        face(pack).ask(PROMPT, temprature=1.0)
    assert packllm.OptionError.__mro__.index(ValueError)
