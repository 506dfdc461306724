"""LlamaIndex's query engines, response modes, selectors, rerankers, evaluators and memory with two members of the
starter pack. Models of 135 million parameters are often wrong, and seldom keep to a format that a prompt describes. So
these tests check what is promised for any model: text from the passages, choices and verdicts that LlamaIndex can
parse, and equal token counts. Where LlamaIndex parses free text, the model gets a schema, as docs/llama_index.md
recommends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import PromptTemplate, Settings, SummaryIndex, get_response_synthesizer
from llama_index.core.base.base_selector import SingleSelection
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.evaluation import CorrectnessEvaluator, FaithfulnessEvaluator, RelevancyEvaluator
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import CompactAndRefine, Refine, ResponseMode
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.selectors import LLMMultiSelector, PydanticSingleSelector
from llama_index.core.selectors.prompts import DEFAULT_SINGLE_PYD_SELECT_PROMPT_TMPL
from llama_index.core.tools import QueryEngineTool
from pydantic import Field
from show import passages

from llama_index.llms.packllm import PackLLM
from packllm import Generation, Pack

pytestmark = pytest.mark.real

QUESTION = "How does hepatitis B spread?"
TOKENS = 6
NODES = [
    NodeWithScore(node=TextNode(id_=row["id"], text=row["text"]), score=1.0)
    for row in passages()
    if row["id"] in ("medicine-088", "medicine-093", "medicine-086")  # in all about 500 tokens
]
TEXT = " ".join(one.node.text for one in NODES)


@pytest.fixture(scope="module")
def pack(starter_pack: Pack) -> Pack:
    """One pack for all tests: prompts that begin alike are read once."""
    return Pack(starter_pack.members[:2])


@pytest.fixture
def llm(pack: Pack) -> Iterator[PackLLM]:
    before = {name: getattr(Settings, name) for name in ("_llm", "_tokenizer", "_callback_manager")}
    Settings.llm, Settings.tokenizer = PackLLM(pack=pack, max_tokens=TOKENS), pack.tokenize
    yield Settings.llm
    for name, value in before.items():
        setattr(Settings, name, value)


@pytest.fixture
def answers(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> list[Generation]:
    """All answers of the pack in this test."""
    told: list[Generation] = []
    generate = pack.generate

    def noted(prompt: Any, **options: Any) -> Generation:
        told.append(generate(prompt, **options))
        return told[-1]

    monkeypatch.setattr(pack, "generate", noted)
    return told


def told_of(text: str, source: str = TEXT) -> bool:
    """Whether a text shares words with its source."""
    return bool(set(re.findall(r"\w{4,}", text.lower())) & set(re.findall(r"\w{4,}", source.lower())))


def engines(llm: PackLLM) -> list[QueryEngineTool]:
    described = {"hepatitis": "How hepatitis B spreads.", "platelets": "Causes of immune thrombocytopenia."}
    return [
        QueryEngineTool.from_defaults(
            SummaryIndex(nodes=[one.node]).as_query_engine(llm=llm), name=name, description=text
        )
        for one, (name, text) in zip(sorted(NODES, key=lambda one: one.node.id_)[1:], described.items(), strict=True)
    ]


# -- response modes -----------------------------------------------------------------------------------------------

REFINING = {ResponseMode.REFINE: Refine, ResponseMode.COMPACT: CompactAndRefine}
WHOLE = {ResponseMode.REFINE: 3, ResponseMode.ACCUMULATE: 3, ResponseMode.NO_TEXT: 0, ResponseMode.CONTEXT_ONLY: 0}
"""Answers of the model to three passages in a large window; 1 in all other modes."""


@pytest.mark.parametrize("window", [8192, 512])
@pytest.mark.parametrize("mode", ResponseMode)
def test_every_response_mode(
    mode: ResponseMode, window: int, llm: PackLLM, answers: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    for member in llm.pack.members:
        monkeypatch.setattr(member, "context_window", window)
    if mode in REFINING and window == 512:
        synthesizer = REFINING[mode](llm=llm, response_padding_size=TOKENS)
    else:
        synthesizer = get_response_synthesizer(llm=llm, response_mode=mode)
    response = synthesizer.synthesize(QUESTION, NODES)
    count = WHOLE.get(mode, 1)
    split = window == 512 and mode in (
        ResponseMode.COMPACT, ResponseMode.TREE_SUMMARIZE, ResponseMode.COMPACT_ACCUMULATE
    )  # fmt: skip
    assert len(answers) > count if split else len(answers) == count
    assert all(one.usage.prompt_tokens + TOKENS <= window for one in answers)
    if mode is ResponseMode.NO_TEXT:
        assert str(response) == "None"
    elif mode is ResponseMode.CONTEXT_ONLY:
        assert str(response) == "\n\n".join(one.text for one in NODES)
    elif mode in (ResponseMode.ACCUMULATE, ResponseMode.COMPACT_ACCUMULATE):
        assert [said in str(response) for said in (one.text for one in answers)] == [True] * len(answers)
        assert told_of(answers[0].text)
    else:
        assert str(response) == answers[-1].text
        assert told_of(str(response))
    assert len(response.source_nodes) == 3


def test_a_query_engine_counts_the_tokens_of_the_pack(llm: PackLLM, answers: list[Generation]) -> None:
    counter = TokenCountingHandler(tokenizer=llm.pack.tokenize, verbose=False)
    manager = Settings.callback_manager = CallbackManager([counter])
    own = PackLLM(pack=llm.pack, max_tokens=TOKENS, callback_manager=manager)
    synthesizer = get_response_synthesizer(llm=own, response_mode="refine")
    engine = SummaryIndex(nodes=[one.node for one in NODES[:2]]).as_query_engine(response_synthesizer=synthesizer)
    assert told_of(str(engine.query(QUESTION)))
    assert len(answers) == 2
    assert counter.prompt_llm_token_count == sum(one.usage.prompt_tokens for one in answers)
    assert counter.completion_llm_token_count == sum(one.usage.completion_tokens for one in answers)
    assert counter.total_llm_token_count == sum(one.usage.total_tokens for one in answers)


# -- selecting and asking further ---------------------------------------------------------------------------------


class Selection(SingleSelection):
    """LlamaIndex's own class allows any number."""

    index: int = Field(ge=1, le=2)
    reason: str = Field(max_length=24)


