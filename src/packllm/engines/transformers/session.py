"""One request's cache on one engine: rows of one member, or of several that share the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from packllm.engines.transformers import kv
from packllm.engines.transformers.prefix import Prefix
from packllm.errors import MemberError

if TYPE_CHECKING:
    from packllm.engines.transformers.member import Member

BLOCK_BYTES = 32 * 2**20
"""Most bytes of float32 logits that scoring holds at once, per member."""

PASS_TOKENS = 4096
"""Most token positions that one pass of a prefill runs: what long prompts need beside their cache stays bounded."""


class Session:
    """A batch of prompts on one engine, grown token by token.

    Prompts of different lengths are padded on the left; a mask and position ids keep the padding, and what
    rows forget on their own (see forget), without effect.

    Args:
        owners: the member that each row runs on; all share one engine.
        rows: a prompt's ids a row.

    Attributes:
        owners: as given.
        logprobs: float32 (B, V), distribution of each row's next token; set by prefill, step and extend.
        block: float32 (B, n, V), what extend returned last.
        gate: called before every pass; what it raises ends the work.
    """

    def __init__(self, owners: Sequence[Member], rows: Sequence[Sequence[int]]) -> None:
        self.owners, self.engine = list(owners), owners[0].engine
        self._lengths = [len(row) for row in rows]
        self._prompt_lengths = list(self._lengths)
        width = max(self._lengths)
        device = self.engine.device
        fill = owners[0].vocabulary.special.get("pad", 0)
        self._ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows], device=device)
        self._mask: Tensor | None = None
        if min(self._lengths) < width:
            columns = torch.arange(width, device=device)
            self._mask = (columns >= width - torch.tensor(self._lengths, device=device)[:, None]).long()
        self._cache: DynamicCache | None = kv.new(self.engine.model.config)
        self._seen, self._recording = 0, False
        self._hidden: Tensor | None = None
        self._scored: list[Tensor] = []
        self._known: Tensor | None = None
        self.gate: Callable[[], object] = lambda: None
        self.logprobs: Tensor
        self.block: Tensor
        self._sound: Tensor

    @property
    def member(self) -> Member:
        """The member of the first row: all of a session that Member.open made."""
        return self.owners[0]

    @property
    def rows(self) -> int:
        return len(self.owners)

    # The prompt: one pass fills the cache and scores

    def prefill(self, scored: Sequence[Sequence[int]], keep: bool = False) -> list[Tensor]:
        """Run the prompts once: fill the cache and score.

        Args:
            scored: for each row, ascending indices (≥ 1) of the tokens to score.
            keep: keep what logits() needs to give the logits behind the scores again.

        Returns:
            For each row float64 (n,), the log-probabilities of its scored tokens, on the CPU.
        """
        self._scored = [torch.tensor(positions, dtype=torch.long) for positions in scored]
        known = torch.full((self.rows, max(self._prompt_lengths)), torch.nan, dtype=torch.float64)
        if self._known is not None:
            known[:, : self._known.shape[1]] = self._known
        observed = [known[row, positions] for row, positions in enumerate(self._scored)]
        for columns, logits_of in self._prompt_blocks(keep):
            for row, positions in enumerate(self._scored):
                self._score(row, positions, columns, logits_of, observed[row])
        for row, positions in enumerate(self._scored):
            known[row, positions] = observed[row]
        self._known = known
        return observed

    def _prompt_blocks(self, keep: bool) -> Iterator[tuple[range, Any]]:
        """Run the prompt; yield ranges of columns with a function (row, columns) -> logits of those."""
        width, body, kept = self._ids.shape[1], self.engine.body, []
        step = max(1, (PASS_TOKENS if body is not None else self._block()) // self.rows)
        if self._hidden is not None:  # of the prefix that this session resumed
            before = self._hidden
            kept.append(before)
            yield range(self._seen), lambda row, columns: self.engine.head(before[row, columns])
        for start in range(self._seen, width, step):
            ids, stop = self._ids[:, start : start + step], min(start + step, width)
            if body is not None:
                output = self._forward(body, ids).last_hidden_state
                last = self.engine.head(output[:, -1]) if stop == width else None
            else:
                output = self._forward(self.engine.model, ids).logits
                last = output[:, -1]
            if last is not None:
                self.logprobs = self._distribution(last)
            if keep and body is not None:
                kept.append(output)

            def logits_of(row: int, columns: Tensor, output: Tensor = output, start: int = start) -> Tensor:
                part = output[row, columns - start]
                return part if body is None else self.engine.head(part)

            yield range(start, stop), logits_of
        if keep and kept:
            self._hidden = kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)

    def _score(self, row: int, positions: Tensor, columns: range, logits_of: Any, observed: Tensor) -> None:
        """Fill in the log-probabilities, where still NaN, of those positions that the given columns predict."""
        predicts = positions - 1 + self._ids.shape[1] - self._prompt_lengths[row]  # the column before each token
        inside = ((predicts >= columns.start) & (predicts < columns.stop) & observed.isnan()).nonzero()[:, 0]
        for part in inside.split(self._block()):
            with torch.inference_mode():
                logits = self.engine.real(logits_of(row, predicts[part].to(self._ids.device)))
                targets = self._ids[row, (predicts[part] + 1).to(self._ids.device)]
                chosen = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
                if chosen.isnan().any() or chosen.isposinf().any():
                    raise MemberError(self.owners[row].name, "its logits are not finite (NaN or infinity)")
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
                with torch.inference_mode():  # never around a yield: the reader would go on in it
                    logits = self.engine.real(self.engine.head(hidden[part.to(hidden.device)]))
                yield logits
            return
        # The model's own path once more, on a cache of its own, up to the last column asked for.
        again = Session([self.owners[row]], [self._ids[row, -self._prompt_lengths[row] :].tolist()])
        again.gate = self.gate
        held: list[Tensor] = []
        for columns_run, logits_of in again._prompt_blocks(keep=False):
            inside = columns[(columns >= columns_run.start) & (columns < columns_run.stop)]
            held.extend(self.engine.real(logits_of(0, inside.to(again._ids.device))))
            done = columns_run.stop > columns[-1]
            while len(held) >= step or (done and held):
                yield torch.stack(held[:step])
                del held[:step]
            if done:
                return

    def _block(self) -> int:
        return max(1, BLOCK_BYTES // (4 * self.engine.vocabulary_size))

    def release(self) -> None:
        """Let go of what logits() and snapshot() need, keep the cache."""
        self._hidden = self._known = None

    # What other prompts may start from

    @property
    def width(self) -> int:
        """Tokens of the longest prompt."""
        return self._ids.shape[1]

    @property
    def prompt(self) -> Tensor | None:
        """int64 (B, n) on the CPU, the prompts as they are read; None if some are padded."""
        return self._ids.cpu() if self._mask is None else None

    def remember(self) -> None:
        """Before the prefill: keep what snapshot() needs. Sliding windows otherwise forget what left them."""
        if self._cache is not None and kv.is_plain(self._cache):
            self._cache.activate_past_recording()

    def resume(self, prefix: Prefix, count: int) -> None:
        """Before the prefill: start from the first `count` tokens of what was read before. The prefix stays as it is.

        Args:
            prefix: of a session whose prompts begin with the same tokens on the same owners, row by row.
            count: less than the prompts' length; as Prefix.serves() says.
        """
        cache = kv.take(prefix.cache, range(self.rows))
        kv.crop(cache, prefix.ids.shape[1] - count)
        self._cache, self._seen = cache, count
        self._hidden = None if prefix.hidden is None else prefix.hidden[:, :count]
        # The token after them may be the same one too: what predicts it is not read again, so its score counts.
        known, width = prefix.logprobs[:, : count + 1], min(count + 1, len(prefix))
        self._known = known.where(prefix.ids[:, :width] == self._ids[:, :width].cpu(), torch.nan)

    def snapshot(self) -> Prefix | None:
        """What was read, after prefill(keep=True) and before anything follows; None if rows are padded.

        Tensors are shared with this session, which replaces its own and never writes into them.
        """
        prompt = self.prompt
        if self._cache is None or self._known is None or prompt is None:
            return None
        if self._hidden is None and self.engine.body is not None:
            return None
        cache = kv.take(self._cache, range(self.rows))
        if not self._recording:
            kv.forget_past(self._cache)
        return Prefix(tuple(self.owners), prompt, cache, self._hidden, self._known)

    # The answer: token by token, or in blocks

    def step(self, tokens: Sequence[int]) -> None:
        """Append one token to each row; `logprobs` is then the next distribution.

        Raises:
            MemberError: the pass failed, or a row's logits are not finite; `logprobs` of the other rows is then
                set all the same.
        """
        self.extend(torch.tensor(tokens)[:, None])

    def extend(self, tokens: Tensor) -> Tensor:
        """Append a block of tokens to each row; `logprobs` is then the distribution after the last.

        Args:
            tokens: int64 (B, n).

        Returns:
            float32 (B, n, V): log-probabilities of the token after each of them.
        """
        tokens = tokens.to(self._ids.device)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape)], dim=1)
        self._lengths = [length + tokens.shape[1] for length in self._lengths]
        return self._distribution(self._forward(self.engine.model, tokens).logits)

    def _distribution(self, logits: Tensor) -> Tensor:
        """float32 log-softmax of logits (B, V) or (B, n, V); the last of each row becomes `logprobs`."""
        logits = self.engine.real(logits)
        normaliser = logits.logsumexp(-1, keepdim=True)
        logprobs = logits - normaliser
        if logprobs.dim() == 3:
            self.block = logprobs
        self.logprobs = logprobs if logprobs.dim() == 2 else logprobs[:, -1]
        self._sound = normaliser.isfinite().flatten(1).all(1)
        self.check()
        return logprobs

    def check(self) -> None:
        """MemberError naming the owner of the first row whose last logits were NaN, +infinity or all -infinity."""
        if not self._sound.all():
            row = int((~self._sound).nonzero()[0, 0])
            raise MemberError(self.owners[row].name, "its logits are not finite (NaN or infinity)")

    def _forward(self, function: Any, tokens: Tensor) -> Any:
        if self._cache is None:
            raise MemberError(self.member.name, "this session is closed")
        self.gate()
        inputs: dict[str, Any] = {"input_ids": tokens, "past_key_values": self._cache, "use_cache": True}
        if self._mask is not None:
            seen = self._seen + tokens.shape[1]
            inputs["attention_mask"] = self._mask[:, :seen]
            if self.engine.accepts_positions:
                positions = self._mask[:, :seen].cumsum(1) - 1
                inputs["position_ids"] = positions.clamp(min=0)[:, self._seen :]
        output = self.engine.run(function, self.owners, **inputs)
        self._seen += tokens.shape[1]
        return output

    # Going back, and in several directions

    def rewindable(self) -> bool:
        """Whether the cache can drop its last tokens again (recurrent layers cannot)."""
        return self._cache is not None and self._cache.is_croppable

    def ragged(self) -> bool:
        """Whether rows can forget different numbers of tokens: sliding windows are measured in columns, which
        then no longer are tokens."""
        return self._cache is not None and kv.is_full(self._cache) and self.engine.accepts_positions

    def record(self) -> None:
        """Keep what rewind() needs from now on: sliding windows otherwise forget what left them."""
        if self._cache is not None:
            self._cache.activate_past_recording()
            self._recording = True

    def rewind(self, count: int) -> None:
        """Drop the last `count` tokens of every row from the cache.

        Raises:
            MemberError: the cache cannot be rolled back.
        """
        self.forget([count] * self.rows, count)

    def forget(self, counts: Sequence[int], common: int) -> None:
        """Drop the last counts[r] tokens of each row: `common` columns leave the cache, the rest is masked out.

        Raises:
            MemberError: the cache cannot be rolled back.
        """
        if self._cache is None or not self.rewindable():
            raise MemberError(self.member.name, "its cache cannot be rolled back")
        if common or self._recording:  # when recording, also with 0: sliding windows let go of what left them
            self._cache.crop(-common)
        self._seen -= common
        self._lengths = [length - count for length, count in zip(self._lengths, counts, strict=True)]
        if self._mask is not None:
            self._mask = self._mask[:, : self._seen]
        if any(count > common for count in counts):
            if self._mask is None:
                self._mask = torch.ones(self.rows, self._seen, dtype=torch.long, device=self._ids.device)
            masked = self._mask.clone()
            for row, count in enumerate(counts):
                masked[row, self._seen - (count - common) :] = 0
            self._mask = masked

    def fork(self, copies: int = 1) -> Session:
        """An independent session with every row repeated `copies` times; this one stays as it is."""
        return self.take([row for row in range(self.rows) for _ in range(copies)])

    def take(self, rows: Sequence[int]) -> Session:
        """An independent session over these rows, which may repeat; this one stays as it is."""
        twin = copy.copy(self)
        twin._cache = None if self._cache is None else kv.take(self._cache, rows)
        twin.owners = [self.owners[row] for row in rows]
        twin._lengths = [self._lengths[row] for row in rows]
        twin._prompt_lengths = [self._prompt_lengths[row] for row in rows]
        twin._scored = [self._scored[row] for row in rows] if self._scored else []
        index = kv.index(rows)
        twin._ids = self._ids[index]
        twin._mask = None if self._mask is None else self._mask[index]
        twin._hidden = None if self._hidden is None else self._hidden[index]
        if hasattr(self, "logprobs"):
            twin.logprobs, twin._sound = self.logprobs[index], self._sound[index]
        if hasattr(self, "block"):
            twin.block = self.block[index]
        return twin

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        if self._cache is not None:
            self.__dict__.update(self.take(rows).__dict__)

    def joinable(self) -> bool:
        """Whether join() knows every layer of the cache."""
        return self._cache is not None and kv.is_plain(self._cache)

    @classmethod
    def join(cls, sessions: Sequence[Session]) -> Session:
        """One session over all rows of several that share an engine and have read equally much; they are used up."""
        first = sessions[0]
        if len(sessions) == 1:
            return first
        joined = copy.copy(first)
        joined.owners = [owner for session in sessions for owner in session.owners]
        joined._lengths = [length for session in sessions for length in session._lengths]
        joined._prompt_lengths = [length for session in sessions for length in session._prompt_lengths]
        joined._scored, joined._hidden = [], None
        joined._ids = torch.cat([session._ids for session in sessions])
        if any(session._mask is not None for session in sessions):
            masks = [
                torch.ones(s.rows, s._seen, dtype=torch.long, device=s._ids.device) if s._mask is None else s._mask
                for s in sessions
            ]
            joined._mask = torch.cat(masks)
        if all(hasattr(session, "logprobs") for session in sessions):
            joined.logprobs = torch.cat([session.logprobs for session in sessions])
            joined._sound = torch.cat([session._sound for session in sessions])
        caches = [session._cache for session in sessions if session._cache is not None]
        joined._cache = kv.join(caches)
        for session in sessions:
            session.close()
        return joined

    def close(self) -> None:
        """Free the cache; the session cannot be used any more."""
        self._cache = None
        self._hidden = None
