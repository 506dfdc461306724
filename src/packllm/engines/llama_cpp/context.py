"""A context of llama.cpp: cells of keys and values for all sequences of one adapter."""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence as List
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packllm.engines.llama_cpp.model import Model

BLOCK = 64
"""Tokens of one llama_decode, and rows of logits that it may give: they are held twice, 64 MB where V is 128k. Larger
blocks were not faster on CPUs (131, 126, 117 and 126 tokens/s at 64, 128, 256 and 512)."""

FIRST = 512
"""Cells that a context has at first. They are taken when it is made, so it is not made for a whole window, but made
again, twice as large, where it is full."""

SLOTS = 64
"""Sequences that have cells at a time; of more, those that were used least lately wait beside the context."""


class State:
    """What a context keeps of one sequence: cells under the number `slot`, or a copy of them in `data`.

    Attributes:
        length: ids that count.
        filled: ids that the cells or the copy are of; those behind `length` go before it is used again.
    """

    def __init__(self, context: Context, data: Any = None, length: int = 0) -> None:
        self.context, self.data, self.length = context, data, length
        self.filled = length
        self.slot: int | None = None
        self.used = 0

    def __del__(self) -> None:
        if self.slot is not None and sys is not None and not sys.is_finalizing():
            self.context.leave(self.slot)

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else len(self.data)


