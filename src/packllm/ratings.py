"""How a pack rates given texts: log-likelihoods of continuations, decisions among labels, relevance of passages."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import aclosing, closing
from functools import partial
from threading import Event
from typing import Any

from packllm.asynchronous import in_thread, iterate
from packllm.chat.prompt import Prompt, check_unicode
from packllm.decode import decodings
from packllm.decode.cancel import Stop, Stream
from packllm.decode.decide import Decision, begun, check_choices, decision
from packllm.decode.line import Line
from packllm.decode.relevance import NOT_RATING, asked, asking, check_fits, check_question, question_logprobs, too_long
from packllm.decode.remote import ServerLine
from packllm.decode.request import Request
from packllm.decode.score import fused_logprobs, member_logprobs
from packllm.decode.tokens import Slot
from packllm.errors import ContextOverflowError, PromptError, shown
from packllm.members import Members
from packllm.options import Options
from packllm.weights import Weights


class Ratings(Members):
    """Members that rate texts together; base class of Pack."""

    def score(
        self, prompt: Prompt, continuations: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> list[float]:
        """Fused log-likelihood of each continuation after a prompt, in nats. If the members share a vocabulary, they
        are fused at each token; otherwise at each text boundary that is a token boundary of all members.

        The weights come from the prompt alone. A continuation is tokenized separately and appended to the prompt's
        ids, so no token crosses the boundary. A prompt that is a text is not put into a chat template, unless
        chat_template=True. All continuations are scored by the same members: if a member fails and is dropped, all are
        scored again. Other arguments and errors as in stream().
        """
        texts = continuations if isinstance(continuations, list | tuple) else ()
        if not isinstance(continuations, list | tuple) or not all(isinstance(text, str) and text for text in texts):
            raise PromptError(f"continuations must be a list of non-empty strings, not {shown(continuations)}")
        for at, text in enumerate(continuations):
            check_unicode(text, f"continuations[{at}]")
        checked = self.check(**options)
        if checked.chat_template is None:
            checked = checked.model_copy(update={"chat_template": False})
        return self._scored(prompt, continuations, checked, cancel, "continuations", alone=False)[0]

    def decide(
        self,
        prompt: Prompt,
        choices: Sequence[str],
        *,
        calibrated: bool = False,
        cancel: Event | None = None,
        **options: Any,
    ) -> Decision:
        """Choose the label with which the pack would answer a prompt, with probabilities of the pack and each member.

        Args:
            choices: two or more labels, of any number of tokens, in the form in which they would follow the prompt.
            calibrated: divide each label's likelihood by its likelihood after an empty prompt ("N/A"), so that a label
                that is likely after any prompt has no advantage.

        Raises:
            OptionError: labels are blank or equal.
            PromptError: a label is no valid Unicode. Others as in stream().
        """
        labels, checked = check_choices(choices), self.check(**options)
        fused, members, weights = self._scored(prompt, labels, checked, cancel, "choices")
        spelled = {m.name: [m.encoder.continuation(label) for label in labels] for m in self.members}
        longer = {name: begun(labels, ids if all(ids) else ()) for name, ids in spelled.items()}
        if not calibrated:
            return decision(labels, fused, members, weights, longer=longer)
        shares = {name: value for name, value in zip(weights.names, weights.values, strict=True) if value}
        of_prompt = {"score_on": None, "passages": (), "explain": None}
        same = checked.override({"weighting": shares, "pool": weights.pool, **of_prompt})
        nothing = "N/A" if isinstance(prompt, str) else [{"role": "user", "content": "N/A"}]
        empty = self._scored(nothing, labels, same, cancel, "choices", alone=False)[0]
        return decision(labels, fused, members, weights, empty, longer)

    async def adecide(
        self, prompt: Prompt, choices: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> Decision:
        """decide() for asyncio, as astream()."""
        return await in_thread(lambda stop: self.decide(prompt, choices, cancel=stop, **options), cancel)

    def _scored(
        self,
        prompt: Prompt,
        texts: Sequence[str],
        checked: Options,
        cancel: Event | None,
        name: str,
        alone: bool = True,
    ) -> tuple[list[float], dict[str, list[float]], Weights]:
        """Log-likelihoods of texts after a prompt: fused, and (if `alone`) of each member; and the weights. `name` is
        the argument that has the texts, for errors."""
        with closing(self._request([prompt], checked)) as request:
            request.stop = Stop(cancel)
            request.limits(0)
            for at, text in enumerate(texts):
                request.check_continuation(text, f"{name}[{at}]")
            request.prefill()

            def scores(lines: dict[Slot, Line | ServerLine]) -> tuple[list[float], dict[str, list[float]]]:
                rows = range(len(texts))
                at_end = {(k, r): line for (k, _), line in lines.items() for r in rows}
                weights = dict.fromkeys(rows, request.weights[0])
                fused = fused_logprobs(request, at_end, weights, dict(enumerate(texts)))
                return fused, member_logprobs({k: line for (k, _), line in lines.items()}, texts) if alone else {}

            return *request.run_on_lines(scores), request.weights[0]

    def relevance(
        self, question: str, passages: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> list[float]:
        """How well each passage explains a question: fused log p(question | passage) in nats (UPR, arXiv 2204.07496).
        Higher is better. All values share an additive constant that depends only on the question.

        The members read an instruction and the passage, and score the question as in score(), with the weights of this
        prompt. `batch_size` passages are read together, and the instruction once for all. Passages in the prefix cache
        are not read again for another question (see the option prefix_cache_mb).

        Raises:
            PromptError: the question or a passage is blank.
            ContextOverflowError: a passage (see its `passage`) and the question exceed a member's context window;
                raised before anything runs. Others as in stream().
        """
        groups = self._relevances(question, passages, self.check(**options), Stop(cancel))
        return _in_order(pair for group in groups for pair in group)

    async def arelevance(
        self, question: str, passages: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> list[float]:
        """relevance() for asyncio; see Pack.astream()."""
        start = partial(self._relevances, question, passages, self.check(**options), Stop(cancel))
        async with aclosing(iterate(start)) as groups:
            return _in_order([pair async for group in groups for pair in group])

    def _relevances(
        self, question: str, passages: Sequence[str], checked: Options, stop: Stop
    ) -> Generator[list[tuple[int, float]], None, None]:
        """Groups of (index of a passage, its rating)."""
        texts, chat = check_question(question, passages), self._wraps("", checked)
        checked = checked.model_copy(update=NOT_RATING)
        prompts, text = [asking(passage, chat) for passage in texts], asked(question, chat)

        def opened(group: Sequence[int]) -> Request:
            try:
                request = self._request([prompts[at] for at in group], checked)
            except ContextOverflowError as error:
                if len(group) == 1:
                    raise too_long(error, text, self.members, group[0]) from None
                for at in group:
                    opened([at])
                raise
            check_fits(request, text, group)
            request.stop = stop
            return request

        size = 1 if decodings.find(checked.decoding).mapped else checked.batch_size
        requests = [(group, opened(group)) for group in grouped(prompts, size)]

        def rated() -> Generator[list[tuple[int, float]], None, None]:
            for group, request in requests:
                with closing(request):
                    yield list(zip(group, question_logprobs(request, text), strict=True))

        return Stream(rated(), stop)

    def rerank(
        self, prompt: Prompt, candidates: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> list[tuple[str, float]]:
        """The candidates with their fused log-likelihood in nats per byte, best first; ties keep their order. Arguments
        and errors as in score()."""
        scores = self.score(prompt, candidates, cancel=cancel, **options)
        rated = [(text, score / len(text.encode())) for text, score in zip(candidates, scores, strict=True)]
        return sorted(rated, key=lambda pair: -pair[1])


def _in_order(pairs: Iterable[tuple[int, float]]) -> list[float]:
    """The values of (index, value) pairs, sorted by index."""
    return [value for _, value in sorted(pairs)]


def grouped(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Group prompts into batches of at most `size`; return their indices. If there are several batches, prompts of
    similar length share one, to save padding."""
    order = list(range(len(prompts)))
    if len(order) > size:
        order.sort(key=lambda at: len(str(prompts[at])))
    return [order[at : at + size] for at in range(0, len(order), size)]