CHOICE = {
    "type": "object",
    "properties": {"choice": {"enum": [1, 2]}, "reason": {"type": "string", "maxLength": 24}},
    "required": ["choice", "reason"],
    "additionalProperties": False,
}
SELECTORS = {"pydantic": False, "llm, several": True}
"""Whether a selector may choose several engines; test_query_engines.py has all four."""


def selector_of(kind: str, pack: Pack) -> Any:
    if kind == "pydantic":
        model = PackLLM(pack=pack, max_tokens=60)
        template = PromptTemplate(DEFAULT_SINGLE_PYD_SELECT_PROMPT_TMPL)
        return PydanticSingleSelector(get_program_for_llm(Selection, template, model))
    schema = {"type": "array", "items": CHOICE, "minItems": 1, "maxItems": 2}
    return LLMMultiSelector.from_defaults(llm=PackLLM(pack=pack, max_tokens=60, json_schema=schema))


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_router_asks_the_engines_that_the_pack_selects(kind: str, llm: PackLLM) -> None:
    tools = engines(llm)
    router = RouterQueryEngine(
        selector_of(kind, llm.pack), tools, llm=llm, summarizer=get_response_synthesizer(llm, response_mode="no_text")
    )
    response = router.query(QUESTION)
    selected = response.metadata["selector_result"]
    assert 1 <= len(selected.inds) <= 1 + SELECTORS[kind]
    assert set(selected.inds) <= {0, 1}
    assert all(one.reason for one in selected.selections)
    sources = {one.node.id_ for one in response.source_nodes}
    assert sources <= {"medicine-088", "medicine-093"}
    if len(selected.inds) == 1:
        assert sources == {("medicine-088", "medicine-093")[selected.inds[0]]}
        assert told_of(str(response))


