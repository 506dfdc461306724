"""Runs of a chat model that are answered together: each asks for one answer, the pack decodes them as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

import packllm


@dataclass(eq=False)
class _Asked:
    prompt: Any
    options: dict[str, Any]
    cancelled: Callable[[], bool]
    answer: Future[list[packllm.Chunk]] = field(default_factory=Future)


class Together:
    """A batch of runs, each in a thread of its own. Each asks or leaves; when all have, the last one answers those
    that ask. So each run keeps its own callbacks, cache and errors.

    Args:
        pack: answers.
        runs: how many runs there are.

    Attributes:
        threads: where runs that are coroutines can wait, one thread a run.
    """

    def __init__(self, pack: packllm.Pack, runs: int) -> None:
        self._pack, self._awaited = pack, runs
        self._asked: list[_Asked] = []
        self._lock = Lock()
        self.threads = ThreadPoolExecutor(runs, "packllm")  # starts none before it is used

    @contextmanager
    def seat(self, owner: object) -> Iterator[Seat]:
        """A place for one run, which is in SEAT meanwhile, and is left if the run has asked nothing."""
        seat = Seat(self, owner)
        token = SEAT.set(seat)
        try:
            yield seat
        finally:
            SEAT.reset(token)
            seat.leave()

    def join(self, asked: _Asked | None) -> None:
        """One more run asks, or needs no answer."""
        with self._lock:
            self._asked += [asked] if asked else []
            self._awaited -= 1
            complete = not self._awaited
        if complete:
            self._answer_all()

    def _answer_all(self) -> None:
        groups: list[list[_Asked]] = []
        for asked in self._asked:
            group = next((group for group in groups if group[0].options == asked.options), None)
            if group is None:
                groups.append([asked])
            else:
                group.append(asked)
        for group in groups:
            self._answer(group)

    def _answer(self, group: Sequence[_Asked]) -> None:
        chunks: list[list[packllm.Chunk]] = [[] for _ in group]
        try:
            prompts = [asked.prompt for asked in group]
            with closing(self._pack.stream_batch(prompts, **group[0].options)) as pieces:
                for index, chunk in pieces:
                    if all(asked.cancelled() for asked in group):
                        raise CancelledError("the tasks that waited for these answers were cancelled")
                    chunks[index].append(chunk)
        except packllm.PromptError as error:
            if len(group) == 1:
                group[0].answer.set_exception(error)
                return
            for asked in group:  # one prompt is at fault, the others have an answer
                self._answer([asked])
        except BaseException as error:
            for asked in group:
                asked.answer.set_exception(error)
        else:
            for asked, answer in zip(group, chunks, strict=True):
                asked.answer.set_result(answer)


class Seat:
    """One run's place in a batch of the model `owner`."""

    def __init__(self, together: Together, owner: object) -> None:
        self.together, self.owner = together, owner
        self._taken = False

    def free_for(self, model: object) -> bool:
        """Whether a model may ask here: the one whose batch this is, once."""
        return not self._taken and self.owner is model

    def ask(self, prompt: Any, options: dict[str, Any], cancelled: Event | None) -> list[packllm.Chunk]:
        """The answer's chunks, once all runs of the batch are there."""
        self._taken = True
        asked = _Asked(prompt, options, cancelled.is_set if cancelled is not None else lambda: False)
        self.together.join(asked)
        return asked.answer.result()

    def leave(self) -> None:
        """Nothing is asked here any more."""
        if not self._taken:
            self._taken = True
            self.together.join(None)


SEAT: ContextVar[Seat | None] = ContextVar("packllm_seat", default=None)
