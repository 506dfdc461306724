"""Members of a pack: authors, judges, and token models, which are a tokenizer and an engine that reads its ids."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, Literal

from packllm.align.vocabulary import Vocabulary
from packllm.chat.prompt import Encoder
from packllm.engines.base import Engine, Prefixes, Sequence
from packllm.errors import MemberError

Kind = Literal["author", "judge", "token model"]
"""What a member can do. author: go on with a text. judge: that, and say how likely a text is. token model: that, and
give the distribution of the next token."""


class Author(ABC):
    """What all members are, whoever runs them.

    Attributes:
        name: what tables and weights call it.
        kind: what it can do, see Kind.
        encoder: from prompts to what the member reads.
        vocabulary: bytes of each token id; empty where nobody knows them.
        vocabulary_size: how many first ids of it the member gives log-probabilities of.
        context_window: most tokens that it reads, None if it has no limit or nobody knows it.
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
        """Hash that changes with the answers, as far as that can be told."""

    def failed(self, error: BaseException) -> MemberError:
        """The error as this member's."""
        if isinstance(error, MemberError):
            return error
        reason = str(error) if isinstance(error, FloatingPointError) else f"{type(error).__name__}: {error}"
        failure = MemberError(self.name, reason)
        failure.__cause__ = error
        return failure


class Member(Author):
    """A token model: a language model and its tokenizer.

    Args:
        model: a transformers causal LM; None where `engine` is given.
        tokenizer: its tokenizer, with a `tokenizers` backend; None where `encoder` is given.
        name: what tables and weights call it.
        encoder: of that tokenizer, where one is made already.
        engine: what runs the model, where members share one or it is not of transformers; made here otherwise.
        adapter: index of the engine's adapter that this member is; None: the model as it is.

    Attributes:
        vocabulary: bytes of each token id.
        vocabulary_size: ids that model and tokenizer both have; log-probabilities are of these.
        context_window: most tokens the model reads, None if it has no limit.
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
        own = {self.vocabulary.special.get("eos"), self.encoder.end_of_turn}
        self.end_ids = frozenset(i for i in {*engine.end_ids, *own} if i is not None)

    def __repr__(self) -> str:
        return f"Member({self.name!r})"

    @property
    def model(self) -> Any:
        """The torch model, for a member that is an adapter the base it shares; AttributeError where there is none."""
        return self.engine.model  # type: ignore[attr-defined]

    @property
    def fingerprint(self) -> str:
        """Hash of vocabulary, template and weights: changes with the answers."""
        said = f"{self.vocabulary.fingerprint} {self.encoder.template} {self.engine.fingerprint(self.adapter)}"
        return hashlib.sha256(said.encode()).hexdigest()

    def merged(self) -> Any:
        """A torch model that is this member by itself: the model, or a copy of the base with the adapter merged."""
        return self.engine.merged(self.adapter)  # type: ignore[attr-defined]

    def real(self, logits: Any) -> Any:
        """float32 logits of the ids that tokenizer and model share, of what the torch model gives."""
        return self.engine.real(logits)  # type: ignore[attr-defined]

    def open(self, prefixes: Prefixes | None = None) -> Sequence:
        """A sequence that has read nothing; it may start from what is kept of earlier ones."""
        return self.engine.open(self.adapter, prefixes)