def test_sub_questions_are_asked_of_their_engines(llm: PackLLM) -> None:
    item = {
        "type": "object",
        "properties": {
            "sub_question": {"type": "string", "minLength": 10, "maxLength": 40},
            "tool_name": {"enum": ["hepatitis", "platelets"]},
        },
        "required": ["sub_question", "tool_name"],
        "additionalProperties": False,
    }
    schema = {"type": "array", "items": item, "minItems": 1, "maxItems": 2}
    generator = LLMQuestionGenerator.from_defaults(llm=PackLLM(pack=llm.pack, max_tokens=60, json_schema=schema))
    engine = SubQuestionQueryEngine.from_defaults(
        engines(llm), llm=llm, question_gen=generator, verbose=False, use_async=False
    )
    response = engine.query(QUESTION)
    assert str(response).strip()
    asked = [one.node.text for one in response.source_nodes if one.node.text.startswith("Sub question: ")]
    assert 1 <= len(asked) <= 2
    assert all(re.fullmatch(r"Sub question: .{10,}\nResponse: .+", one, re.DOTALL) for one in asked)
    assert {one.node.id_ for one in response.source_nodes} & {"medicine-088", "medicine-093"}


# -- reranking, judging, remembering ------------------------------------------------------------------------------


def test_the_pack_reranks_nodes(llm: PackLLM) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 10}, "minItems": 2, "maxItems": 2}

    def parsed(answer: str, count: int) -> tuple[list[int], list[float]]:
        return list(range(1, count + 1)), [float(score) for score in json.loads(answer)]

    model = PackLLM(pack=llm.pack, max_tokens=24, json_schema=schema)
    rerank = LLMRerank(llm=model, top_n=2, parse_choice_select_answer_fn=parsed)
    ranked = rerank.postprocess_nodes(NODES[1:], query_str=QUESTION)
    assert {one.node.id_ for one in ranked} == {one.node.id_ for one in NODES[1:]}
    first, second = (one.score for one in ranked)
    assert 10 >= first >= second >= 0


def test_evaluators_get_verdicts(llm: PackLLM) -> None:
    judged = {"query": QUESTION, "response": "Through contact with blood.", "contexts": [NODES[1].node.text]}
    for judge in (FaithfulnessEvaluator, RelevancyEvaluator):
        verdict = judge(llm=llm).evaluate(**judged)
        assert re.match(r"\W*(yes|no)\b", verdict.feedback, re.IGNORECASE)
        assert verdict.passing is ("yes" in verdict.feedback.lower())
        assert verdict.score == float(verdict.passing)
    schema = {"type": "object", "properties": {"score": {"enum": [1, 2, 3, 4, 5]}}, "required": ["score"]}

    def parsed(answer: str) -> tuple[float, str]:
        return float(json.loads(answer)["score"]), answer

    model = PackLLM(pack=llm.pack, max_tokens=24, json_schema=schema)
    verdict = CorrectnessEvaluator(llm=model, parser_function=parsed).evaluate(**judged, reference="Through blood.")
    assert verdict.score in (1, 2, 3, 4, 5)
    assert verdict.passing is (verdict.score >= 4)
    assert not verdict.invalid_result


def test_a_chat_engine_remembers(llm: PackLLM) -> None:
    memory = ChatMemoryBuffer.from_defaults(llm=llm, token_limit=200)
    chat = ContextChatEngine.from_defaults(SummaryIndex(nodes=[NODES[1].node]).as_retriever(), llm=llm, memory=memory)
    first = "".join(chat.stream_chat(QUESTION).response_gen)
    assert told_of(first)
    second = chat.chat("Is it also spread by food?")
    assert second.response.strip()
    whole = [("user", QUESTION), ("assistant", first), ("user", "Is it also spread by food?")]
    assert [(one.role.value, one.content) for one in memory.get()] == [*whole, ("assistant", second.response)]
    for at in range(60):  # the oldest no longer fit
        memory.put(memory.get_all()[at % 4].model_copy())
    assert 0 < len(memory.get()) < len(memory.get_all()) == 64
    assert sum(len(llm.pack.tokenize(str(one.content))) for one in memory.get()) <= 200