class Context:
    """Cells for the sequences of one adapter. Methods may be called from several threads.

    Args:
        adapter: as Model.attach gave it; None for the weights as they are.

    Attributes:
        cells: how many there are.
        kind: llama.cpp's type of keys and values: 1, 16 bits.
        forwards, tokens: calls of llama_decode and tokens that it read.
    """

    def __init__(self, model: Model, adapter: Any, threads: int) -> None:
        self._model, self._adapter, self._threads = model, adapter, threads
        self._native = model.native
        self._pointer: Any = None
        self._batch: Any = None
        self._lock = threading.Lock()
        self._free = list(range(SLOTS))
        self._left: deque[int] = deque()  # slots that nobody holds any more, and whose cells are still full
        self._live: dict[int, weakref.ref[State]] = {}
        self._clock = 0
        self.cells = self.forwards = self.tokens = 0
        self.kind = 1

    def __del__(self) -> None:
        if sys is not None and not sys.is_finalizing():
            self._close()
            if self._batch is not None:
                self._native.llama_batch_free(self._batch)

    # What a sequence does

    def leave(self, slot: int) -> None:
        """Nobody holds a slot any more. It is emptied now, or before the next pass where one runs: this may be called
        from anywhere, in the middle of a pass too."""
        self._left.append(slot)
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()

    def fork(self, state: State) -> State:
        """A state of the same ids. Cells are shared, as long as there are slots."""
        with self._lock:
            self._sweep()
            twin = State(self, state.data, state.length)
            twin.filled = state.filled
            if state.slot is None:
                return twin
            if not self._free:
                return self._copied(state)
            self._trim(state)
            twin.filled = state.filled
            self._seat(twin)
            self._native.llama_memory_seq_cp(self._memory(), state.slot, twin.slot, -1, -1)
            return twin

    def copied(self, state: State) -> State:
        """A copy beside the context: it takes no cells, over which the attention of all others would run."""
        with self._lock:
            self._sweep()
            return self._copied(state)

    def decode(self, states: List[State], ids: List[int], wanted: List[int], least: int) -> Tensor:
        """Let each id, at most BLOCK of them, follow what its state holds.

        Args:
            states: of each id.
            wanted: places after which logits are wanted, ascending.
            least: cells that these sequences will need in all, if there are too few now.

        Returns:
            float32 (m, n), logits of all ids of the model at the places wanted, until decode() is called again.

        Raises:
            RuntimeError: llama.cpp fails.
        """
        with self._lock:
            self._sweep()
            if self._pointer is None:
                self._open(max(FIRST, _power(least)))
            self._clock += 1
            for state in states:
                state.used = self._clock
            for state in dict.fromkeys(states):
                self._enter(state)
            batch = self._filled(states, ids, wanted)
            while (code := self._native.llama_decode(self._pointer, batch)) == 1:  # no room for the keys and values
                self._grow(least)
            if code:
                raise RuntimeError(f"llama.cpp cannot read these {len(ids)} tokens (llama_decode gives {code})")
            self.forwards += 1
            self.tokens += len(ids)
            for state in states:
                state.length += 1
                state.filled += 1
            if not wanted:
                return torch.empty(0, self._model.vocabulary_size)
            found = self._native.llama_get_logits(self._pointer)
            return torch.from_numpy(np.ctypeslib.as_array(found, (len(wanted), self._model.vocabulary_size)))

    # Slots

    def _sweep(self) -> None:
        """Empty the slots that were left. A context that has grown goes with the last one."""
        while self._left:
            slot = self._left.popleft()
            self._live.pop(slot, None)
            self._free.append(slot)
            if self._pointer is not None:
                self._native.llama_memory_seq_rm(self._memory(), slot, -1, -1)
        if not self._live and self.cells > FIRST:
            self._close()

    def _seat(self, state: State) -> None:
        """Give a state a free slot."""
        state.slot = self._free.pop()
        self._live[state.slot] = weakref.ref(state)

    def _enter(self, state: State) -> None:
        """Make sure that a state has a slot, with just the cells that count."""
        if state.slot is None:
            if not self._free:
                self._sweep()
            if not self._free:
                self._make_way()
            self._seat(state)
            if state.data is not None:
                self._restore(state)
        self._trim(state)

    def _make_way(self) -> None:
        """Copy the state that was used least lately, and take its slot."""
        live = [state for ref in self._live.values() if (state := ref()) is not None]
        oldest = min(live, key=lambda state: state.used)
        copy = self._copied(oldest)
        slot, oldest.slot = oldest.slot, None
        oldest.data, oldest.filled = copy.data, copy.filled
        assert slot is not None
        self._left.append(slot)
        self._sweep()

    def _trim(self, state: State) -> None:
        if state.filled > state.length:
            if not self._native.llama_memory_seq_rm(self._memory(), state.slot, state.length, -1):
                raise RuntimeError("llama.cpp cannot take back what this model has read")
            state.filled = state.length

    def _copied(self, state: State) -> State:
        if state.slot is None:
            twin = State(self, state.data, state.length)
            twin.filled = state.filled
            return twin
        self._trim(state)
        size = self._native.llama_state_seq_get_size(self._pointer, state.slot)
        data = (ctypes.c_uint8 * size)()
        if self._native.llama_state_seq_get_data(self._pointer, data, size, state.slot) != size:
            raise RuntimeError("llama.cpp cannot copy what this model has read")
        return State(self, data, state.length)

    def _restore(self, state: State) -> None:
        data, size = state.data, len(state.data)
        while not self._native.llama_state_seq_set_data(self._pointer, data, size, state.slot):
            self._native.llama_memory_seq_rm(self._memory(), state.slot, -1, -1)
            if self.cells >= 4 * sum(s.filled for ref in self._live.values() if (s := ref()) is not None):
                raise RuntimeError("llama.cpp cannot take up a copy of what this model has read")
            self._grow(state.filled)
        state.data = None

    # The context

    def _memory(self) -> Any:
        return self._native.llama_get_memory(self._pointer)

    def _open(self, cells: int) -> None:
        native = self._native
        params = native.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = cells, BLOCK, BLOCK, SLOTS
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified, params.type_k, params.type_v = True, self.kind, self.kind
        if not self._model.on_gpu:
            params.flash_attn_type = 0  # auto takes it, and decodes at half the speed after long prompts
        self._pointer = native.llama_init_from_model(self._model.pointer, params)
        if not self._pointer:
            self._pointer, self.cells = None, 0
            raise RuntimeError(f"llama.cpp cannot make a context of {cells:,} tokens: there is not enough memory")
        self.cells = cells
        if self._adapter is not None:
            pointers, scales = (native.llama_adapter_lora_p_ctypes * 1)(self._adapter), (ctypes.c_float * 1)(1.0)
            native.llama_set_adapters_lora(self._pointer, pointers, 1, scales)

    def _close(self) -> None:
        if self._pointer is not None:
            self._native.llama_free(self._pointer)
            self._pointer, self.cells = None, 0

    def _grow(self, least: int) -> None:
        """Make the context again, at least twice as large, with all that it holds."""
        native, before = self._native, self.cells
        size = native.llama_state_get_size(self._pointer)
        data = (ctypes.c_uint8 * size)()
        native.llama_state_get_data(self._pointer, data, size)
        self._close()
        try:
            self._open(max(2 * before, _power(least)))
        except RuntimeError:
            self._open(before)
            native.llama_state_set_data(self._pointer, data, size)
            raise
        if not native.llama_state_set_data(self._pointer, data, size):
            raise RuntimeError("llama.cpp cannot move what was read to a larger context")

    def _filled(self, states: List[State], ids: List[int], wanted: List[int]) -> Any:
        if self._batch is None:
            self._batch = self._native.llama_batch_init(BLOCK, 0, 1)
        batch, count = self._batch, len(ids)
        batch.n_tokens = count
        logits = np.zeros(count, np.int8)
        logits[list(wanted)] = 1
        position: dict[int, int] = {}
        for at, (state, token) in enumerate(zip(states, ids, strict=True)):
            place = position.get(id(state), state.length)
            position[id(state)] = place + 1
            batch.token[at], batch.pos[at], batch.logits[at] = token, place, logits[at]
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = state.slot
        return batch


def _power(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
