"""A member of a pack: a model, or a LoRA adapter on one, with its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.chat.prompt import Encoder
from packllm.engines.transformers.engine import Engine
from packllm.engines.transformers.session import Session
from packllm.errors import MemberError

__all__ = ["Member", "Session"]


class Member:
    """A causal language model and its tokenizer, ready to open sessions.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer, with a `tokenizers` backend.
        name: what tables and weights call it.
        encoder: of the same tokenizer, where one is made already.
        engine: of the same model, where members share one; made here otherwise.
        adapter: index of the engine's adapter that this member is; None: the model as it is.

    Attributes:
        model: the model; for a member that is an adapter, the base it shares (see merged()).
        vocabulary: bytes of each token id.
        vocabulary_size: ids that model and tokenizer both have; logits are cut to them.
        context_window: most tokens the model reads, None if it has no limit.
        end_ids: ids that end an answer.
        forwards, tokens: forward passes run for this member and token positions put through them, for
            tests and benchmarks.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "member",
        encoder: Encoder | None = None,
        *,
        engine: Engine | None = None,
        adapter: int | None = None,
    ) -> None:
        self.tokenizer, self.name, self.adapter = tokenizer, name, adapter
        self.encoder = encoder or Encoder(tokenizer)
        self.vocabulary: Vocabulary = self.encoder.vocabulary
        self.engine = engine or Engine(model, self.vocabulary)
        self.vocabulary_size = self.engine.vocabulary_size
        config = model.config.get_text_config(decoder=True)
        self.context_window: int | None = getattr(config, "max_position_embeddings", None)
        self.end_ids = self._find_end_ids()
        self.forwards = self.tokens = 0

    def __repr__(self) -> str:
        return f"Member({self.name!r})"

    @property
    def model(self) -> Any:
        return self.engine.model

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @cached_property
    def fingerprint(self) -> str:
        """Hash of configuration, vocabulary and a sample of every weight: changes with the answers."""
        digest = hashlib.sha256(self.vocabulary.fingerprint.encode())
        digest.update(f"{type(self.model).__name__} {self.model.dtype} {self.encoder.template}".encode())
        weights = list(self.model.named_parameters())
        if self.adapter is not None and self.engine.adapters is not None:
            for name, factors in self.engine.adapters.factors(self.adapter).items():
                weights += [(f"{name}.down", factors[0]), (f"{name}.up", factors[1])]
        for name, parameter in weights:
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(f"{name} {tuple(parameter.shape)} {sample.float().tolist()}".encode())
        return digest.hexdigest()

    def merged(self) -> Any:
        """A transformers model that is this member by itself: the model, or a copy of the base with the adapter
        added to its weights."""
        if self.adapter is None or self.engine.adapters is None:
            return self.model
        return self.engine.adapters.merged(self.adapter)

    def open(self, rows: Sequence[Sequence[int]]) -> Session:
        """A session over one or more prompts given as ids; nothing runs yet."""
        return Session([self] * len(rows), rows)

    def _find_end_ids(self) -> frozenset[int]:
        configured = getattr(self.model, "generation_config", None)
        ends = getattr(configured, "eos_token_id", None)
        ids = {ends} if isinstance(ends, int) else set(ends or ())
        ids |= {self.vocabulary.special.get("eos"), self.encoder.end_of_turn}
        return frozenset(i for i in ids if i is not None)

    def real(self, logits: Tensor) -> Tensor:
        """float32 logits of the ids that tokenizer and model share."""
        return self.engine.real(logits)

    def logprobs(self, logits: Tensor) -> Tensor:
        """float32 log-softmax over the ids that tokenizer and model share.

        Raises:
            MemberError: the logits hold NaN or +infinity, or rule out every token.
        """
        logits = self.real(logits)
        normaliser = logits.logsumexp(-1, keepdim=True)
        if not normaliser.isfinite().all():
            raise MemberError(self.name, "its logits are not finite (NaN or infinity)")
        return logits - normaliser
