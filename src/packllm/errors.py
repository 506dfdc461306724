"""Everything packllm raises on purpose. Messages say argument, value, valid range and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def shown(value: object) -> str:
    """A value as an error shows it: at most 200 characters, and none of what it cannot say of itself."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}..."


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
        passage: of Pack.relevance, the index of the passage that is too long; its prompt is the passage with the
            instruction, and the tokens asked for are the question.
    """

    def __init__(
        self, member: str, limit: int, prompt_tokens: int, max_tokens: int, passage: int | None = None
    ) -> None:
        self.member, self.limit, self.passage = member, limit, passage
        self.prompt_tokens, self.max_tokens = prompt_tokens, max_tokens
        if passage is not None:
            super().__init__(
                f"passages[{passage}], {prompt_tokens} tokens with the instruction, and a question of {max_tokens} "
                f"tokens exceed the context window of {limit} tokens of member {member!r}; split the passage, or leave "
                f"that member out"
            )
            return
        super().__init__(
            f"prompt of {prompt_tokens} tokens plus max_tokens={max_tokens} exceeds the context window of "
            f"{limit} tokens of member {member!r}; shorten the prompt, lower max_tokens, or leave that member out"
        )


class AnswerTimeout(PackError, TimeoutError):
    """An answer took longer than the option timeout allows.

    Attributes:
        seconds: the time it had.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(
            f"the answer was not whole after timeout={seconds:g} seconds; allow more time, lower max_tokens, or stream"
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


class StructureError(PackError):
    """An answer violates its JSON schema in what no grammar can guarantee, and so did one drawn anew.

    Attributes:
        text: the answer.
    """

    def __init__(self, text: str, reason: str) -> None:
        self.text = text
        super().__init__(
            f"the answer violates what a grammar cannot guarantee of its schema ({reason}), and so did another one; "
            f"ask again with another seed, or with a schema without uniqueItems, not, if, contains and the like"
        )


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


@contextmanager
def loading(what: str, remedy: str = "") -> Iterator[None]:
    """Whatever the libraries below raise while this is open becomes a LoadError that names `what`; theirs is its
    `__cause__`. Errors of this package pass as they are, and so do MemoryError, KeyboardInterrupt and the like."""
    try:
        yield
    except (PackError, MemoryError):
        raise
    except BaseException as error:
        # pyo3 turns panics of Rust code (tokenizers, safetensors) into a BaseException of its own.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LoadError(f"cannot load {what}: {told(error)}{remedy}") from error


def refused(what: str, reason: str) -> LoadError:
    """A LoadError of `what`, for a reason found here."""
    return LoadError(f"cannot load {what}: {reason}")


def told(error: BaseException) -> str:
    """What an exception says, in one line; a bare key or index with the name of its kind."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text if len(text) <= 500 else f"{text[:500]} ..."
    bare = isinstance(error, LookupError | AttributeError | TypeError | ArithmeticError) or len(text) < 12
    return f"{type(error).__name__}: {text}".removesuffix(": ") if bare else text


def guess(name: str, valid: Iterable[str]) -> str:
    """ "; did you mean 'weighting'?" for a misspelt name, "." where nothing is near."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."
