"""The pack's errors as LangChain's own kinds too, as far as the installed core has them, so that its middleware
(retries, fallbacks, summaries of what is too long) knows them. An error stays what it was: its type gains a parent."""

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
"""Names in langchain_core.exceptions of the kinds of errors, the narrowest first."""


@contextmanager
def typed() -> Iterator[None]:
    """Errors of the pack that are raised inside are LangChain's as well."""
    try:
        yield
    except packllm.PackError as error:
        # The same object: attributes, cause and traceback stay.
        error.__class__ = _joined(type(error))  # type: ignore[arg-type]  # mypy: a class is no Hashable
        raise


@cache
def _joined(own: type[packllm.PackError]) -> type[packllm.PackError]:
    name = next(name for kind, name in KINDS.items() if issubclass(own, kind))
    theirs = getattr(exceptions, name, None)
    if theirs is None or issubclass(own, theirs):
        return own
    return type(own.__name__, (own, theirs), {"__module__": own.__module__, "__doc__": own.__doc__})
