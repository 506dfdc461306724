"""LlamaIndex's query engines, synthesizers, rerankers, evaluators and memories over a model that was taught what to
answer (see taught.py). test_real_passes.py has the same with the starter pack."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from taught import asked, taught_pack

pytest.importorskip("llama_index.core")

from llama_index.core import Settings, SummaryIndex, evaluation, get_response_synthesizer
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import CompactAndRefine, Refine, ResponseMode
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.selectors import (
    LLMMultiSelector,
    LLMSingleSelector,
    PydanticMultiSelector,
    PydanticSingleSelector,
)
from llama_index.core.tools import QueryEngineTool

from llama_index.llms.packllm import PackLLM

QUESTION = "How many beds has ward 3?"
BEDS = NodeWithScore(node=TextNode(text="Ward 3 has 12 beds."), score=1.0)
DOORS = NodeWithScore(node=TextNode(text="Ward 3 has blue doors."), score=1.0)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """What a test sets is forgotten."""
    before = {name: getattr(Settings, name) for name in ("_llm", "_tokenizer", "_embed_model", "_callback_manager")}
    Settings.embed_model = MockEmbedding(embed_dim=4)
    yield
    for name, value in before.items():
        setattr(Settings, name, value)


def llm_of(answers: dict[str, str] | Callable[[str], str], window: int = 8192, **options: Any) -> PackLLM:
    """The settings' model too, with its own tokens."""
    llm = PackLLM(pack=taught_pack(answers, window), **options)
    Settings.llm, Settings.tokenizer = llm, llm.pack.tokenize
    return llm


