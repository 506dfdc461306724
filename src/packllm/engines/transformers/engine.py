"""The engine of torch models from transformers: reads of all sequences in one pass, where the architecture allows
it."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as List
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from packllm.align.vocabulary import Vocabulary
from packllm.engines import base
from packllm.engines.base import Prefixes
from packllm.engines.meeting import Job, Meeting, Packs, Part
from packllm.engines.prefix import MINIMUM
from packllm.engines.transformers import kv, packed
from packllm.engines.transformers.adapters import Adapters
from packllm.engines.transformers.architecture import Architecture, decoder
from packllm.engines.transformers.generation import asks_for
from packllm.engines.transformers.sequence import Sequence
from packllm.machine import settle_threads

log = logging.getLogger("packllm")

BLOCK_BYTES = 32 * 2**20
"""Most bytes of float32 logits that scoring holds at once."""

PASS_TOKENS, PASS_TOKENS_ELSEWHERE = 256, 4096
"""Most tokens of a pass on a CPU and on an accelerator; larger ones are not faster, and keep others waiting."""

PACKING, PACKING_ELSEWHERE = 0.1, 0.01
"""What each further token adds to a pass over one: decoding reads all weights to compute little (135M parameters,
float32: a pass over eight tokens takes twice one over one)."""

NOT_FINITE = "its logits are not finite (NaN or infinity)"


@dataclass(eq=False)
class _Row:
    """What one sequence reads in a pass."""

    sequence: Sequence
    parts: list[Part] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [i for part in self.parts for i in part.ids]


class Engine(Packs):
    """Runs one transformers model for the members that share it.

    Args:
        model: a transformers causal LM.
        vocabulary: its tokenizer's.
        adapters: LoRA adapters attached to the model, if members choose among some.

    Attributes:
        architecture: how the model can be run.
        packs: whether several sequences run in one pass.
        meeting: where reads wait.
        forwards, tokens: passes over the model's weights and token positions put through them, for tests and
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
        self.device: torch.device = model.device
        self.place = str(self.device)
        self.size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        self.token_bytes = _token_bytes(config) * model.dtype.itemsize
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
        if not (self.architecture.steady and self.architecture.blocks):  # blocks after the first are read one by one
            self.most = 2**31
        self.meeting = Meeting.at(self.place)

    # What an engine does

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

    # What log-pool optimisers ask for (base.KeepsHidden)

    def keep_hidden(self, sequence: base.Sequence) -> bool:
        assert isinstance(sequence, Sequence)
        if self._body is not None and sequence.hidden is None and not sequence.ids:
            weight = self._head.weight
            sequence.hidden = torch.empty(0, weight.shape[1], dtype=weight.dtype, device=weight.device)
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
        if self._body is None or type(self._head) is not torch.nn.Linear:
            return None
        return self._head.weight, self._head.bias, self._unused

    # One pass

    def run(self, parts: List[Part]) -> None:
        """Take the jobs on by their parts. A pass that fails is tried again for each sequence by itself, for the
        fault may be another request's."""
        rows = self._rows(parts)
        for group in [rows] if self.packs and rows else [[row] for row in rows]:
            try:
                self._pass(group)
            except BaseException as error:
                for row in group:
                    row.sequence.lose()
                if not isinstance(error, Exception):
                    raise  # an interrupt: what others asked for is read again
                for row in group:
                    self._alone(row, error if len(group) == 1 else None)

    def _alone(self, row: _Row, error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            self._pass([row])
        except Exception as own:
            row.sequence.lose()
            for part in row.parts:
                part.job.answer = own

    def _rows(self, parts: List[Part]) -> list[_Row]:
        rows: dict[int, _Row] = {}
        for part in parts:
            sequence = part.sequence
            assert isinstance(sequence, Sequence)
            if sequence.closed:
                part.job.answer = ValueError("this sequence is closed")
            elif not part.count:
                part.job.take(0, self._nothing(part))
            else:
                if id(sequence) not in rows:
                    part = self._resumed(sequence, part)
                if part.count:
                    rows.setdefault(id(sequence), _Row(sequence)).parts.append(part)
        return list(rows.values())

    def _nothing(self, part: Part) -> Tensor:
        return torch.empty(0, self.vocabulary_size) if part.targets is None else torch.empty(0, dtype=torch.float64)

    def _pass(self, rows: List[_Row]) -> None:
        """Run the rows, one where nothing is packed, and give their jobs what they want."""
        for row in rows:
            self._catch_up(row.sequence)
        whole: list[
            int
        ] = []  # places of the pass after which all log-probabilities are wanted, or those of some tokens
        some: list[int] = []
        targets: list[int] = []
        at = 0
        for part in (part for row in rows for part in row.parts):
            if part.targets is None:
                whole += [at + place for place in part.places]
            else:
                some += [at + place for place in part.places]
                targets += [part.targets[place] for place in part.places]
            at += part.count
        with torch.inference_mode():
            hidden, logits_of = self._forward(
                [row.sequence for row in rows], [row.ids for row in rows], sorted(whole + some)
            )
            logprobs, sound = self._logprobs(logits_of(whole)) if whole else (None, [])
            scores = self._scores(logits_of, some, targets)
        self._hand_out(rows, logprobs, sound, scores, hidden)

    def _hand_out(
        self, rows: List[_Row], logprobs: Tensor | None, sound: list[bool], scores: list[float], hidden: Tensor | None
    ) -> None:
        whole = some = at = 0
        for row in rows:
            for part, later in zip_longest(row.parts, row.parts[1:]):
                job, sequence, count, ids = part.job, row.sequence, len(part.places), part.ids
                if part.targets is None:
                    job.take(part.count, self._nothing(part) if logprobs is None else logprobs[whole : whole + count])
                    faulty = not all(sound[whole : whole + count])
                    whole += count
                else:
                    given = torch.full((part.count,), torch.nan, dtype=torch.float64)
                    given[part.places] = torch.tensor(scores[some : some + count], dtype=torch.float64)
                    faulty = any(math.isnan(score) or score == math.inf for score in scores[some : some + count])
                    some += count
                    self._note(sequence, job, given, -1 if later is None else later.ids[0])
                    job.take(part.count, given)
                if faulty:
                    job.answer = FloatingPointError(NOT_FINITE)
                if sequence.hidden is not None and hidden is not None:
                    sequence.hidden = torch.cat([sequence.hidden, hidden[at : at + part.count]])
                sequence.ids += ids
                sequence.cached += len(ids)
                at += part.count
                if part.targets is None and job.answer is not None:
                    self._keep(sequence)
            if not self.rewinds and not row.sequence.remembers:
                row.sequence.remember()

    def _keep(self, sequence: Sequence) -> None:
        """Keep a prompt that has been read, once."""
        prefixes, sequence.prefixes = sequence.prefixes, None
        if prefixes is not None and len(sequence.ids) >= MINIMUM:
            kept = sequence.fork()
            prefixes.keep(sequence.adapter, kept, kept.nbytes())

    def _note(self, sequence: Sequence, job: Job, given: Tensor, later: int) -> None:
        """Remember what a prompt's own next ids were given, for prompts that begin alike; `later` follows its read."""
        if len(sequence.known) == len(sequence.ids):
            following = [*job.read.ids[job.done + 1 :][: len(given)], later][: len(given)]
            targets = list(job.read.want)[job.done :][: len(given)]
            own = torch.tensor([one == other for one, other in zip(following, targets, strict=True)], dtype=torch.bool)
            sequence.known = torch.cat([sequence.known, given.where(own, torch.nan)])

    def _catch_up(self, sequence: Sequence) -> None:
        """Read again what the cache lacks of the ids."""
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

    def _resumed(self, sequence: Sequence, part: Part) -> Part:
        """Let a sequence that has read nothing start from the longest kept one that begins alike; what is left of its
        part."""
        job = part.job
        if sequence.ids or sequence.prefixes is None or job.done or job.read.want == "all":
            return part
        self.keep_hidden(sequence)
        count = 0
        if found := sequence.prefixes.longest(self, sequence.adapter, job.read.ids):
            kept, count = found[0].fork(), found[1]
            assert isinstance(kept, Sequence)
            count = min(count, len(job.read.ids) - (part.targets is None))
            given, count = self._scores_kept(kept, job, count)
            if kept.cache is None or count < MINIMUM or (not self.rewinds and count != len(kept.ids)):
                count = 0
            else:
                kept.crop(count)
                sequence.cache, sequence.cached, sequence.ids = kept.cache, count, kept.ids
                sequence.known, sequence.hidden = given if part.targets is not None else kept.known[:count], kept.hidden
                sequence.cached_tokens = count
                kept.cache = None
                job.take(count, self._nothing(part) if part.targets is None else given)
            kept.close()
        sequence.prefixes.note(count)
        return Part(job, min(part.count, job.left))

    def _scores_kept(self, kept: Sequence, job: Job, count: int) -> tuple[Tensor, int]:
        """What a kept sequence tells of the first targets, and of how many of `count` ids it tells all that is
        wanted."""
        if isinstance(job.read.want, str):
            return kept.known[:count], count
        targets = list(job.read.want)[:count]
        given = torch.full((count,), torch.nan, dtype=torch.float64)
        known = kept.known[:count]
        same = [one == other for one, other in zip(kept.ids[1 : len(known) + 1], targets, strict=False)]
        given[: len(same)] = known[: len(same)].where(torch.tensor(same, dtype=torch.bool), torch.nan)
        missing = [place for place, target in enumerate(targets) if target >= 0 and given[place].isnan()]
        if missing and kept.hidden is not None:
            hidden = kept.hidden
            wanted = [targets[place] for place in missing]
            with torch.inference_mode():
                scores = self._scores(lambda places: self.real(self._head(hidden[places])), missing, wanted)
            given[missing] = torch.tensor(scores, dtype=torch.float64)
        elif missing:
            count = missing[0]
        return given[:count], count

    # The model

    def _forward(
        self, sequences: List[Sequence], ids: List[List[int]], wanted: List[int]
    ) -> tuple[Tensor | None, Callable[[List[int]], Tensor]]:
        """Put ids through the model after what each sequence's cache holds, all in one row.

        Returns:
            The body's output (n, d), where logits are the head of it, and float32 logits (m, V) at m of the places
            wanted.
        """
        ids_ = torch.tensor([[i for row in ids for i in row]], device=self.device)
        chosen = [sequence.adapter for sequence, row in zip(sequences, ids, strict=True) for _ in row]
        self.tokens += len(chosen)
        function = self.model if self._body is None else self._body
        with ExitStack() as stack:
            if self.adapters is not None:
                stack.enter_context(self.adapters.use(chosen))
            if self.packs:
                cache = packed.PackedCache([sequence.cache for sequence in sequences], [len(row) for row in ids])
                stack.enter_context(packed.attention(self._config, cache))
                if self.device.type == "cuda":
                    stack.enter_context(sdpa_kernel(list(packed.KERNELS)))
                starts = [sequence.cached for sequence in sequences]
                places = [start + at for start, row in zip(starts, ids, strict=True) for at in range(len(row))]
                inputs = {"position_ids": torch.tensor([places], device=self.device), "use_cache": True}
                if self._body is None and self._keeps:
                    kept = list(wanted) or [len(places) - 1]
                    inputs["logits_to_keep"] = torch.tensor(kept, device=self.device)
                output = self._call(function, input_ids=ids_, **{str(self.architecture.carrier): cache}, **inputs)
                states = output.logits[0] if self._body is None else output.last_hidden_state[0]
                if "logits_to_keep" in inputs:
                    at = {place: index for index, place in enumerate(kept)}
                    return None, lambda wanted: self.real(states[[at[place] for place in wanted]])
            else:
                (sequence,) = sequences
                states = self.architecture.read(function, ids_, sequence.cache, sequence.cached, self._call)[0]
        if self._body is None:
            return None, lambda wanted: self.real(states[list(wanted)])
        return states, lambda wanted: self.real(self._head(states[list(wanted)]))

    def _call(self, function: Any, **inputs: Any) -> Any:
        """One pass over the weights."""
        self.forwards += 1
        return function(**inputs)

    def real(self, logits: Tensor) -> Tensor:
        """float32 logits of the ids that tokenizer and model share."""
        logits = logits[..., : self.vocabulary_size].float()
        return logits.index_fill(-1, self._unused, -torch.inf) if len(self._unused) else logits

    def _logprobs(self, logits: Tensor) -> tuple[Tensor, list[bool]]:
        normaliser = logits.logsumexp(-1, keepdim=True)
        return logits - normaliser, normaliser.isfinite()[:, 0].tolist()

    def _scores(self, logits_of: Callable[[List[int]], Tensor], places: List[int], targets: List[int]) -> list[float]:
        """log p of each target after its place."""
        step = max(1, BLOCK_BYTES // (4 * self.vocabulary_size))
        scores: list[float] = []
        for at in range(0, len(places), step):
            logits = logits_of(places[at : at + step])
            chosen = logits.gather(-1, torch.tensor(targets[at : at + step], device=logits.device)[:, None])[:, 0]
            scores += (chosen - logits.logsumexp(-1)).tolist()
        return scores


def _token_bytes(config: Any) -> int:
    """Numbers of keys and values that all layers keep of a token, going by the usual names; where sizes differ between
    layers (Gemma 4) as many as the hidden states have."""
    try:
        heads = getattr(config, "num_attention_heads", 0)
        size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
        width = size * (getattr(config, "num_key_value_heads", None) or heads)
    except Exception:  # transformers refuses to tell one number where there are several
        width = getattr(config, "hidden_size", 0)
    return 2 * config.num_hidden_layers * width
