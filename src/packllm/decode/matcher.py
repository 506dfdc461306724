"""A small interface to llguidance, which turns its panics and error states into typed errors.

Why llguidance (https://github.com/guidance-ai/llguidance, extra `structured`): it compiles a JSON schema lazily, in
milliseconds, while outlines-core builds an automaton over the vocabulary; it takes a vocabulary as byte strings, which
all members of a pack have; and it has no dependencies, while xgrammar brings a compiler and its own tensor runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from packllm.align.vocabulary import Vocabulary
from packllm.errors import OptionError

llguidance: Any
try:
    import llguidance
except ImportError:  # the extra is not installed
    llguidance = None

Result = TypeVar("Result")

MOST_SAID = 200  # characters of an error message: llguidance quotes the whole grammar


def checked(grammar: str) -> tuple[str | None, list[str]]:
    """Compile a grammar in llguidance's Lark: (the reason if that fails, else None; warnings of what was ignored)."""
    try:
        has_failed, messages = _guarded(llguidance.LLMatcher.validate_grammar_with_warnings, grammar)
    except OptionError as error:
        return str(error), []
    return (shortened(messages[0]), []) if has_failed else (None, messages)


def shortened(message: str) -> str:
    """An error message of llguidance without the grammar that it quotes."""
    message = " ".join(message.split("\n   1 |")[0].split())
    for noise in ("at 1(8): ", "failed to compile JSON schema: "):
        message = message.replace(noise, "")
    return message if len(message) <= MOST_SAID else message[:MOST_SAID] + " …"


class Matcher:
    """The state of an answer in its grammar.

    Args:
        tree: from `vocabulary_tree` or `byte_tree`. The methods take its ids, and one more that stands for the end.
        grammar: in llguidance's Lark.

    Raises:
        OptionError: llguidance fails, here or in any method.
    """

    def __init__(self, tree: Any, grammar: str, *, _inner: Any = None) -> None:
        self._inner = _guarded(llguidance.LLMatcher, tree, grammar, log_level=0) if _inner is None else _inner
        self._size = tree.vocab_size
        self._tree = tree
        self._check()

    def fork(self) -> Matcher:
        """A copy in the same state."""
        return Matcher(self._tree, "", _inner=_guarded(self._inner.deep_copy))

    def mask(self) -> np.ndarray:
        """The ids that may come next: bool (V + 1,), the last for the end."""
        bits = np.frombuffer(_guarded(self._inner.compute_bitmask), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._size, bitorder="little").view(bool)

    def forced(self) -> bytes:
        """The bytes that must come next; b"" if there is a choice."""
        return _guarded(self._inner.compute_ff_bytes)

    def consume(self, ids: Sequence[int]) -> None:
        """Advance by ids that the mask allows."""
        _guarded(self._inner.consume_tokens, list(ids))
        self._check()

    def back(self, count: int) -> None:
        """Undo the last `count` ids."""
        _guarded(self._inner.rollback, count)

    def follows(self, ids: Sequence[int]) -> bool:
        """Whether these ids may come next."""
        return _guarded(self._inner.validate_tokens, list(ids)) == len(ids)

    def ends_by(self, ids: Sequence[int]) -> bool:
        """Whether these ids and then the end may come next."""
        return self.follows([*ids, self._size - 1])

    @property
    def stopped(self) -> bool:
        """Whether nothing can follow."""
        return _guarded(self._inner.is_stopped)

    def _check(self) -> None:
        if self._inner.is_error():
            raise OptionError(
                f"the grammar of the answer fails: {shortened(self._inner.get_error())}; use a simpler schema"
            )


def _guarded(call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call llguidance; turn its panics, which are no Exceptions, into OptionError."""
    try:
        return call(*args, **kwargs)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise OptionError(f"llguidance failed on the grammar of the answer: {shortened(str(error))}") from None


_trees: WeakKeyDictionary[Vocabulary, tuple[Any, dict[bytes, int]]] = WeakKeyDictionary()


def vocabulary_tree(vocabulary: Vocabulary) -> tuple[Any, dict[bytes, int]]:
    """A vocabulary's tree for a Matcher, and the ids of its text tokens by their bytes."""
    if vocabulary not in _trees:
        first_ids = {token: i for i, token in reversed(list(enumerate(vocabulary.tokens))) if token}
        excluded = {*vocabulary.control, *vocabulary.unused}
        id_of = {token: i for token, i in first_ids.items() if i not in excluded}
        tokens = _Tokens(vocabulary.tokens, id_of, excluded)
        _trees[vocabulary] = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens)), id_of
    return _trees[vocabulary]


@lru_cache(1)
def byte_tree() -> Any:
    """A tree for a Matcher over the 256 bytes."""
    tokens = [bytes([byte]) for byte in range(256)]
    id_of = {token: i for i, token in enumerate(tokens)}
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(tokens, id_of, ())))


class _Tokens:
    """Tokens in llguidance's format, with one more id that stands for every end token."""

    def __init__(self, tokens: Sequence[bytes], id_of: Mapping[bytes, int], excluded: Collection[int]) -> None:
        end = len(tokens)
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = [*tokens, b"<end>"]
        self.special_token_ids = sorted({*excluded, end})
        self._id_of, self._longest = id_of, max(map(len, id_of))

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text that the grammar forces, longest tokens first."""
        ids, at = [], 0
        while at < len(text):
            stop = next(n for n in range(min(self._longest, len(text) - at), 0, -1) if text[at : at + n] in self._id_of)
            ids.append(self._id_of[text[at : at + stop]])
            at += stop
        return ids
