"""A llama.cpp context: the KV cache of all sequences of one adapter."""

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
"""Most tokens of one llama_decode call, and so most rows of logits that it returns. The logits are stored twice, which
takes 64 MB for a vocabulary of 128k ids. Larger blocks were not faster on CPUs: 131, 126, 117 and 126 tokens/s at 64,
128, 256 and 512."""

FIRST = 512
"""KV cells of a new context. llama.cpp allocates all cells at once, so a context starts small instead of with the
model's whole window, and is made again at twice the size when it is full."""

SLOTS = 64
"""Sequences that have cells in a context at the same time. When there are more, the least recently used ones are copied
out of the context."""


class State:
    """The KV cache of one sequence: either cells of the context under the number `slot`, or a copy of them in `data`.

    Attributes:
        length: ids that are valid.
        filled: ids that the cells or the copy hold; those after `length` are removed before the next use.
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
    """The KV cells of the sequences of one adapter. Its methods may be called from several threads.

    Args:
        adapter: from Model.attach; None for the base weights.

    Attributes:
        cells: number of cells.
        kind: llama.cpp's type of keys and values; 1 means 16 bits.
        forwards, tokens: llama_decode calls so far, and tokens that they read.
    """

    def __init__(self, model: Model, adapter: Any, threads: int) -> None:
        self._model, self._adapter, self._threads = model, adapter, threads
        self._native = model.native
        self._pointer: Any = None
        self._batch: Any = None
        self._lock = threading.Lock()
        self._free = list(range(SLOTS))
        self._left: deque[int] = deque()  # released slots whose cells are not yet cleared
        self._live: dict[int, weakref.ref[State]] = {}
        self._clock = 0
        self.cells = self.forwards = self.tokens = 0
        self.kind = 1

    def __del__(self) -> None:
        if sys is not None and not sys.is_finalizing():
            self._close()
            if self._batch is not None:
                self._native.llama_batch_free(self._batch)

    # Sequences

    def leave(self, slot: int) -> None:
        """Release a slot. It is cleared now or, if a pass is running, before the next one: the garbage collector may
        call this at any point of a pass."""
        self._left.append(slot)
        if self._lock.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._lock.release()

    def fork(self, state: State) -> State:
        """A second state of the same ids. It shares the cells while there are free slots."""
        with self._lock:
            self._sweep()
            copy = State(self, state.data, state.length)
            copy.filled = state.filled
            if state.slot is None:
                return copy
            if not self._free:
                return self._copied(state)
            self._trim(state)
            copy.filled = state.filled
            self._seat(copy)
            self._native.llama_memory_seq_cp(self._memory(), state.slot, copy.slot, -1, -1)
            return copy

    def copied(self, state: State) -> State:
        """A copy outside the context. It takes no cells, which would slow down the attention of all other sequences."""
        with self._lock:
            self._sweep()
            return self._copied(state)

    def decode(self, states: List[State], ids: List[int], wanted: List[int], least: int) -> Tensor:
        """Append at most BLOCK ids to their states.

        Args:
            states: the state of each id.
            wanted: indices of the ids whose next-token logits are returned, ascending.
            least: cells that these sequences need in all; the context grows to this size when it is full.

        Returns:
            Logits, float32 (len(wanted), V_model), valid until the next call.

        Raises:
            RuntimeError: llama.cpp failed.
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
                raise RuntimeError(f"llama.cpp cannot read these {len(ids)} tokens: llama_decode returned {code}")
            self.forwards += 1
            self.tokens += len(ids)
            for state in states:
                state.length += 1
                state.filled += 1
            if not wanted:
                return torch.empty(0, self._model.vocabulary_size)
            pointer = self._native.llama_get_logits(self._pointer)
            return torch.from_numpy(np.ctypeslib.as_array(pointer, (len(wanted), self._model.vocabulary_size)))

    # Slots

    def _sweep(self) -> None:
        """Clear the released slots. When none is used any more, a context that has grown is freed."""
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
        """Make sure that a state has a slot whose cells hold exactly its valid ids."""
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
        """Copy the least recently used state out of the context, and release its slot."""
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
                raise RuntimeError("llama.cpp cannot remove tokens from the cache of this model")
            state.filled = state.length

    def _copied(self, state: State) -> State:
        if state.slot is None:
            copy = State(self, state.data, state.length)
            copy.filled = state.filled
            return copy
        self._trim(state)
        size = self._native.llama_state_seq_get_size(self._pointer, state.slot)
        data = (ctypes.c_uint8 * size)()
        if self._native.llama_state_seq_get_data(self._pointer, data, size, state.slot) != size:
            raise RuntimeError("llama.cpp cannot copy the cache of this model")
        return State(self, data, state.length)

    def _restore(self, state: State) -> None:
        data, size = state.data, len(state.data)
        while not self._native.llama_state_seq_set_data(self._pointer, data, size, state.slot):
            self._native.llama_memory_seq_rm(self._memory(), state.slot, -1, -1)
            if self.cells >= 4 * sum(s.filled for ref in self._live.values() if (s := ref()) is not None):
                raise RuntimeError("llama.cpp cannot restore a copy of the cache of this model")
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
            params.flash_attn_type = (
                0  # off: with "auto", llama.cpp turns it on, and decodes half as fast after long prompts
            )
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
        """Replace the context by one at least twice as large, with the same contents."""
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
            raise RuntimeError("llama.cpp cannot move the cache to a larger context")

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
