"""llguidance behind a small face: what of it this package uses, with its panics and error states as typed errors.

Of the libraries that work on logits, llguidance (https://github.com/guidance-ai/llguidance, extra `structured`) is the
one that compiles a JSON schema lazily, in milliseconds instead of building an automaton over the vocabulary
(outlines-core), that takes a vocabulary as plain byte strings, which is what all members of a pack share, and that
needs nothing but itself (xgrammar brings a compiler and its own tensor runtime).
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

MOST_SAID = 200  # of what the library says: it quotes the whole grammar


def checked(grammar: str) -> tuple[str | None, list[str]]:
    """Why a grammar in llguidance's Lark cannot be followed, None if it can; and what of it was left out."""
    try:
        failed, said = _guarded(llguidance.LLMatcher.validate_grammar_with_warnings, grammar)
    except OptionError as error:
        return str(error), []
    return (shortened(said[0]), []) if failed else (None, said)


def shortened(said: str) -> str:
    """What llguidance says, without the grammar that it quotes."""
    said = " ".join(said.split("\n   1 |")[0].split())
    for noise in ("at 1(8): ", "failed to compile JSON schema: "):
        said = said.replace(noise, "")
    return said if len(said) <= MOST_SAID else said[:MOST_SAID] + " …"


class Matcher:
    """Where an answer stands in its grammar.

    Args:
        tree: from `vocabulary_tree` or `byte_tree`; its ids are meant below, and one more that stands for the end.
        grammar: in llguidance's Lark.

    Raises:
        OptionError: here and in all verbs, where llguidance gives up.
    """

    def __init__(self, tree: Any, grammar: str, *, _inner: Any = None) -> None:
        self._inner = _guarded(llguidance.LLMatcher, tree, grammar, log_level=0) if _inner is None else _inner
        self._size = tree.vocab_size
        self._tree = tree
        self._check()

    def fork(self) -> Matcher:
        """A second one in the same place."""
        return Matcher(self._tree, "", _inner=_guarded(self._inner.deep_copy))

    def mask(self) -> np.ndarray:
        """Which ids may come next: bool (V + 1,), the last for the end."""
        bits = np.frombuffer(_guarded(self._inner.compute_bitmask), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._size, bitorder="little").view(bool)

    def forced(self) -> bytes:
        """The bytes that must come next."""
        return _guarded(self._inner.compute_ff_bytes)

    def consume(self, ids: Sequence[int]) -> None:
        """Go on by ids that the mask allows."""
        _guarded(self._inner.consume_tokens, list(ids))
        self._check()

    def back(self, count: int) -> None:
        """Take the last `count` ids back."""
        _guarded(self._inner.rollback, count)

    def follows(self, ids: Sequence[int]) -> bool:
        """Whether these ids may come next."""
        return _guarded(self._inner.validate_tokens, list(ids)) == len(ids)

    def ends_by(self, ids: Sequence[int]) -> bool:
        """Whether these ids and then the end may follow."""
        return self.follows([*ids, self._size - 1])

    @property
    def stopped(self) -> bool:
        """Whether nothing can follow."""
        return _guarded(self._inner.is_stopped)

    def _check(self) -> None:
        if self._inner.is_error():
            raise OptionError(
                f"the form of the answer cannot be followed: {shortened(self._inner.get_error())}; use a simpler schema"
            )


def _guarded(call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """What a call of llguidance returns; its panics, which are no Exceptions, as OptionError."""
    try:
        return call(*args, **kwargs)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise OptionError(f"llguidance failed on the form of the answer: {shortened(str(error))}") from None


_trees: WeakKeyDictionary[Vocabulary, tuple[Any, dict[bytes, int]]] = WeakKeyDictionary()


def vocabulary_tree(vocabulary: Vocabulary) -> tuple[Any, dict[bytes, int]]:
    """A vocabulary as a Matcher takes it, and the ids of its text tokens by their bytes."""
    if vocabulary not in _trees:
        spelled = {token: i for i, token in reversed(list(enumerate(vocabulary.tokens))) if token}
        outside = {*vocabulary.control, *vocabulary.unused}
        id_of = {token: i for token, i in spelled.items() if i not in outside}
        tokens = _Tokens(vocabulary.tokens, id_of, outside)
        _trees[vocabulary] = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens)), id_of
    return _trees[vocabulary]


@lru_cache(1)
def byte_tree() -> Any:
    """The 256 bytes as a Matcher takes them."""
    tokens = [bytes([byte]) for byte in range(256)]
    id_of = {token: i for i, token in enumerate(tokens)}
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(tokens, id_of, ())))


class _Tokens:
    """Tokens as llguidance wants them: one more id, which stands for every end."""

    def __init__(self, tokens: Sequence[bytes], id_of: Mapping[bytes, int], outside: Collection[int]) -> None:
        end = len(tokens)
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = [*tokens, b"<end>"]
        self.special_token_ids = sorted({*outside, end})
        self._id_of, self._longest = id_of, max(map(len, id_of))

    def __call__(self, text: bytes) -> list[int]:
        """Ids of a text that the grammar forces, longest tokens first."""
        ids, at = [], 0
        while at < len(text):
            stop = next(n for n in range(min(self._longest, len(text) - at), 0, -1) if text[at : at + n] in self._id_of)
            ids.append(self._id_of[text[at : at + stop]])
            at += stop
        return ids
