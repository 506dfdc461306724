"""All errors that packllm raises itself. Their messages name the argument, its value, the valid range and a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def shown(value: object) -> str:
    """A value as error messages show it: at most 200 characters; only the type's name if repr() fails."""
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
    """A prompt and the requested tokens do not fit a member's context window.

    Attributes:
        member: name of the member whose window is too small.
        limit: its context window in tokens.
        prompt_tokens: tokens of the prompt for that member.
        max_tokens: requested tokens.
        passage: only from Pack.relevance: the index of the passage that is too long. Its prompt is the instruction with
            the passage, and max_tokens is the length of the question.
        text: only from Pack.decide, score and rerank: the text after the prompt, such as "choices[1]"; max_tokens is
            its length.
        longest: (index, tokens) of the longest text in the option `passages`, if it is set.
    """

    def __init__(
        self,
        member: str,
        limit: int,
        prompt_tokens: int,
        max_tokens: int,
        passage: int | None = None,
        *,
        text: str | None = None,
        longest: tuple[int, int] | None = None,
    ) -> None:
        self.member, self.limit, self.passage, self.text, self.longest = member, limit, passage, text, longest
        self.prompt_tokens, self.max_tokens = prompt_tokens, max_tokens
        what, remedy = f"prompt of {prompt_tokens} tokens plus max_tokens={max_tokens} exceeds", "shorten the prompt, "
        if passage is not None:
            what = f"passages[{passage}], {prompt_tokens} tokens with the instruction, and a question of {max_tokens} "
            what, remedy = f"{what}tokens exceed", "shorten the question, " if max_tokens > limit // 2 else ""
            remedy += "split the passage, "
        elif text is not None:
            what = f"prompt of {prompt_tokens} tokens plus {text} of {max_tokens} tokens exceeds"
            remedy += f"shorten {text}, "
        else:
            remedy += "lower max_tokens, "
        if longest is not None:
            remedy += f"shorten passages[{longest[0]}], the longest with {longest[1]} tokens, "
        super().__init__(
            f"{what} the context window of {limit} tokens of member {member!r}; {remedy}or leave that member out"
        )


class AnswerTimeout(PackError, TimeoutError):
    """An answer took longer than the option timeout allows.

    Attributes:
        seconds: the value of timeout.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(
            f"the answer was not complete after timeout={seconds:g} seconds; raise timeout, lower max_tokens, or stream"
        )


class LoadError(PackError):
    """A model, adapter or tokenizer cannot be loaded."""


class WeightsError(PackError, ValueError):
    """Weights cannot be computed or are not valid for the pack."""


class VocabularyError(PackError):
    """The members' vocabularies do not support the request."""


class MemberError(PackError, RuntimeError):
    """A member failed while running: non-finite logits, or an exception inside the model.

    Attributes:
        member: name of the member.
    """

    def __init__(self, member: str, reason: str) -> None:
        self.member = member
        super().__init__(f"member {member!r}: {reason}")


class CancelledError(PackError):
    """A request was cancelled before it was finished."""


@contextmanager
def blamed_on(*names: str) -> Iterator[None]:
    """Turn any exception inside into a MemberError that names these members; several names if they share a pass."""
    try:
        yield
    except PackError:
        raise
    except Exception as error:
        raise MemberError("+".join(dict.fromkeys(names)), f"{type(error).__name__}: {error}") from error


class StructureError(PackError):
    """Two answers in a row violate their JSON schema, in a part that no grammar can guarantee.

    Attributes:
        text: the second answer.
    """

    def __init__(self, text: str, reason: str) -> None:
        self.text = text
        super().__init__(
            f"the answer violates what a grammar cannot guarantee of its schema ({reason}), and so did the one before; "
            f"ask again with another seed, or with a schema without uniqueItems, not, if, contains and the like"
        )


class DataError(PackError, ValueError):
    """Data cannot be used: a malformed row, an answer out of range, too few documents."""


class ExtraError(PackError, ImportError):
    """A feature needs a library that is missing or too old.

    Attributes:
        extra: name of the extra of this package that installs it.
    """

    def __init__(self, what: str, library: str, extra: str) -> None:
        self.extra = extra
        newer = f"; or, if it is too old, pip install -U '{library}'" if ">=" in library else ""
        super().__init__(f"{what} needs {library}; install packllm[{extra}]{newer}")


@contextmanager
def loading(what: str, remedy: str = "") -> Iterator[None]:
    """Turn any exception of the libraries below into a LoadError that names `what`, with the exception as `__cause__`.
    Errors of this package, MemoryError, KeyboardInterrupt and the like pass unchanged."""
    try:
        yield
    except (PackError, MemoryError):
        raise
    except BaseException as error:
        # pyo3 turns panics of Rust code (tokenizers, safetensors) into its own subclass of BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LoadError(f"cannot load {what}: {first_line(error)}{remedy}") from error


def refused(what: str, reason: str) -> LoadError:
    """A LoadError of `what`, for a reason that this package has found."""
    return LoadError(f"cannot load {what}: {reason}")


def unquoted(error: BaseException, text: str | None = None) -> str:
    """An error's message (or another `text` with it) for logs: without what a member's server said, as servers quote
    the prompt in their errors."""
    text = str(error) if text is None else text
    cause: BaseException | None = error
    while cause is not None:
        if said := getattr(cause, "said", ""):
            text = text.replace(said, "[the server's text]")
        cause = cause.__cause__ or cause.__context__
    return text


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, after its type if the message is short or only a key."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text if len(text) <= 500 else f"{text[:500]} ..."
    needs_type = isinstance(error, LookupError | AttributeError | TypeError | ArithmeticError) or len(text) < 12
    return f"{type(error).__name__}: {text}".removesuffix(": ") if needs_type else text


def guess(name: str, valid: Iterable[str]) -> str:
    """The hint "; did you mean 'weighting'?" for a misspelt name, or "." if no valid name is similar."""
    matches = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."
