"""The engine of torch models from transformers: it reads all sequences in one pass if the architecture allows it."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Hashable
from collections.abc import Sequence as List
from contextlib import ExitStack, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from packllm.align.vocabulary import Vocabulary
from packllm.engines import base
from packllm.engines.base import Prefixes
from packllm.engines.meeting import Meeting
from packllm.engines.passes import Numbers, Passes, Row
from packllm.engines.transformers import footprint, kv, packed, quantization
from packllm.engines.transformers.adapters import Adapters
from packllm.engines.transformers.architecture import Architecture, decoder, device_of
from packllm.engines.transformers.generation import asks_for
from packllm.engines.transformers.prepacked import Prepacked
from packllm.engines.transformers.sequence import Sequence
from packllm.engines.transformers.threads import Threads
from packllm.machine import settle_threads

log = logging.getLogger("packllm")

BLOCK_BYTES = 32 * 2**20
"""Upper bound of the float32 logits that scoring holds at once, in bytes."""

PASS_TOKENS, PASS_TOKENS_ELSEWHERE = 256, 4096
"""Maximum tokens of a pass on a CPU and on an accelerator; larger passes are not faster, and make others wait."""

PACKING, PACKING_ELSEWHERE = 0.1, 0.01
"""Cost of each further token of a pass, relative to a pass over one token: decoding reads all weights for little
computation (135M parameters, float32: a pass over eight tokens takes twice as long as one over one)."""


class Engine(Passes[Sequence]):
    """Runs one transformers model for the members that share it.

    Args:
        model: a transformers causal LM.
        vocabulary: its tokenizer's.
        adapters: LoRA adapters on the model, if members use some.

    Attributes:
        architecture: how the model can be run.
        packs: whether several sequences can share a pass.
        meeting: the queue of its reads.
        forwards, tokens: number of passes over the model's weights, and of token positions in them, for tests and
            benchmarks.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, adapters: Adapters | None = None) -> None:
        settle_threads()
        self.model = model.eval().requires_grad_(False)
        self.adapters = adapters
        config = model.config.get_text_config(decoder=True)
        self.vocabulary_size = min(len(vocabulary), config.vocab_size)
        self.context_window = getattr(config, "max_position_embeddings", None)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.end_ids = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.asks = asks_for(model)
        self.device = device_of(model)
        self.place = str(self.device)
        self.size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        self.forwards = self.tokens = 0
        self._unused = torch.tensor(
            sorted(i for i in vocabulary.unused if i < self.vocabulary_size), device=self.device
        )
        self._config = config
        self._head = model.get_output_embeddings()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.architecture = Architecture.of(self.model, self.vocabulary_size)
        self._body = decoder(model) if self.architecture.whole else None
        self.packs = self.architecture.steady and packed.can_pack(
            self.model, self.vocabulary_size, self.architecture.carrier
        )
        full = kv.is_full(self.architecture.new_cache(model.config))
        self.rewinds = self.packs or (self.architecture.croppable and full)
        if not self.packs:
            log.info("%s runs sequence by sequence: its attention cannot be packed", type(model).__name__)
        on_cpu = self.device.type == "cpu"
        self.packing = PACKING if on_cpu else PACKING_ELSEWHERE
        self.most = PASS_TOKENS if on_cpu else PASS_TOKENS_ELSEWHERE
        if not (self.architecture.steady and self.architecture.blocks):  # later tokens are read one by one
            self.most = 2**31
        self.meeting = Meeting.at(self.place)
        self._threads = Threads()
        self._prepacked: Prepacked | None = None

    # The interface of an engine

    @cached_property
    def token_bytes(self) -> int:  # type: ignore[override]
        """Bytes of cache per token; computed on first use."""
        if self.architecture.carrier is None:
            return 8  # the id
        return footprint.cache_of(type(self.model), self.model.config, self.model.dtype, self.packs).token_bytes

    def open(self, adapter: int | None = None, prefixes: Prefixes | None = None) -> Sequence:
        return Sequence(self, self.meeting, adapter, prefixes if self.architecture.steady else None)

    def fingerprint(self, adapter: int | None = None) -> str:
        """Hash of configuration and a sample of every weight."""
        digest = hashlib.sha256(f"{type(self.model).__name__} {self.model.dtype}".encode())
        weights = list(self.model.named_parameters())
        if adapter is not None and self.adapters is not None:
            for name, factors in self.adapters.factors(adapter).items():
                weights += [(f"{name}.down", factors[0]), (f"{name}.up", factors[1])]
        for name, parameter in weights:
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(f"{name} {tuple(parameter.shape)} {sample.float().tolist()}".encode())
        return digest.hexdigest()

    def merged(self, adapter: int | None) -> Any:
        """The model, or a copy of it with an adapter added to its weights."""
        return self.model if adapter is None or self.adapters is None else self.adapters.merged(adapter)

    def held(self, adapter: int | None = None) -> dict[Hashable, int]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if adapter is not None and self.adapters is not None:
            tensors += [factor for pair in self.adapters.factors(adapter).values() for factor in pair]
        tensors = [part for tensor in tensors for part in quantization.parts(tensor) if not part.is_meta]
        held: dict[Hashable, int] = {
            (tensor.device, tensor.data_ptr()): tensor.numel() * tensor.element_size() for tensor in tensors
        }
        return held | ({self._prepacked: self._prepacked.size} if self._prepacked else {})

    def prepack(self) -> None:
        """Hold a second copy of the weights, with which passes over several tokens are faster on a CPU.

        Raises:
            LoadError: see Prepacked.
        """
        self._prepacked = self._prepacked or Prepacked(self.model)

    # For log-pool optimisers (base.KeepsHidden)

    def keep_hidden(self, sequence: base.Sequence) -> bool:
        assert isinstance(sequence, Sequence)
        if self._body is not None and sequence.hidden is None and not sequence.ids:
            weight = self._head.weight
            sequence.hidden = torch.empty(0, weight.shape[1], dtype=weight.dtype, device=self.device)
        return sequence.hidden is not None

    def release_hidden(self, sequence: base.Sequence) -> None:
        assert isinstance(sequence, Sequence)
        sequence.hidden = None

    def hidden(self, sequence: base.Sequence, places: Tensor) -> Tensor | None:
        assert isinstance(sequence, Sequence)
        if sequence.hidden is None or (len(places) and int(places.max()) >= len(sequence.hidden)):
            return None
        return sequence.hidden[places.to(self.device)]

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.real(self._head(hidden))

    def head(self) -> tuple[Tensor, Tensor | None, Tensor] | None:
        if self._body is None or type(self._head) is not torch.nn.Linear or self._head.weight.is_meta:
            return None
        return self._head.weight, self._head.bias, self._unused

    # One pass (see passes.py)

    def groups(self, rows: List[Row[Sequence]]) -> list[list[Row[Sequence]]]:
        return [list(rows)] if self.packs and rows else [[row] for row in rows]

    def prepare(self, sequence: Sequence) -> None:
        self.keep_hidden(sequence)

    def compute(self, rows: List[Row[Sequence]], whole: List[int], some: List[int], targets: List[int]) -> Numbers:
        count = sum(len(row.ids) for row in rows)
        threads = self._threads.of_pass(count) if self.device.type == "cpu" else nullcontext()
        layout = self._prepacked.use() if self._prepacked else nullcontext()
        with torch.inference_mode(), threads, layout:
            hidden, logits_of = self._forward(
                [row.sequence for row in rows], [row.ids for row in rows], sorted([*whole, *some])
            )
            logprobs, sound = self._logprobs(logits_of(whole)) if whole else (None, [])
            return Numbers(logprobs, sound, self._scores(logits_of, some, targets), hidden)

    def catch_up(self, sequence: Sequence) -> None:
        if sequence.cache is None:
            sequence.cache = kv.full(self._config) if self.packs else self.architecture.new_cache(self.model.config)
        if sequence.cached == len(sequence.ids):
            return
        with torch.inference_mode():
            for at in range(sequence.cached, len(sequence.ids), PASS_TOKENS_ELSEWHERE):
                block = sequence.ids[at : at + PASS_TOKENS_ELSEWHERE]
                self._forward([sequence], [block], [])
                sequence.cached += len(block)
        if not self.rewinds:
            sequence.remember()

    def scores_again(self, stored: Sequence, places: List[int], targets: List[int]) -> list[float] | None:
        hidden = stored.hidden
        if hidden is None:
            return None
        with torch.inference_mode():
            return self._scores(lambda places: self.real(self._head(hidden[places])), places, targets)

    # The model

    def _forward(
        self, sequences: List[Sequence], ids: List[List[int]], wanted: List[int]
    ) -> tuple[Tensor | None, Callable[[List[int]], Tensor]]:
        """Run ids through the model, each row after its sequence's cache, all as one row.

        Args:
            sequences: the sequences.
            ids: the ids of each.
            wanted: the places of which logits may be requested.

        Returns:
            The body's output (n, d), if logits are the head applied to it, else None; and a function from m of the
            wanted places to float32 logits (m, V).
        """
        ids_ = torch.tensor([[i for row in ids for i in row]], device=self.device)
        adapters = [sequence.adapter for sequence, row in zip(sequences, ids, strict=True) for _ in row]
        self.tokens += len(adapters)
        function = self.model if self._body is None else self._body
        with ExitStack() as stack:
            if self.adapters is not None:
                stack.enter_context(self.adapters.use(adapters))
            if self.packs:
                cache = packed.PackedCache([sequence.cache for sequence in sequences], [len(row) for row in ids])
                stack.enter_context(packed.attention(self._config, cache))
                if self.device.type == "cuda":
                    stack.enter_context(sdpa_kernel(list(packed.KERNELS)))
                starts = [sequence.cached for sequence in sequences]
                places = [start + at for start, row in zip(starts, ids, strict=True) for at in range(len(row))]
                inputs = {"position_ids": torch.tensor([places], device=self.device), "use_cache": True}
                if self._body is None and self._keeps:
                    logit_places = list(wanted) or [len(places) - 1]
                    inputs["logits_to_keep"] = torch.tensor(logit_places, device=self.device)
                output = self._call(function, input_ids=ids_, **{str(self.architecture.carrier): cache}, **inputs)
                states = output.logits[0] if self._body is None else output.last_hidden_state[0]
                if "logits_to_keep" in inputs:
                    at = {place: index for index, place in enumerate(logit_places)}
                    return None, lambda wanted: self.real(states[[at[place] for place in wanted]])
            else:
                (sequence,) = sequences
                states = self.architecture.read(function, ids_, sequence.cache, sequence.cached, self._call)[0]
        if self._body is None:
            return None, lambda wanted: self.real(states[list(wanted)])
        return states, lambda wanted: self.real(self._head(states[list(wanted)]))

    def _call(self, function: Any, **inputs: Any) -> Any:
        """Run one pass over the weights."""
        self.forwards += 1
        return function(**inputs)

    def real(self, logits: Tensor) -> Tensor:
        """float32 logits of the ids that tokenizer and model both have."""
        logits = logits[..., : self.vocabulary_size].float()
        return logits.index_fill(-1, self._unused, -torch.inf) if len(self._unused) else logits

    def _logprobs(self, logits: Tensor) -> tuple[Tensor, list[bool]]:
        normaliser = logits.logsumexp(-1, keepdim=True)
        return logits - normaliser, normaliser.isfinite()[:, 0].tolist()

    def _scores(self, logits_of: Callable[[List[int]], Tensor], places: List[int], targets: List[int]) -> list[float]:
        """The log-probability of each target after its place."""
        step = max(1, BLOCK_BYTES // (4 * self.vocabulary_size))
        scores: list[float] = []
        for at in range(0, len(places), step):
            logits = logits_of(places[at : at + step])
            target_logits = logits.gather(-1, torch.tensor(targets[at : at + step], device=logits.device)[:, None])[
                :, 0
            ]
            scores += (target_logits - logits.logsumexp(-1)).tolist()
        return scores
