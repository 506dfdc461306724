"""One model in memory: what members that are adapters of the same base share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.engines.transformers.adapters import Adapters
from packllm.engines.transformers.architecture import Architecture, decoder
from packllm.errors import MemberError

if TYPE_CHECKING:
    from packllm.engines.transformers.member import Member


class Engine:
    """Runs one transformers model, one pass at a time, for the members that share it.

    Args:
        model: a transformers causal LM.
        vocabulary: its tokenizer's.
        adapters: LoRA adapters attached to the model, if members choose among some.

    Attributes:
        body, head: the decoder and the LM head, where logits are head(body(ids)); body is None elsewhere.
        vocabulary_size: ids that model and tokenizer both have; logits are cut to them, so padding rows
            of the model never carry mass.
        architecture: how the model can be run.
        forwards: passes over the model's weights, for tests and benchmarks.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, adapters: Adapters | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.adapters = adapters
        self.vocabulary_size = min(len(vocabulary), model.config.get_text_config(decoder=True).vocab_size)
        self.architecture = Architecture.of(self.model, self.vocabulary_size, vocabulary.special.get("pad", 0))
        self.forwards = 0
        self._lock = threading.Lock()
        self._unused = torch.tensor(sorted(i for i in vocabulary.unused if i < self.vocabulary_size))
        self.body = decoder(model) if self.architecture.whole else None
        self.head = model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def run(self, function: Callable[..., Any], owners: Sequence[Member], **inputs: Any) -> Any:
        """One forward pass, counted, alone on this model (some keep state, as in dynamic rotary scaling).

        Args:
            function: the model or its body.
            owners: the member of each row.
            inputs: of the function; input_ids is (rows, n).

        Raises:
            MemberError: the pass failed; it names the owners.
        """
        chosen = [owner.adapter for owner in owners]
        members = dict.fromkeys(owners)
        with self._lock, torch.inference_mode():
            self.forwards += 1
            for member in members:
                member.forwards += 1
                member.tokens += owners.count(member) * inputs["input_ids"].shape[1]
            try:
                with self.adapters.use(chosen) if self.adapters else nullcontext():
                    return function(**inputs)
            except Exception as error:
                names = "+".join(member.name for member in members)
                raise MemberError(names, f"{type(error).__name__}: {error}") from error

    def real(self, logits: Tensor) -> Tensor:
        """float32 logits of the ids that tokenizer and model share."""
        logits = logits[..., : self.vocabulary_size].float()
        if len(self._unused):
            logits = logits.index_fill(-1, self._unused.to(logits.device), -torch.inf)
        return logits