def call(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def both(make: Callable[[], Any], *arguments: Any, verb: str = "query") -> Any:
    """What a verb gives, sync and async alike."""
    first = getattr(make(), verb)(*arguments)
    second = asyncio.run(getattr(make(), f"a{verb}")(*arguments))
    assert str(first) == str(second)
    return first


# -- selecting and asking further ---------------------------------------------------------------------------------

ONE = {"index": 1, "reason": "It is about beds."}
TWO = {"index": 2, "reason": "And doors."}
SELECTORS = {
    "pydantic": (PydanticSingleSelector, call("SingleSelection", **ONE)),
    "pydantic, several": (PydanticMultiSelector, call("MultiSelection", selections=[ONE, TWO])),
    "llm": (LLMSingleSelector, json.dumps([{"choice": 1, "reason": ONE["reason"]}])),
    "llm, several": (LLMMultiSelector, json.dumps([{"choice": c["index"], "reason": c["reason"]} for c in (ONE, TWO)])),
}


def engines(llm: PackLLM) -> list[QueryEngineTool]:
    return [
        QueryEngineTool.from_defaults(
            SummaryIndex(nodes=[one.node]).as_query_engine(llm=llm),
            name=name,
            description=f"Knows the {name} of wards.",
        )
        for name, one in (("beds", BEDS), ("doors", DOORS))
    ]


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_router_takes_the_engines_that_the_model_selects(kind: str) -> None:
    selector, said = SELECTORS[kind]

    def answer(conversation: str) -> str:
        if "Some choices are given below" in conversation:
            return said
        if "from multiple sources" in conversation:
            return "It has 12 beds and blue doors."
        return "It has blue doors." if "has blue doors" in conversation else "It has 12 beds."

    llm = llm_of(answer)

    def router() -> RouterQueryEngine:
        return RouterQueryEngine.from_defaults(
            engines(llm), llm=llm, selector=selector.from_defaults(llm=llm), select_multi="several" in kind
        )

    response = both(router, QUESTION)
    several = "several" in kind
    assert str(response) == ("It has 12 beds and blue doors." if several else "It has 12 beds.")
    selected = response.metadata["selector_result"]
    assert selected.inds == ([0, 1] if several else [0])
    assert selected.selections[0].reason == ONE["reason"]
    assert "beds" in asked(llm.pack)[0]


def test_sub_questions_are_asked_of_their_engines_and_put_together() -> None:
    asks = [
        {"sub_question": "How many beds are there?", "tool_name": "beds"},
        {"sub_question": "Which colour are the doors?", "tool_name": "doors"},
    ]
    answers = {
        "Given a user question, and a list of tools": "```json\n" + json.dumps({"items": asks}, indent=2) + "\n```",
        "Response: 12.": "12 beds behind blue doors.",
        "Which colour": "Blue.",
        "How many beds are": "12.",
    }
    llm = llm_of(answers)

    def engine() -> SubQuestionQueryEngine:
        return SubQuestionQueryEngine.from_defaults(
            engines(llm),
            llm=llm,
            question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
            verbose=False,
            use_async=False,
        )

    response = both(engine, QUESTION)
    assert str(response) == "12 beds behind blue doors."
    assert [one.node.text for one in response.source_nodes[:2]] == [
        "Sub question: How many beds are there?\nResponse: 12.",
        "Sub question: Which colour are the doors?\nResponse: Blue.",
    ]


# -- response modes -----------------------------------------------------------------------------------------------

LONG = [NodeWithScore(node=TextNode(text=f"Ward {n} has {n} beds. " + "The doors are blue. " * 40)) for n in (1, 2, 3)]
REFINING = {ResponseMode.REFINE: Refine, ResponseMode.COMPACT: CompactAndRefine}
NO_MODEL = {ResponseMode.NO_TEXT, ResponseMode.CONTEXT_ONLY}


@pytest.mark.parametrize("window", [512, 8192])
@pytest.mark.parametrize("mode", ResponseMode)
def test_every_response_mode_in_a_small_and_a_large_window(mode: ResponseMode, window: int) -> None:
    def answer(conversation: str) -> str:
        return f"In all {sum(f'Ward {n} has' in conversation for n in (1, 2, 3))} wards."

    llm = llm_of(answer, window)

    def synthesizer(**options: Any) -> Any:
        if (
            mode in REFINING and window == 512
        ):  # 500 tokens, which they keep free for the answer so far, are all there is
            return REFINING[mode](llm=llm, response_padding_size=llm.metadata.num_output, **options)
        return get_response_synthesizer(llm=llm, response_mode=mode, **options)

    response = both(synthesizer, QUESTION, LONG, verb="synthesize")
    conversations = asked(llm.pack)[: len(asked(llm.pack)) // 2]  # the second half is the asynchronous one's
    if mode in NO_MODEL:
        assert not conversations
        assert str(response) == ("None" if mode is ResponseMode.NO_TEXT else "\n\n".join(n.text for n in LONG))
        return
    if mode is ResponseMode.GENERATION:
        assert str(response) == "In all 0 wards."
        return
    together = "\n".join(conversations)
    if mode is not ResponseMode.SIMPLE_SUMMARIZE:  # which cuts each node to its part of the window
        assert all(f"Ward {n} has" in together for n in (1, 2, 3))
    if mode in (ResponseMode.ACCUMULATE, ResponseMode.COMPACT_ACCUMULATE):
        said = [line for line in str(response).splitlines() if line.startswith("Response")]
        assert len(said) == len(conversations)
        assert said[0].startswith("Response 1: In all ")
    else:
        assert str(response) == answer(conversations[-1])
    whole = {ResponseMode.REFINE: 3, ResponseMode.ACCUMULATE: 3}.get(mode, 1)
    assert len(conversations) == whole if window == 8192 else len(conversations) >= whole
    assert len(response.source_nodes) == 3
    if mode not in (ResponseMode.ACCUMULATE, ResponseMode.COMPACT_ACCUMULATE):  # they do not stream
        streamed = synthesizer(streaming=True).synthesize(QUESTION, LONG)
        assert "".join(streamed.response_gen) == str(response)


def test_refining_filters_by_a_structured_answer() -> None:
    answers = {
        "12 beds": call("StructuredRefineResponse", query_satisfied=True, answer="It has 12 beds."),
        "blue doors": call("StructuredRefineResponse", query_satisfied=False, answer="I cannot tell."),
    }
    llm = llm_of(answers)

    def refine() -> Any:
        return get_response_synthesizer(llm=llm, response_mode="refine", structured_answer_filtering=True)

    assert str(both(refine, QUESTION, [DOORS, BEDS], verb="synthesize")) == "It has 12 beds."


# -- reranking, judging, remembering ------------------------------------------------------------------------------


def test_a_model_puts_nodes_in_order() -> None:
    llm = llm_of({QUESTION: "Doc: 2, Relevance: 9\nDoc: 1, Relevance: 2"})
    rerank = LLMRerank(llm=llm, top_n=2)
    found = rerank.postprocess_nodes([DOORS, BEDS], query_str=QUESTION)
    assert [(one.node.text, one.score) for one in found] == [(BEDS.node.text, 9.0), (DOORS.node.text, 2.0)]
    assert found == asyncio.run(rerank.apostprocess_nodes([DOORS, BEDS], query_str=QUESTION))


JUDGES = {
    "FaithfulnessEvaluator": ("YES", True, 1.0),
    "RelevancyEvaluator": ("NO", False, 0.0),
    "CorrectnessEvaluator": ("4.5\nIt says so.", True, 4.5),
    "AnswerRelevancyEvaluator": ("It fits. [RESULT] 2", None, 1.0),
    "ContextRelevancyEvaluator": ("It fits. [RESULT] 4.0", None, 1.0),
    "GuidelineEvaluator": ('{"passing": true, "feedback": "Well said."}', True, 1.0),
    "PairwiseComparisonEvaluator": ("The second one is. [[B]]", False, 0.0),
}


@pytest.mark.parametrize("judge", JUDGES)
def test_evaluators_read_what_the_model_judges(judge: str) -> None:
    said, passing, score = JUDGES[judge]
    llm = llm_of(lambda conversation: said)
    given: dict[str, Any] = {"query": QUESTION, "response": "It has 12 beds.", "contexts": [BEDS.node.text]}
    given |= {"reference": "12"} if judge.startswith(("Correctness", "Pairwise")) else {}
    given |= {"second_response": "12 beds."} if judge.startswith("Pairwise") else {}
    options = {"enforce_consensus": False} if judge.startswith("Pairwise") else {}
    result = getattr(evaluation, judge)(llm=llm, **options).evaluate(**given)
    assert (result.passing, result.score) == (passing, score)
    assert not result.invalid_result
    assert any(QUESTION in one for one in asked(llm.pack)) or judge == "FaithfulnessEvaluator"
    if judge.startswith("Pairwise"):  # both orders: a model that always names B has no opinion
        assert getattr(evaluation, judge)(llm=llm).evaluate(**given).score == 0.5


@pytest.mark.parametrize("window", [512, 8192])
def test_a_memory_keeps_what_fits_and_the_model_reads_it(window: int) -> None:
    llm = llm_of(lambda conversation: "Yes." if conversation.count("<|im_start|>user") > 1 else "No.", window)
    memory = ChatMemoryBuffer.from_defaults(llm=llm)
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=memory)
    assert engine.chat("Ward 1 is full.").response == "No."
    assert asyncio.run(engine.achat("Do you remember ward 1?")).response == "Yes."
    assert "".join(engine.stream_chat("And now?").response_gen) == "Yes."
    last = asked(llm.pack)[-1]
    assert "Ward 1 is full." in last
    assert [one.role.value for one in memory.get()] == ["user", "assistant"] * 3
    for at in range(14):
        engine.chat(f"Ward {at} is full. " + "Its doors are blue. " * 6)
    kept = memory.get()
    assert all(one.content.startswith(("Ward", "Yes")) for one in kept[-4:])
    assert (len(kept) < len(memory.get_all())) is (window == 512)
    assert "Ward 13 is full" in asked(llm.pack)[-1]


# -- counting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "streaming"),
    [
        *((mode, streams) for mode in ("compact", "refine", "tree_summarize") for streams in (False, True)),
        ("accumulate", False),
    ],
)
def test_a_query_engine_counts_the_packs_tokens(mode: str, streaming: bool) -> None:
    counter = TokenCountingHandler(verbose=False)
    Settings.callback_manager = CallbackManager([counter])
    llm = llm_of({QUESTION: "It has 12 beds."}, callback_manager=Settings.callback_manager)
    counter.tokenizer = llm.pack.tokenize
    told: list[Any] = []
    stream = llm.pack.stream

    def noted(prompt: Any, **options: Any) -> Iterator[Any]:
        for chunk in stream(prompt, **options):
            told.extend([chunk.usage] if chunk.usage else [])
            yield chunk

    generate = llm.pack.generate

    def noted_whole(prompt: Any, **options: Any) -> Any:
        answer = generate(prompt, **options)
        told.append(answer.usage)
        return answer

    llm.pack.stream, llm.pack.generate = noted, noted_whole
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode, streaming=streaming)
    index = SummaryIndex(nodes=[BEDS.node, DOORS.node])
    response = index.as_query_engine(response_synthesizer=synthesizer).query(QUESTION)
    assert "It has 12 beds." in (
        "".join(response.response_gen) if streaming and hasattr(response, "response_gen") else str(response)
    )
    assert told
    assert counter.prompt_llm_token_count == sum(usage.prompt_tokens for usage in told)
    assert counter.completion_llm_token_count == sum(usage.completion_tokens for usage in told)
    assert counter.total_llm_token_count == sum(usage.total_tokens for usage in told)
