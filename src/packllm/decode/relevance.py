"""Relevance of passages to a question: fused log p(question | passage) (UPR, arXiv 2204.07496)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from packllm.chat.messages import Prompt, check_unicode, says_nothing
from packllm.decode.line import Line
from packllm.decode.remote import ServerLine
from packllm.decode.request import Request
from packllm.decode.score import fused_logprobs
from packllm.decode.tokens import Slot
from packllm.engines.member import Author
from packllm.errors import ContextOverflowError, PromptError, shown

INSTRUCTION = "Write a question that the following passage answers."
NOT_RATING = {"score_on": None, "tools": (), "tool_choice": None, "json_schema": None, "explain": None, "passages": ()}
"""Options that affect answers only; rating resets them."""


def check_question(question: Any, passages: Any) -> list[str]:
    """The passages. Raise PromptError if the question or a passage is no text, or blank."""
    if not isinstance(question, str) or says_nothing(question):
        raise PromptError(f"question={shown(question)}: give a text with at least one word")
    check_unicode(question, "question")
    if isinstance(passages, str | bytes) or not isinstance(passages, Sequence):
        raise PromptError(f"passages must be a list of texts, not {shown(passages)}")
    for at, passage in enumerate(passages):
        if not isinstance(passage, str) or says_nothing(passage):
            raise PromptError(f"passages[{at}]={shown(passage)} has no text; leave it out")
        check_unicode(passage, f"passages[{at}]")
    return list(passages)


def asking(passage: str, chat: bool) -> Prompt:
    """The prompt before the question. All prompts begin with the instruction, so it is read only once."""
    instruction = f"{INSTRUCTION}\n\nPassage: {passage.strip()}"
    return [{"role": "user", "content": instruction}] if chat else f"{instruction}\n\nQuestion:"


def asked(question: str, chat: bool) -> str:
    """The question in the form that follows the prompt."""
    return question.strip() if chat else f" {question.strip()}"


def too_long(error: ContextOverflowError, question: str, members: Sequence[Author], at: int) -> ContextOverflowError:
    """The error of a prompt, rewritten as the error of the passage in it."""
    count = next(len(m.encoder.continuation(question)) for m in members if m.name == error.member)
    return ContextOverflowError(error.member, error.limit, error.prompt_tokens, count, at)


def check_fits(request: Request, question: str, at: Sequence[int]) -> None:
    """Raise ContextOverflowError for a passage that does not fit with the question; `at`: the passages' indices."""
    for place, encoded in zip(at, request.encoded, strict=True):
        for k, prompt in encoded.items():
            member, window = request.members[k], request.members[k].context_window
            count = len(member.encoder.continuation(question))
            if window is not None and len(prompt.ids) + count > window:
                raise ContextOverflowError(member.name, window, len(prompt.ids), count, place)


def question_logprobs(request: Request, question: str) -> list[float]:
    """log p of a question after each prompt of a request, in nats."""
    request.share_beginning()
    request.prefill()
    rows = range(len(request.encoded))

    def scores(lines: dict[Slot, Line | ServerLine]) -> list[float]:
        return fused_logprobs(
            request, lines, dict(zip(rows, request.weights, strict=True)), dict.fromkeys(rows, question)
        )

    return request.run_on_lines(scores)


def with_cosine(
    ratings: Sequence[float], question: Sequence[float], passages: Sequence[Sequence[float]]
) -> list[float]:
    """Ratings of passages, and the cosine of their embeddings with the question's: each standardised over the passages
    (mean 0, standard deviation 1), then summed. Two raters of unlike faults (docs/rerank.md).

    Args:
        ratings: one for each passage.
        question: its embedding, of any length and scale.
        passages: theirs.
    """
    query, rows = np.asarray(question, float), np.asarray(passages, float)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    cosines = rows @ query / np.where(lengths > 0, lengths, 1.0)
    return (_standard(np.asarray(ratings, float)) + _standard(cosines)).tolist()


def _standard(values: np.ndarray) -> np.ndarray:
    # A question that no tokenizer knows has -infinity everywhere.
    spread = values.std() if np.isfinite(values).all() else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)
