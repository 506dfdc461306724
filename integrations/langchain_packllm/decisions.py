"""PackDecisions: a packllm.Pack that answers typed questions. Needs langchain-core 1.8."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.decisions import (
    BaseDecisionModel,
    Box,
    Choice,
    ChoiceAnswer,
    ClassifierResponse,
    Noul,
    NoulAnswer,
    ScoreAnswer,
)
from langchain_core.messages import BaseMessage, get_buffer_string
from pydantic import ConfigDict, Field

import packllm
from langchain_packllm.errors import typed


class PackDecisions(BaseDecisionModel):
    """Several local language models that decide together, by the answers that they would give (see
    packllm.Pack.decide).

    Probabilities are those of a label among all labels; the confidence of an answer is the probability of its label.

    Raises:
        OptionError: when called with a question about a place in a picture.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    pack: packllm.Pack = Field(exclude=True, repr=False)
    """The pack that decides."""
    calibrated: bool = False
    """Divide each label's probability by that after an empty prompt."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the pack for each decision."""
    model: str = ""

    def model_post_init(self, context: Any, /) -> None:
        self.model = self.model or self.pack.name

    @property
    def _provider(self) -> str:
        return "packllm"

    def _classify(self, state: Any, questions: Mapping[str, Any]) -> ClassifierResponse:
        with typed():
            text = _told(state)
            answers = {name: self._answer(text, question) for name, question in questions.items()}
        return ClassifierResponse(model=self.model, answers=answers)

    def _answer(self, text: str, question: Any) -> NoulAnswer | ChoiceAnswer | ScoreAnswer:
        if isinstance(question, Box):
            raise packllm.OptionError("the models read text only: a Box question cannot be answered; leave it out")
        if isinstance(question, Noul):
            criteria = question.criteria
            shares = self._shares(
                text, question, {"yes": criteria and criteria.true, "no": criteria and criteria.false}
            )
            return NoulAnswer(type="noul", noul=min(shares["yes"], 1.0))
        if isinstance(question, Choice):
            shares = self._shares(text, question, question.criteria)
            choice = max(shares, key=shares.__getitem__)
            return ChoiceAnswer(type="choice", choice=choice, probabilities=shares, confidence=min(shares[choice], 1.0))
        legend = dict(enumerate(question.criteria))
        shares = self._shares(text, question, {str(level): meaning for level, meaning in legend.items()})
        levels = {level: shares[str(level)] for level in legend}
        return ScoreAnswer(
            type="score",
            score=sum(level * share for level, share in levels.items()),
            legend=legend,
            probabilities=levels,
            confidence=min(max(levels.values()), 1.0),
        )

    def _shares(self, text: str, question: Any, labels: Mapping[str, Any]) -> dict[str, float]:
        """The probability of each label."""
        if len(labels) == 1:
            return dict.fromkeys(labels, 1.0)
        lines = [label if meaning is None else f"{label}: {_told(meaning)}" for label, meaning in labels.items()]
        prompt = f"{text}\n\n{_told(question.instructions)}\nAnswer with one of these:\n" + "\n".join(lines)
        if not self.pack.has_chat_template:
            prompt += "\nAnswer: "
        return self.pack.decide(prompt, list(labels), calibrated=self.calibrated, **self.options).probabilities


def _told(value: Any) -> str:
    """Text, messages or JSON, as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseMessage):
        return get_buffer_string([value])
    if isinstance(value, Sequence) and value and all(isinstance(one, BaseMessage) for one in value):
        return get_buffer_string(list(value))
    return json.dumps(value, ensure_ascii=False, default=_told)
