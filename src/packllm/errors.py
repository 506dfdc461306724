"""Everything packllm raises on purpose. Messages say argument, value, valid range and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PackError(Exception):
    """Base of all errors of this package."""


class OptionError(PackError, ValueError):
    """An option is unknown, out of range or contradicts another."""


class PromptError(PackError, ValueError):
    """A prompt cannot be used: empty, an unknown role, a template that refuses it."""


class ContextOverflowError(PromptError):
    """A prompt and the tokens asked for do not fit a member's context window.

    Attributes:
        member: name of the member whose window is too small.
        limit: its context window in tokens.
        prompt_tokens: tokens of the prompt for that member.
        max_tokens: tokens asked for.
    """

    def __init__(self, member: str, limit: int, prompt_tokens: int, max_tokens: int) -> None:
        self.member, self.limit = member, limit
        self.prompt_tokens, self.max_tokens = prompt_tokens, max_tokens
        super().__init__(
            f"prompt of {prompt_tokens} tokens plus max_tokens={max_tokens} exceeds the context window of "
            f"{limit} tokens of member {member!r}; shorten the prompt, lower max_tokens, or leave that member out"
        )


class LoadError(PackError):
    """A model, adapter or tokenizer cannot be loaded."""


class WeightsError(PackError, ValueError):
    """Weights cannot be computed or are not valid for the pack."""


class VocabularyError(PackError):
    """The members' vocabularies do not allow what was asked."""


class MemberError(PackError, RuntimeError):
    """A member failed while running: non-finite logits, or an exception inside the model.

    Attributes:
        member: name of the member.
    """

    def __init__(self, member: str, reason: str) -> None:
        self.member = member
        super().__init__(f"member {member!r}: {reason}")


class CancelledError(PackError):
    """A request was cancelled before it was done."""


@contextmanager
def blamed_on(*names: str) -> Iterator[None]:
    """Whatever fails inside, in a body, a head, a softmax or a cache, is the failure of these members (several, where
    they share a pass): a MemberError that names them."""
    try:
        yield
    except PackError:
        raise
    except Exception as error:
        raise MemberError("+".join(dict.fromkeys(names)), f"{type(error).__name__}: {error}") from error


class DataError(PackError, ValueError):
    """Data cannot be used: a malformed row, an answer out of range, fewer documents than asked for."""


class ExtraError(PackError, ImportError):
    """Something needs a library that an extra of this package brings.

    Attributes:
        extra: name of the extra.
    """

    def __init__(self, what: str, library: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{what} needs {library}; install packllm[{extra}]")
