"""One model in memory: what members that are adapters of the same base share."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.engines.transformers.adapters import Adapters
from packllm.errors import MemberError

if TYPE_CHECKING:
    from packllm.engines.transformers.member import Member

_whole_heads: dict[str, bool] = {}
"""Whether logits are the head applied to the body's output, by architecture and configuration: the weights
play no part, so models of one kind are tried once."""


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
        accepts_positions: whether the model reads position ids.
        forwards: passes over the model's weights, for tests and benchmarks.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, adapters: Adapters | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.adapters = adapters
        self.vocabulary_size = min(len(vocabulary), model.config.get_text_config(decoder=True).vocab_size)
        self.accepts_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.forwards = 0
        self._lock = threading.Lock()
        self._unused = torch.tensor(sorted(i for i in vocabulary.unused if i < self.vocabulary_size))
        body = model.get_decoder() if hasattr(model, "get_decoder") else None
        self.body = body if body is not model else None
        self.head = model.get_output_embeddings()
        kind = f"{type(model).__name__} {model.config.to_json_string()}"
        if kind not in _whole_heads:
            _whole_heads[kind] = self._head_is_whole()
        if not _whole_heads[kind]:
            self.body = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _head_is_whole(self) -> bool:
        """Try the head on the body's output against the model's own logits: some models cap or scale them after."""
        if self.body is None or self.head is None:
            return False
        ids = torch.arange(1, min(9, self.vocabulary_size), device=self.device)[None]
        with torch.inference_mode():
            try:
                own = self.model(input_ids=ids, use_cache=False).logits
                ours = self.head(self.body(input_ids=ids, use_cache=False).last_hidden_state)
            except Exception:  # a body with other arguments: the model's own path always works
                return False
        return own.shape == ours.shape and torch.allclose(own.float(), ours.float(), atol=1e-4, rtol=1e-4)

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
