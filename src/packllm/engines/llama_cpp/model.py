"""The weights of a GGUF file in llama.cpp, memory-mapped, and its adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import typing_extensions

from packllm.engines.llama_cpp.native import binding, explained
from packllm.errors import LoadError, refused

SECONDS = 600
"""Time limit in seconds of the trial process."""


class Trial:
    """A second process in which llama.cpp loads a file and reads one token, while this process goes on; see
    trial.py."""

    def __init__(self, paths: list[Path]) -> None:
        self._what = f"model {str(paths[0])!r}"
        folders = [Path(binding().__file__).parent, Path(typing_extensions.__file__).parent]
        program = [sys.executable, "-I", "-S", Path(__file__).with_name("trial.py"), *folders, *paths]
        self._process = subprocess.Popen(
            list(map(str, program)),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else it starts a debugger
        )

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def passed(self) -> None:
        """Wait for the trial to end.

        Raises:
            LoadError: llama.cpp aborted that process, as it would have aborted this one, or the trial took too long.
        """
        try:
            _, stderr = self._process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise refused(self._what, f"llama.cpp has not read it after {SECONDS} seconds") from None
        if not 0 <= self._process.returncode < 256:
            lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if "GGML_ASSERT" in line]
            reason = lines[0].rpartition("/")[2] if lines else f"exit status {self._process.returncode}"
            raise refused(self._what, f"llama.cpp aborts the process that loads it: {reason}")


class Model:
    """A GGUF file in llama.cpp.

    Args:
        paths: the file, or all its parts in order.

    Attributes:
        native: the low-level module.
        pointer: llama.cpp's handle of the model.
        vocabulary_size: V_model, the number of logits.
        on_gpu: whether llama.cpp was built for a GPU.
        rewinds: whether the last ids of a sequence can be removed from its KV cache.

    Raises:
        LoadError: llama.cpp cannot read the file; the message has its reason.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.native = native = binding()
        self.pointer: Any = None
        params = native.llama_model_default_params()
        encoded = [str(path).encode() for path in paths]
        if len(paths) == 1:
            self.pointer, reason = explained(native.llama_model_load_from_file, encoded[0], params)
        else:
            array = (native.ctypes.c_char_p * len(paths))(*encoded)
            self.pointer, reason = explained(native.llama_model_load_from_splits, array, len(paths), params)
        if not self.pointer:
            raise LoadError(f"cannot load {str(paths[0])!r}: llama.cpp refuses it: {reason}")
        self.on_gpu: bool = native.llama_supports_gpu_offload()
        self.vocabulary = native.llama_model_get_vocab(self.pointer)
        self.vocabulary_size: int = native.llama_vocab_n_tokens(self.vocabulary)
        self.nbytes: int = native.llama_model_size(self.pointer)
        self.rewinds = not (native.llama_model_is_recurrent(self.pointer) or native.llama_model_is_hybrid(self.pointer))

    def __del__(self) -> None:
        if self.pointer and sys is not None and not sys.is_finalizing():
            self.native.llama_model_free(self.pointer)  # with its adapters

    def attach(self, path: Path, what: str) -> Any:
        """Load an adapter's GGUF file. It lives as long as the model."""
        adapter, reason = explained(self.native.llama_adapter_lora_init, self.pointer, str(path).encode())
        if not adapter:
            raise LoadError(f"cannot load {what}: llama.cpp refuses it: {reason}")
        return adapter

    def end_ids(self) -> frozenset[int]:
        """Ids that end a text or a turn, according to the file."""
        ids = {self.native.llama_vocab_eos(self.vocabulary), self.native.llama_vocab_eot(self.vocabulary)}
        return frozenset(i for i in ids if i >= 0)
