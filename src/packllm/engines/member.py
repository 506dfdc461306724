"""Members of a pack: authors, judges and token models. A token model is a tokenizer and an engine that reads its
ids."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, Literal

from packllm.align.vocabulary import Vocabulary
from packllm.chat.prompt import Encoder
from packllm.engines.base import Engine, Prefixes, Sequence
from packllm.errors import MemberError

Kind = Literal["author", "judge", "token model"]
"""What a member can do. author: continue a text. judge: also give the log-probability of a text. token model: also give
the next-token distribution."""


class Author(ABC):
    """The base class of all members.

    Attributes:
        name: its name in tables and weights.
        kind: what it can do, see Kind.
        encoder: encodes prompts for the member.
        vocabulary: the bytes of each token id; empty if unknown.
        vocabulary_size: the number of ids, counted from 0, that the member gives log-probabilities of.
        context_window: maximum number of tokens that it reads; None if it has no limit or the limit is unknown.
        end_ids: ids that end an answer.
    """

    name: str
    kind: Kind
    encoder: Encoder
    vocabulary: Vocabulary
    vocabulary_size: int
    context_window: int | None
    end_ids: frozenset[int]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that changes if answers do, as far as this can be known."""

    def failed(self, error: BaseException) -> MemberError:
        """Turn an error into this member's MemberError."""
        if isinstance(error, MemberError):
            return error
        reason = str(error) if isinstance(error, FloatingPointError) else f"{type(error).__name__}: {error}"
        failure = MemberError(self.name, reason)
        failure.__cause__ = error
        return failure


class Member(Author):
    """A token model: a language model and its tokenizer.

    Args:
        model: a transformers causal LM; None if `engine` is given.
        tokenizer: its tokenizer, with a `tokenizers` backend; None if `encoder` is given.
        name: its name in tables and weights.
        encoder: the tokenizer's encoder, if there is one already.
        engine: the engine that runs the model, if members share it or it is not of transformers; None: a new one.
        adapter: index of the engine's adapter that this member uses; None: the model itself.

    Attributes:
        vocabulary: the bytes of each token id.
        vocabulary_size: the number of ids that model and tokenizer both have; log-probabilities are of these.
        context_window: maximum number of tokens that the model reads; None if it has no limit.
        end_ids: ids that end an answer.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        name: str = "member",
        encoder: Encoder | None = None,
        *,
        engine: Engine | None = None,
        adapter: int | None = None,
    ) -> None:
        self.kind = "token model"
        self.tokenizer, self.name, self.adapter = tokenizer, name, adapter
        self.encoder = encoder or Encoder(tokenizer)
        self.vocabulary: Vocabulary = self.encoder.vocabulary
        if engine is None:
            from packllm.engines.transformers.engine import Engine as Transformers

            engine = Transformers(model, self.vocabulary)
        self.engine: Engine = engine
        self.vocabulary_size = min(engine.vocabulary_size, len(self.vocabulary))
        self.context_window = engine.context_window
        tokenizer_ends = {self.vocabulary.special.get("eos"), self.encoder.end_of_turn}
        self.end_ids = frozenset(i for i in {*engine.end_ids, *tokenizer_ends} if i is not None)

    def __repr__(self) -> str:
        return f"Member({self.name!r})"

    @property
    def model(self) -> Any:
        """The torch model; for an adapter, the shared base. AttributeError if the engine has none."""
        return self.engine.model  # type: ignore[attr-defined]

    @property
    def fingerprint(self) -> str:
        """Hash of vocabulary, template and weights: it changes if answers do."""
        content = f"{self.vocabulary.fingerprint} {self.encoder.template} {self.engine.fingerprint(self.adapter)}"
        return hashlib.sha256(content.encode()).hexdigest()

    def merged(self) -> Any:
        """A torch model of this member alone: the model, or a copy of the base with the adapter merged."""
        return self.engine.merged(self.adapter)  # type: ignore[attr-defined]

    def real(self, logits: Any) -> Any:
        """The float32 logits, from the torch model's, of the ids that tokenizer and model both have."""
        return self.engine.real(logits)  # type: ignore[attr-defined]

    def open(self, prefixes: Prefixes | None = None) -> Sequence:
        """A new sequence; it may start from a cached prefix."""
        return self.engine.open(self.adapter, prefixes)
