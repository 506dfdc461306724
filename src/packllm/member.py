"""A member of a pack: one model with its tokenizer, and a request's cache on it."""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from packllm.align.vocabulary import Vocabulary
from packllm.errors import MemberError
from packllm.prompt import Encoder

BLOCK_BYTES = 32 * 2**20
"""Most bytes of float32 logits that scoring holds at once, per member."""

_whole_heads: dict[str, bool] = {}
"""Whether logits are the head applied to the body's output, by architecture and configuration: the weights
play no part, so members of one kind are tried once."""


class Member:
    """A causal language model and its tokenizer, ready to open sessions.

    Args:
        model: a transformers causal LM in eval mode.
        tokenizer: its tokenizer, with a `tokenizers` backend.
        name: what tables and weights call it.

    Attributes:
        vocabulary: bytes of each token id.
        vocabulary_size: ids that model and tokenizer both have; logits are cut to them, so padding rows
            of the model never carry mass.
        context_window: most tokens the model reads, None if it has no limit.
        end_ids: ids that end an answer.
        forwards, tokens: forward passes run and token positions put through them, for tests and benchmarks.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "member", encoder: Encoder | None = None) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.encoder = encoder or Encoder(tokenizer)
        self.vocabulary: Vocabulary = self.encoder.vocabulary
        config = model.config.get_text_config(decoder=True)
        self.vocabulary_size = min(len(self.vocabulary), config.vocab_size)
        self.context_window: int | None = getattr(config, "max_position_embeddings", None)
        self.end_ids = self._find_end_ids()
        self.forwards = self.tokens = 0
        self._lock = threading.Lock()
        self._unused = torch.tensor(sorted(i for i in self.vocabulary.unused if i < self.vocabulary_size))
        body = model.get_decoder() if hasattr(model, "get_decoder") else None
        self._body = body if body is not model else None
        self._head = model.get_output_embeddings()
        self._accepts_positions = "position_ids" in inspect.signature(model.forward).parameters
        kind = f"{type(model).__name__} {model.config.to_json_string()}"
        if kind not in _whole_heads:
            _whole_heads[kind] = self._head_is_whole()
        if not _whole_heads[kind]:
            self._body = None

    def __repr__(self) -> str:
        return f"Member({self.name!r})"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def fingerprint(self) -> str:
        """Hash of configuration, vocabulary and a sample of every weight: changes with the answers."""
        digest = hashlib.sha256(self.vocabulary.fingerprint.encode())
        digest.update(f"{type(self.model).__name__} {self.model.dtype} {self.encoder.template}".encode())
        for name, parameter in self.model.named_parameters():
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
            digest.update(f"{name} {tuple(parameter.shape)} {sample.float().tolist()}".encode())
        return digest.hexdigest()

    def open(self, rows: Sequence[Sequence[int]]) -> Session:
        """A session over one or more prompts given as ids; nothing runs yet."""
        return Session(self, rows)

    def _find_end_ids(self) -> frozenset[int]:
        configured = getattr(self.model, "generation_config", None)
        ends = getattr(configured, "eos_token_id", None)
        ids = {ends} if isinstance(ends, int) else set(ends or ())
        ids |= {self.vocabulary.special.get("eos"), self.encoder.end_of_turn}
        return frozenset(i for i in ids if i is not None)

    def _head_is_whole(self) -> bool:
        """Try the head on the body's output against the model's own logits: some models cap or scale them after."""
        if self._body is None or self._head is None:
            return False
        ids = torch.arange(1, min(9, self.vocabulary_size), device=self.device)[None]
        with torch.inference_mode():
            try:
                own = self.model(input_ids=ids, use_cache=False).logits
                ours = self._head(self._body(input_ids=ids, use_cache=False).last_hidden_state)
            except Exception:  # a body with other arguments: the model's own path always works
                return False
        return own.shape == ours.shape and torch.allclose(own.float(), ours.float(), atol=1e-4, rtol=1e-4)

    def run(self, function: Any, **inputs: Any) -> Any:
        """One forward pass, counted, alone on this model (some keep state, as in dynamic rotary scaling)."""
        with self._lock, torch.inference_mode():
            self.forwards += 1
            self.tokens += inputs["input_ids"].numel()
            try:
                return function(**inputs)
            except Exception as error:
                raise MemberError(self.name, f"{type(error).__name__}: {error}") from error

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

    def real(self, logits: Tensor) -> Tensor:
        """float32 logits of the ids that tokenizer and model share."""
        logits = logits[..., : self.vocabulary_size].float()
        if len(self._unused):
            logits = logits.index_fill(-1, self._unused.to(logits.device), -torch.inf)
        return logits


class Session:
    """One request's cache on one member: a batch of prompts, grown token by token.

    Prompts of different lengths are padded on the left; a mask and position ids keep the padding without
    effect.

    Attributes:
        logprobs: float32 (B, V), distribution of each row's next token; set by prefill and step.
    """

    def __init__(self, member: Member, rows: Sequence[Sequence[int]]) -> None:
        self.member = member
        self._lengths = [len(row) for row in rows]
        self._prompt_lengths = list(self._lengths)
        width = max(self._lengths)
        device = member.device
        fill = member.vocabulary.special.get("pad", 0)
        self._ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)
        self._mask: Tensor | None = None
        if min(self._lengths) < width:
            columns = torch.arange(width, device=device)
            self._mask = (columns >= width - torch.tensor(self._lengths, device=device)[:, None]).long()
        self._cache: DynamicCache | None = DynamicCache(config=member.model.config)
        self._seen = 0
        self._hidden: Tensor | None = None
        self.logprobs: Tensor

    @property
    def rows(self) -> int:
        return len(self._lengths)

    def prefill(self, scored: Sequence[Sequence[int]], keep: bool = False) -> list[Tensor]:
        """Run the prompts once: fill the cache and score.

        Args:
            scored: for each row, ascending indices (≥ 1) of the tokens to score.
            keep: keep what logits() needs to give the logits behind the scores again.

        Returns:
            For each row float64 (n,), the log-probabilities of its scored tokens, on the CPU.
        """
        observed = [torch.empty(len(positions), dtype=torch.float64) for positions in scored]
        wanted = [torch.tensor(positions, dtype=torch.long) for positions in scored]
        self._scored = wanted
        for start, logits_of in self._prompt_blocks(keep):
            for row, positions in enumerate(wanted):
                self._score(row, positions, start, logits_of, observed[row])
        return observed

    def _prompt_blocks(self, keep: bool) -> Iterator[tuple[range, Any]]:
        """Run the prompt; yield ranges of columns with a function (row, columns) -> logits of those."""
        width = self._ids.shape[1]
        if self.member._body is not None:
            hidden = self._forward(self.member._body, self._ids).last_hidden_state
            self.logprobs = self.member.logprobs(self.member._head(hidden[:, -1]))
            if keep:
                self._hidden = hidden
            yield range(width), lambda row, columns: self.member._head(hidden[row, columns])
            return
        step = max(1, self._block() // self.rows)
        for start in range(0, width, step):
            logits = self._forward(self.member.model, self._ids[:, start : start + step]).logits
            self.logprobs = self.member.logprobs(logits[:, -1])
            yield (
                range(start, min(start + step, width)),
                lambda row, columns, logits=logits, start=start: logits[row, columns - start],
            )

    def _score(self, row: int, positions: Tensor, columns: range, logits_of: Any, observed: Tensor) -> None:
        """Fill in the log-probabilities of those positions that the given columns predict."""
        predicts = positions - 1 + self._ids.shape[1] - self._lengths[row]  # the column before each token
        inside = ((predicts >= columns.start) & (predicts < columns.stop)).nonzero()[:, 0]
        for part in inside.split(self._block()):
            with torch.inference_mode():
                logits = self.member.real(logits_of(row, predicts[part].to(self._ids.device)))
                targets = self._ids[row, (predicts[part] + 1).to(self._ids.device)]
                chosen = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
                if chosen.isnan().any() or chosen.isposinf().any():
                    raise MemberError(self.member.name, "its logits are not finite (NaN or infinity)")
                observed[part] = chosen.double().cpu()

    def logits(self, row: int, which: Tensor, step: int) -> Iterator[Tensor]:
        """Logits behind the scores of prefill(keep=True), in blocks; may be asked for again.

        Args:
            row: row of the batch.
            which: ascending indices into that row's scored positions.
            step: positions a block; the last one may be shorter.

        Yields:
            float32 (step, V), the logits that predicted those tokens.
        """
        columns = self._scored[row][which] - 1  # the index of the token before each
        if self._hidden is not None:
            hidden = self._hidden[row, -self._prompt_lengths[row] :]
            for part in columns.split(step):
                with torch.inference_mode():
                    yield self.member.real(self.member._head(hidden[part.to(hidden.device)]))
            return
        # The model's own path once more, on a cache of its own, up to the last column asked for.
        again = Session(self.member, [self._ids[row, -self._prompt_lengths[row] :].tolist()])
        held: list[Tensor] = []
        for columns_run, logits_of in again._prompt_blocks(keep=False):
            inside = columns[(columns >= columns_run.start) & (columns < columns_run.stop)]
            held.extend(self.member.real(logits_of(0, inside.to(again._ids.device))))
            done = columns_run.stop > columns[-1]
            while len(held) >= step or (done and held):
                yield torch.stack(held[:step])
                del held[:step]
            if done:
                return

    def _block(self) -> int:
        return max(1, BLOCK_BYTES // (4 * self.member.vocabulary_size))

    def release(self) -> None:
        """Let go of what logits() needs, keep the cache."""
        self._hidden = None

    def step(self, tokens: Sequence[int]) -> None:
        """Append one token to each row; `logprobs` is then the next distribution."""
        self.logprobs = self.extend(torch.tensor(tokens)[:, None])[:, -1]

    def extend(self, tokens: Tensor) -> Tensor:
        """Append a block of tokens to each row.

        Args:
            tokens: int64 (B, n).

        Returns:
            float32 (B, n, V): log-probabilities of the token after each of them.
        """
        tokens = tokens.to(self._ids.device)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape)], dim=1)
        self._lengths = [length + tokens.shape[1] for length in self._lengths]
        return self.member.logprobs(self._forward(self.member.model, tokens).logits)

    def _forward(self, function: Any, tokens: Tensor) -> Any:
        if self._cache is None:
            raise MemberError(self.member.name, "this session is closed")
        inputs: dict[str, Any] = {"input_ids": tokens, "past_key_values": self._cache, "use_cache": True}
        if self._mask is not None:
            seen = self._seen + tokens.shape[1]
            inputs["attention_mask"] = self._mask[:, :seen]
            if self.member._accepts_positions:
                positions = self._mask[:, :seen].cumsum(1) - 1
                inputs["position_ids"] = positions.clamp(min=0)[:, self._seen :]
        output = self.member.run(function, **inputs)
        self._seen += tokens.shape[1]
        return output

    def rewindable(self) -> bool:
        """Whether the cache can drop its last tokens again (recurrent layers cannot)."""
        return self._cache is not None and self._cache.is_croppable

    def record(self) -> None:
        """Keep what rewind() needs from now on: sliding windows otherwise forget what left them."""
        if self._cache is not None:
            self._cache.activate_past_recording()

    def rewind(self, count: int) -> None:
        """Drop the last `count` tokens of every row from the cache.

        Raises:
            MemberError: the cache cannot be rolled back.
        """
        if self._cache is None or not self.rewindable():
            raise MemberError(self.member.name, "its cache cannot be rolled back")
        self._cache.crop(-count)
        self._seen -= count
        self._lengths = [length - count for length in self._lengths]
        if self._mask is not None:
            self._mask = self._mask[:, : self._seen]

    def fork(self, copies: int = 1) -> Session:
        """An independent session with every row repeated `copies` times; this one stays as it is."""
        twin = copy.copy(self)
        twin._cache = copy.deepcopy(self._cache)
        twin._hidden = None
        if copies > 1:
            assert twin._cache is not None
            twin._cache.batch_repeat_interleave(copies)
            twin._lengths = [length for length in self._lengths for _ in range(copies)]
            twin._mask = None if self._mask is None else self._mask.repeat_interleave(copies, 0)
            twin.logprobs = self.logprobs.repeat_interleave(copies, 0)
        return twin

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        if self._cache is None:
            return
        index = torch.tensor(rows, device=self._ids.device)
        self._cache.batch_select_indices(index)
        self._lengths = [self._lengths[row] for row in rows]
        self.logprobs = self.logprobs[index.to(self.logprobs.device)]
        if self._mask is not None:
            self._mask = self._mask[index]

    def close(self) -> None:
        """Free the cache; the session cannot be used any more."""
        self._cache = None
        self._hidden = None
