"""The llama.cpp library of llama-cpp-python. One version is supported, whose C structures are checked."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import deque
from functools import cache
from importlib import metadata, util
from typing import Any

from packllm.errors import ExtraError, LoadError

log = logging.getLogger("packllm")

VERSION = "0.3.36"
"""The supported version of llama-cpp-python. Fields of llama.cpp's structures are added, removed and moved between
versions; with another version, a field would silently have a wrong value."""

_MODEL = {"n_gpu_layers": -1, "load_mode": -1, "vocab_only": False, "use_extra_bufts": True, "no_alloc": False}
_CONTEXT = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max": 0,
    "n_threads": 4,
    "pooling_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "type_k": 1,
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "swa_full": True,
    "kv_unified": False,
}
"""Defaults of llama.cpp's parameters. Another value means that the structures of the loaded library differ from these
definitions."""

_errors: deque[str] = deque(maxlen=20)
_lock = threading.Lock()


def installed() -> str | None:
    """Version of the installed llama-cpp-python; None if it is not installed."""
    if util.find_spec("llama_cpp") is None:
        return None
    try:
        return metadata.version("llama_cpp_python")
    except metadata.PackageNotFoundError:
        return "of unknown version"


@cache
def binding() -> Any:
    """The low-level module.

    Raises:
        ExtraError: llama-cpp-python is not installed.
        LoadError: its version is not supported, its library cannot be loaded, or its structures differ.
    """
    version = installed()
    if version is None:
        raise ExtraError("the llama.cpp engine", "llama-cpp-python", "llama-cpp")
    if version != VERSION:
        raise LoadError(
            f"llama-cpp-python {version} is installed, but the llama.cpp engine needs {VERSION}; "
            f"pip install llama-cpp-python=={VERSION}, or load with engine='transformers'"
        )
    try:
        from llama_cpp import llama_cpp as native
    except Exception as error:  # for example, the library is missing or was built for another machine
        raise LoadError(f"llama-cpp-python {version} cannot be imported: {type(error).__name__}: {error}") from error
    _check(native.llama_model_default_params(), _MODEL)
    _check(native.llama_context_default_params(), _CONTEXT)
    native.llama_log_set(_callback(native), ctypes.c_void_p(0))
    native.llama_backend_init()
    return native


def _check(params: Any, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if (actual := getattr(params, name, None)) != value:
            raise LoadError(
                f"llama-cpp-python {VERSION} is installed, but it loads another llama.cpp library, whose "
                f"default {name} is {actual}, not {value}; reinstall it, or unset LLAMA_CPP_LIB_PATH"
            )


@cache
def _callback(native: Any) -> Any:
    """The callback of llama.cpp's log. It keeps errors, which explain why a call returned nothing."""

    @native.llama_log_callback
    def callback(level: int, text: bytes, _: Any) -> None:
        if level >= 3 and (line := text.decode("utf-8", "replace").strip()):
            log.debug("llama.cpp: %s", line)
            if level == 4:
                _errors.append(line)

    return callback


def explained(function: Any, *arguments: Any) -> tuple[Any, str]:
    """Call a function; return its result, and in one line the errors that llama.cpp logged during the call."""
    with _lock:
        _errors.clear()
        result = function(*arguments)
        return result, "; ".join(dict.fromkeys(_errors))[:500]
