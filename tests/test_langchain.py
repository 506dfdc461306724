"""langchain_packllm: PackLLM says what Pack says, by every way LangChain has of asking."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField
from pydantic import ValidationError

import langchain_packllm
import packllm
from langchain_packllm import PackLLM
from packllm import Chunk, OptionError, Options, PackError, Usage, Weights

PROMPT = "the patient has a fever and"
TOKENS = 8
PUBLIC = {*packllm.__all__, "__version__"}
PROMPTS = [PROMPT, "once upon a time", "a"]


class ScriptedPack:
    """Says `pieces`, slowly if told so; counts and records what it is asked. Not a model: see `pack` for those."""

    name, fingerprint, context_window, recipe = "packllm:a+b", "f00", 128, None
    astream, astream_batch = packllm.Pack.astream, packllm.Pack.astream_batch

    def __init__(
        self, pieces: tuple[str, ...] = ("one ", "two ", "three"), *, delay: float = 0.0, fail_at: int | None = None
    ) -> None:
        self.pieces, self.delay, self.fail_at = pieces, delay, fail_at
        self.options = Options(temperature=0.25)
        self.steps, self.closed, self.asked = 0, 0, []

    def check(self, **options: Any) -> Options:
        return self.options.override(options)

    def stream(self, prompt: str, *, cancel: Any = None, **options: Any) -> Iterator[Chunk]:
        self.asked.append((prompt, options))
        return self._run(prompt, self.check(**options))

    def stream_batch(self, prompts: list[str], *, cancel: Any = None, **options: Any) -> Iterator[tuple[int, Chunk]]:
        streams = [self.stream(prompt, **options) for prompt in prompts]

        def run() -> Iterator[tuple[int, Chunk]]:
            for index, stream in enumerate(streams):
                with closing(stream):
                    for chunk in stream:
                        yield index, chunk

        return run()

    def _run(self, prompt: str, options: Options) -> Iterator[Chunk]:
        weights = Weights((0.75, 0.25), ("a", "b"), "linear", (1.0, 2.0), "token", "em", scored=3)
        try:
            for number, piece in enumerate(self.pieces):
                if number == self.fail_at:
                    raise packllm.MemberError("b", "non-finite logits")
                self.steps += 1
                time.sleep(self.delay)
                yield Chunk(piece, weights)
            usage = Usage(len(prompt.split()), len(self.pieces))
            yield Chunk("", weights, "stop", usage, {"total": 0.5})
        finally:
            self.closed += 1

    def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.starts, self.tokens, self.ends, self.errors = [], [], [], []

    def on_llm_start(self, serialized: Any, prompts: list[str], **kwargs: Any) -> None:
        self.starts.append((prompts, kwargs))

    def on_llm_new_token(self, token: str, *, chunk: Any = None, **kwargs: Any) -> None:
        self.tokens.append((token, chunk))

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        self.ends.append(response)

    def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.starts), len(self.ends), len(self.errors)


@pytest.fixture
def scripted() -> ScriptedPack:
    return ScriptedPack()


@pytest.fixture
def llm(pack: packllm.Pack) -> PackLLM:
    return PackLLM(pack=pack, max_tokens=TOKENS)


@pytest.fixture
def global_cache() -> Iterator[InMemoryCache]:
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


async def settle(ask: Any, *args: Any, **kwargs: Any) -> Any:
    """The answer of `ask`, waited for if it is asynchronous."""
    answer = ask(*args, **kwargs)
    return await answer if inspect.isawaitable(answer) else answer


async def every_way(llm: PackLLM, prompt: str, **kwargs: Any) -> dict[str, str]:
    return {
        "invoke": llm.invoke(prompt, **kwargs),
        "stream": "".join(llm.stream(prompt, **kwargs)),
        "batch": llm.batch([prompt, prompt], **kwargs)[1],
        "batch of one": llm.batch([prompt], **kwargs)[0],
        "ainvoke": await llm.ainvoke(prompt, **kwargs),
        "astream": "".join([piece async for piece in llm.astream(prompt, **kwargs)]),
        "abatch": (await llm.abatch([prompt, prompt], **kwargs))[1],
    }


# --- The same text by every way, equal to Pack.generate ---


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "sampled"])
async def test_every_way_gives_the_text_of_generate(pack: packllm.Pack, llm: PackLLM, options: dict[str, Any]) -> None:
    expected = pack.generate(PROMPT, max_tokens=TOKENS, **options).text
    assert expected
    if options:  # prompts of a batch have their own random streams; only single prompts are promised to be alike
        ways = {"invoke": llm.invoke(PROMPT, **options), "stream": "".join(llm.stream(PROMPT, **options))}
    else:
        ways = await every_way(llm, PROMPT)
    assert ways == dict.fromkeys(ways, expected)


def test_batch_answers_each_prompt_in_order(pack: packllm.Pack, llm: PackLLM) -> None:
    expected = [pack.generate(prompt, max_tokens=TOKENS).text for prompt in PROMPTS]
    assert llm.batch(PROMPTS) == expected
    assert llm.batch(PROMPTS, config={"max_concurrency": 2}) == expected
    assert llm.batch([]) == []


async def test_stop_across_token_borders_is_the_same_by_every_way(pack: packllm.Pack, llm: PackLLM) -> None:
    pieces = [chunk.text for chunk in pack.stream(PROMPT, max_tokens=TOKENS) if chunk.text]
    middle = len(pieces) // 2
    stop = pieces[middle - 1][-1] + pieces[middle][0]
    full = "".join(pieces)
    expected = full[: full.index(stop)]
    ways = await every_way(llm, PROMPT, stop=[stop])
    assert ways == dict.fromkeys(ways, expected)
    assert stop not in expected


def test_the_prompt_is_not_echoed(llm: PackLLM) -> None:
    assert not llm.invoke(PROMPT).startswith(PROMPT)
    assert not "".join(llm.stream(PROMPT)).startswith(PROMPT)


def test_chain(pack: packllm.Pack, llm: PackLLM) -> None:
    chain = PromptTemplate.from_template("the patient has a {what} and") | llm | StrOutputParser()
    expected = pack.generate(PROMPT, max_tokens=TOKENS).text
    assert chain.invoke({"what": "fever"}) == expected
    assert "".join(chain.stream({"what": "fever"})) == expected
    assert chain.batch([{"what": "fever"}] * 2) == [expected] * 2


def test_too_long_a_prompt_is_a_typed_error_at_once(llm: PackLLM) -> None:
    for ask in (llm.invoke, lambda prompt: list(llm.stream(prompt)), lambda prompt: llm.batch([prompt, PROMPT])):
        start = time.perf_counter()
        with pytest.raises(packllm.ContextOverflowError, match="context window"):
            ask("fever " * 2_000)
        assert time.perf_counter() - start < 2


def test_tokens_are_counted_by_the_pack(pack: packllm.Pack, llm: PackLLM) -> None:
    assert llm.get_token_ids(PROMPT) == pack.tokenize(PROMPT)
    assert llm.get_num_tokens(PROMPT) == pack.count_tokens(PROMPT) > 0
    assert PackLLM(pack=pack, custom_get_token_ids=lambda text: [7]).get_num_tokens(PROMPT) == 1


# --- Options: the call over the adapter over the pack ---


def test_options_of_the_call_beat_the_adapters_which_beat_the_packs(scripted: ScriptedPack) -> None:
    PackLLM(pack=scripted).invoke("p")
    PackLLM(pack=scripted, temperature=0.0, top_k=3).invoke("p")
    PackLLM(pack=scripted, temperature=0.0, top_k=3).invoke("p", top_k=4)
    PackLLM(pack=scripted, max_tokens=5).batch(["p", "q"], top_k=4)
    list(PackLLM(pack=scripted, max_tokens=5).stream("p", top_k=4))
    assert [scripted.options.override(options) for _, options in scripted.asked] == [
        Options(temperature=0.25),
        Options(temperature=0.0, top_k=3),
        Options(temperature=0.0, top_k=4),
        *[Options(temperature=0.25, max_tokens=5, top_k=4)] * 3,
    ]
    assert scripted.asked[0][1] == {}  # nothing set, nothing said


def test_options_reach_the_models(make_pack: Any) -> None:
    pack = make_pack(max_tokens=2)
    llm = PackLLM(pack=pack, max_tokens=4)
    texts = [PackLLM(pack=pack).invoke(PROMPT), llm.invoke(PROMPT), llm.invoke(PROMPT, max_tokens=6)]
    assert texts == [pack.generate(PROMPT, max_tokens=count).text for count in (2, 4, 6)]


def test_fields_show_what_is_in_force(scripted: ScriptedPack) -> None:
    assert PackLLM(pack=scripted).temperature == 0.25
    assert PackLLM(pack=scripted, temperature=0.5).temperature == 0.5


def test_a_field_assigned_later_counts(scripted: ScriptedPack) -> None:
    llm = PackLLM(pack=scripted)
    llm.temperature = 0.75
    llm.invoke("p")
    assert scripted.asked[-1][1]["temperature"] == 0.75


@pytest.mark.parametrize(
    ("own", "call", "expected"),
    [
        (None, None, ()),
        (["A"], None, ("A",)),
        ("A", None, ("A",)),
        (["A"], ["B", "C"], ("B", "C")),
        (["A"], "B", ("B",)),
        (["A"], [], ()),
    ],
)
async def test_stop_of_the_call_replaces_the_adapters(own: Any, call: Any, expected: tuple[str, ...]) -> None:
    scripted = ScriptedPack()
    await every_way(PackLLM(pack=scripted, stop=own), "p", stop=call)
    stops = {scripted.options.override(options).stop for _, options in scripted.asked}
    assert stops == {expected}


def test_bind_with_config_and_configurable_fields(scripted: ScriptedPack) -> None:
    llm = PackLLM(pack=scripted, max_tokens=5)
    recorder = Recorder()
    llm.bind(stop=["A"], temperature=0.5).invoke("p")
    llm.with_config(callbacks=[recorder], tags=["t"]).invoke("p")
    configurable = llm.configurable_fields(temperature=ConfigurableField(id="heat"))
    configurable.invoke("p", config={"configurable": {"heat": 0.75}})
    configurable.invoke("p")
    assert [options for _, options in scripted.asked] == [
        {"max_tokens": 5, "temperature": 0.5, "stop": ["A"]},
        {"max_tokens": 5},
        {"max_tokens": 5, "temperature": 0.75},
        {"max_tokens": 5},
    ]
    assert recorder.counts == (1, 1, 0)
    assert recorder.starts[0][1]["tags"] == ["t"]


def test_fallbacks(scripted: ScriptedPack) -> None:
    broken = PackLLM(pack=ScriptedPack(fail_at=0))
    assert broken.with_fallbacks([PackLLM(pack=scripted)]).invoke("p") == "one two three"


# --- Construction ---


def test_models_are_loaded_with_the_options_given(monkeypatch: pytest.MonkeyPatch, scripted: ScriptedPack) -> None:
    loaded = []

    def load(models: Any, **words: Any) -> ScriptedPack:
        loaded.append((models, words))
        scripted.options = Options(max_tokens=3, stop=("x",))
        return scripted

    monkeypatch.setattr(packllm.Pack, "load", load)
    llm = PackLLM(models=["a", "b"], max_tokens=3, stop="x", dtype="float32", trust_remote_code=True)
    words = {"dtype": "float32", "device_map": "auto", "trust_remote_code": True, "max_tokens": 3, "stop": ("x",)}
    assert loaded == [(["a", "b"], words)]
    assert llm.pack is scripted
    llm.configurable_fields(top_k=ConfigurableField(id="k")).invoke("p", config={"configurable": {"k": 2}})
    assert len(loaded) == 1, "configuring a field must not load the models again"
    ((_, options),) = scripted.asked
    assert scripted.options.override(options) == Options(max_tokens=3, stop=("x",), top_k=2)


def test_models_or_pack(scripted: ScriptedPack) -> None:
    with pytest.raises(OptionError, match="exactly one of models"):
        PackLLM()
    with pytest.raises(OptionError, match="exactly one of models"):
        PackLLM(models=["a"], pack=scripted)
    with pytest.raises(OptionError, match="go with models"):
        PackLLM(pack=scripted, dtype="float16")


def test_wrong_fields_are_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packllm.Pack, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValidationError, match=r"'temprature'.*Valid fields: .*max_tokens.*models.*temperature"):
        PackLLM(models=["a"], temprature=1)
    for wrong in ({"temperature": -1}, {"max_tokens": 0}, {"top_p": 0}, {"stop": [""]}, {"max_tokens": True}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            PackLLM(models=["a"], **wrong)


def test_load_errors_pass_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(models: Any, **words: Any) -> None:
        raise packllm.PackError("no such model")

    monkeypatch.setattr(packllm.Pack, "load", load)
    with pytest.raises(PackError, match="no such model"):
        PackLLM(models=["a"])


@pytest.mark.parametrize("wrong", [{"temprature": 1}, {"temperature": -1}, {"max_new_tokens": 3}, {"functions": []}])
async def test_wrong_words_of_a_call_are_refused_with_the_valid_ones(wrong: dict[str, Any]) -> None:
    llm = PackLLM(pack=ScriptedPack(), cache=InMemoryCache())
    llm.invoke("p")  # the answer in the cache must not hide the mistake
    match = "temperature" if "temperature" in wrong else "Valid options: .*max_tokens"
    for ask in (llm.invoke, llm.ainvoke, lambda p, **k: llm.batch([p], **k), lambda p, **k: list(llm.stream(p, **k))):
        with pytest.raises(OptionError, match=match):
            await settle(ask, "p", **wrong)


# --- What comes with the text ---


def test_weights_and_usage_come_with_every_answer(pack: packllm.Pack, llm: PackLLM) -> None:
    result = llm.generate(PROMPTS)
    assert json.loads(json.dumps(result.llm_output)) == result.llm_output
    counts = "prompt_tokens", "completion_tokens", "total_tokens"
    total = dict.fromkeys(packllm.results.Usage(0, 0).as_dict(), 0)
    for prompt, (generation,) in zip(PROMPTS, result.generations, strict=True):
        info, expected = generation.generation_info, pack.generate(prompt, max_tokens=TOKENS)
        assert json.loads(json.dumps(info)) == info
        assert info["packllm"]["names"] == list(expected.weights.names)
        assert info["packllm"]["strategy"] == "em"
        assert info["packllm"]["weights"] == pytest.approx(list(expected.weights.values), abs=1e-4)
        assert info["packllm"]["nll"] == pytest.approx(list(expected.weights.nll), abs=1e-4)
        assert info["finish_reason"] == expected.finish_reason
        usage, alone = info["usage"], expected.usage.as_dict()  # how much was drafted or kept may differ in a batch
        assert [usage[key] for key in counts] == [alone[key] for key in counts]
        assert list(usage) == list(alone)
        assert info["model_name"] == pack.name
        total = {key: total[key] + info["usage"][key] for key in total}
    assert result.llm_output == {"token_usage": total, "model_name": pack.name}


def test_information_is_on_the_last_chunk_only(llm: PackLLM) -> None:
    *chunks, last = llm._stream(PROMPT)
    assert chunks
    assert [chunk.generation_info for chunk in chunks] == [None] * len(chunks)
    assert set(last.generation_info) == {"packllm", "finish_reason", "model_name", "usage", "timings"}
    merged = chunks[0]
    for chunk in [*chunks[1:], last]:
        merged += chunk
    assert merged.generation_info == last.generation_info


def test_single_and_batched_prompts_carry_the_same_information(scripted: ScriptedPack) -> None:
    llm = PackLLM(pack=scripted)
    single, batched = llm.generate(["p"]), llm.generate(["p", "q"])
    assert single.generations[0] == batched.generations[0]
    assert single.generations[0][0].generation_info == {
        "packllm": list(scripted.stream("p"))[-1].weights.as_dict(),
        "finish_reason": "stop",
        "model_name": "packllm:a+b",
        "usage": packllm.results.Usage(1, 3).as_dict(),
        "timings": {"total": 0.5},
    }


# --- Callbacks and tracing ---


async def test_callbacks_fire_once_per_call() -> None:
    llm, pieces = PackLLM(pack=ScriptedPack()), ["one ", "two ", "three", ""]

    async def drain(prompt: str, config: Any) -> None:
        assert [piece async for piece in llm.astream(prompt, config)] == pieces

    asks = [llm.invoke, llm.ainvoke, lambda p, config: list(llm.stream(p, config)), drain]
    for ask in asks:
        recorder = Recorder()
        await settle(ask, "p", {"callbacks": [recorder]})
        assert recorder.counts == (1, 1, 0)
        assert [token for token, _ in recorder.tokens] == pieces
        assert [chunk.text for _, chunk in recorder.tokens] == pieces
        assert recorder.ends[0].generations[0][0].text == "one two three"
        assert recorder.ends[0].generations[0][0].generation_info["finish_reason"] == "stop"


async def test_callbacks_of_a_batch() -> None:
    llm = PackLLM(pack=ScriptedPack())
    for batch in (llm.batch, llm.abatch):
        recorder = Recorder()
        await settle(batch, ["p", "q r"], {"callbacks": [recorder]})
        assert recorder.counts == (2, 2, 0)
        assert recorder.tokens == [], "LangChain gives the first run only: its tokens would be the whole batch's"
        usage = [end.generations[0][0].generation_info["usage"]["total_tokens"] for end in recorder.ends]
        assert usage == [4, 5]
        assert recorder.ends[0].llm_output["token_usage"]["total_tokens"] == 9


def test_tracing_parameters(scripted: ScriptedPack) -> None:
    llm, recorder = PackLLM(pack=scripted, max_tokens=7, stop=["A"]), Recorder()
    llm.invoke("p", {"callbacks": [recorder], "metadata": {"user": "me"}}, temperature=0.5)
    ((_, told),) = recorder.starts
    assert told["metadata"]["user"] == "me"
    assert told["metadata"]["lc_versions"].keys() >= {"langchain-core", "packllm"}
    traced = {key: value for key, value in told["metadata"].items() if key.startswith("ls_")}
    assert traced == {
        "ls_provider": "packllm",
        "ls_model_type": "llm",
        "ls_model_name": "packllm:a+b",
        "ls_temperature": 0.5,
        "ls_max_tokens": 7,
        "ls_stop": ["A"],
    }
    assert told["invocation_params"]["temperature"] == 0.5
    assert told["invocation_params"]["stop"] == ["A"]


async def test_astream_events(scripted: ScriptedPack) -> None:
    events = [event async for event in PackLLM(pack=scripted).astream_events("p", version="v2")]
    kinds = [event["event"] for event in events]
    assert kinds == ["on_llm_start", *["on_llm_stream"] * 4, "on_llm_end"]


def test_identity(scripted: ScriptedPack, tmp_path: Path) -> None:
    llm = PackLLM(pack=scripted, weighting={"a": 0.5, "b": 0.5}, stop=["A"])
    assert llm._llm_type == "packllm"
    assert llm._identifying_params.keys() == {*packllm.OptionFields.model_fields, "model_name", "pack_fingerprint"}
    assert llm.asdict()["_type"] == "packllm"
    assert llm.lc_secrets == {}
    assert "ScriptedPack" not in repr(llm)
    assert str(llm)
    llm.save(tmp_path / "llm.json")
    assert json.loads((tmp_path / "llm.json").read_text())["pack_fingerprint"] == "f00"


# --- Cache ---


async def test_the_cache_answers_the_same_call_only(global_cache: InMemoryCache) -> None:
    scripted = ScriptedPack()
    llm, other = PackLLM(pack=scripted), PackLLM(pack=ScriptedPack())
    other.pack.fingerprint = "other members"

    async def asked(llm: PackLLM, **kwargs: Any) -> bool:
        """Whether both ways of asking reached the pack; False when the cache answered both."""
        before = len(llm.pack.asked)
        assert llm.invoke("p", **kwargs) == await llm.ainvoke("p", **kwargs) == "one two three"
        assert len(llm.pack.asked) - before in (0, 1)
        return len(llm.pack.asked) > before

    assert await asked(llm)
    assert not await asked(llm)
    assert not await asked(PackLLM(pack=scripted)), "an equal adapter over the same pack shares the answer"
    assert not await asked(llm, temperature=0.25), "saying what holds anyway changes nothing"
    for kwargs in ({"temperature": 1.0}, {"seed": 4}, {"max_tokens": 2}, {"stop": ["A"]}, {"weighting": "sim"}):
        assert await asked(llm, **kwargs), kwargs
        assert not await asked(llm, **kwargs), kwargs
    assert not await asked(PackLLM(pack=scripted, stop=["A"])), "the adapter's own stop is the stop in force"
    assert await asked(PackLLM(pack=scripted, stop=["B"]))
    assert not await asked(PackLLM(pack=scripted, stop=["B"]), stop=[]), "an empty stop is no stop"
    assert await asked(other)
    other.pack.fingerprint, other.pack.options = scripted.fingerprint, Options(temperature=0.5)
    assert await asked(PackLLM(pack=other.pack)), "the same members under other defaults are another model"


def test_cache_in_a_batch(pack: packllm.Pack) -> None:
    llm = PackLLM(pack=pack, max_tokens=4, cache=InMemoryCache())
    first = llm.invoke(PROMPT)
    assert llm.batch([PROMPTS[1], PROMPT])[1] == first
    result = llm.generate([PROMPT])
    assert result.generations[0][0].text == first
    assert result.generations[0][0].generation_info["packllm"]["weights"]


# --- Async ---


class Heart:
    """Beats while the loop is free."""

    async def __aenter__(self) -> Heart:
        self.beats = 0
        self._task = asyncio.create_task(self._beat())
        return self

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.01)
            self.beats += 1

    async def __aexit__(self, *_: Any) -> None:
        self._task.cancel()


async def test_the_event_loop_stays_free() -> None:
    llm = PackLLM(pack=ScriptedPack(delay=0.15))

    async def drain() -> None:
        async for _ in llm.astream("p"):
            pass

    for work in (llm.ainvoke("p"), drain(), llm.abatch(["p", "q"])):
        async with Heart() as heart:
            await work
        assert heart.beats >= 10


async def test_concurrent_calls_get_their_own_answers(pack: packllm.Pack, llm: PackLLM) -> None:
    expected = [pack.generate(prompt, max_tokens=TOKENS).text for prompt in PROMPTS]
    assert await asyncio.gather(*[llm.ainvoke(prompt) for prompt in PROMPTS]) == expected


# --- Cancelling and failing ---


def test_closing_a_stream_stops_the_work(scripted: ScriptedPack) -> None:
    recorder = Recorder()
    stream = PackLLM(pack=scripted).stream("p", {"callbacks": [recorder]})
    assert next(stream) == "one "
    stream.close()
    assert (scripted.steps, scripted.closed) == (1, 1)
    assert isinstance(recorder.errors[0], GeneratorExit)


def test_closing_a_stream_stops_the_models(pack: packllm.Pack) -> None:
    def forwards() -> int:
        return sum(member.engine.forwards for member in pack.members)

    before = forwards()
    stream = PackLLM(pack=pack, max_tokens=200).stream(PROMPT)
    next(stream)
    stream.close()
    assert forwards() - before < 200
    assert pack.generate(PROMPT, max_tokens=2).finish_reason  # the pack is free for others


async def eventually(condition: Any, within: float = 2.0) -> bool:
    until = time.perf_counter() + within
    while not condition() and time.perf_counter() < until:
        await asyncio.sleep(0.01)
    return condition()


async def test_closing_an_async_stream_stops_the_work() -> None:
    scripted = ScriptedPack(("x",) * 100, delay=0.01)
    stream = PackLLM(pack=scripted).astream("p")
    await anext(stream)
    await stream.aclose()
    assert await eventually(lambda: scripted.closed == 1)
    assert scripted.steps <= 2


async def test_cancelling_a_task_stops_the_thread() -> None:
    scripted = ScriptedPack(("x",) * 1000, delay=0.01)
    task = asyncio.create_task(PackLLM(pack=scripted).ainvoke("p"))
    assert await eventually(lambda: scripted.steps >= 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await eventually(lambda: scripted.closed == 1)
    assert scripted.steps < 100


@pytest.mark.parametrize("fail_at", [0, 2])
async def test_a_failing_member_raises_at_once_by_every_way(fail_at: int) -> None:
    llm = PackLLM(pack=ScriptedPack(fail_at=fail_at))

    async def drain(prompt: str, config: Any) -> None:
        async for _ in llm.astream(prompt, config):
            pass

    asks = [
        llm.invoke,
        llm.ainvoke,
        drain,
        lambda p, config: list(llm.stream(p, config)),
        lambda p, config: llm.batch([p, p], config),
        lambda p, config: llm.abatch([p, p], config),
    ]
    for ask in asks:
        recorder, start = Recorder(), time.perf_counter()
        with pytest.raises(packllm.MemberError, match="non-finite logits") as caught:
            await settle(ask, "p", {"callbacks": [recorder]})
        assert caught.value.member == "b"
        assert time.perf_counter() - start < 2
        assert recorder.errors
        assert all(isinstance(error, packllm.MemberError) for error in recorder.errors)


def test_a_failing_model_raises_at_once(pack: packllm.Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise packllm.MemberError(pack.members[1].name, "out of memory")

    monkeypatch.setattr(pack.members[1].engine, "run", fail)
    llm = PackLLM(pack=pack)
    for ask in (llm.invoke, lambda prompt: list(llm.stream(prompt)), lambda prompt: llm.batch([prompt, prompt])):
        start = time.perf_counter()
        with pytest.raises(packllm.MemberError, match="out of memory"):
            ask(PROMPT)
        assert time.perf_counter() - start < 2


def test_one_failure_is_every_prompts_failure_in_a_batch() -> None:
    answers = PackLLM(pack=ScriptedPack(fail_at=0)).batch(["p", "q"], return_exceptions=True)
    assert [isinstance(answer, packllm.MemberError) for answer in answers] == [True, True]


def test_threads_do_not_outlive_the_calls(scripted: ScriptedPack) -> None:
    before = threading.active_count()
    list(PackLLM(pack=scripted).stream("p"))
    PackLLM(pack=scripted).batch(["p", "q"])
    assert threading.active_count() == before


# --- Manners ---


def test_no_keys_no_network(monkeypatch: pytest.MonkeyPatch, llm: PackLLM) -> None:
    """Sockets are off for all tests (pyproject); here the environment is empty, too."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    assert llm.invoke(PROMPT) == "".join(llm.stream(PROMPT)) != ""


def test_imports_only_public_names_of_packllm() -> None:
    folder = Path(langchain_packllm.__file__).parent
    allowed = {"packllm", "langchain_core", "langchain_packllm", "pydantic", "__future__", *sys.stdlib_module_names}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
                assert not [name for name in modules if name.startswith("packllm.")], file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                modules = [node.module or ""]
                if node.module == "packllm":
                    assert {alias.name for alias in node.names} <= PUBLIC, file
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "packllm":
                assert node.attr in PUBLIC, f"packllm.{node.attr} is not public"
                continue
            else:
                continue
            assert {module.split(".")[0] for module in modules} <= allowed, file
    assert (folder / "py.typed").exists()
