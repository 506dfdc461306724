"""Makes the pack's errors also LangChain's, as far as the installed core has such classes. LangChain's middleware
(retries, fallbacks, summaries of long conversations) then recognises them. The error object only gets a second base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from langchain_core import exceptions

import packllm

KINDS: dict[type[packllm.PackError], str] = {
    packllm.ContextOverflowError: "ContextOverflowError",
    packllm.AnswerTimeout: "ModelTimeoutError",
    packllm.MemberError: "ModelAPIError",
    packllm.PromptError: "ModelInvalidRequestError",
    packllm.OptionError: "ModelInvalidRequestError",
    packllm.WeightsError: "ModelInvalidRequestError",
    packllm.VocabularyError: "ModelInvalidRequestError",
    packllm.PackError: "ModelError",
}
"""Names of the corresponding classes in langchain_core.exceptions, the most specific first."""


@contextmanager
def typed() -> Iterator[None]:
    """Make errors of the pack that are raised inside LangChain's as well."""
    try:
        yield
    except packllm.PackError as error:
        # The same object: attributes, cause and traceback are kept.
        error.__class__ = _joined(type(error))  # type: ignore[arg-type]  # mypy: a class is no Hashable
        raise


@cache
def _joined(kind_: type[packllm.PackError]) -> type[packllm.PackError]:
    name = next(name for kind, name in KINDS.items() if issubclass(kind_, kind))
    other = getattr(exceptions, name, None)
    if other is None or issubclass(kind_, other):
        return kind_
    return type(kind_.__name__, (kind_, other), {"__module__": kind_.__module__, "__doc__": kind_.__doc__})
