"""Load a .gguf file, in one or several parts: engine, tokenizer and encoder. Nothing is written to disk."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packllm.chat.prompt import Encoder
from packllm.engines.llama_cpp.engine import Engine
from packllm.engines.llama_cpp.model import Model, Trial
from packllm.engines.transformers.footprint import Cache, Footprint, Layer
from packllm.engines.transformers.gguf_header import Header, check_parts, parts
from packllm.engines.transformers.gguf_tokenizer import tokenizer_of
from packllm.errors import LoadError, loading


@dataclass(frozen=True)
class File:
    """A loaded GGUF file.

    Attributes:
        header: of the first part.
    """

    path: Path
    header: Header
    model: Model
    engine: Engine
    tokenizer: Any
    encoder: Encoder


def read(path: Path) -> File:
    """Load a GGUF file into llama.cpp.

    Raises:
        LoadError: the file cannot be loaded.
    """
    what = f"model {str(path)!r}"
    with loading(what), _uncollected():
        paths = parts(path)
        _, header = check_parts(paths)
        with Trial(paths) as trial:
            tokenizer = tokenizer_of(header.metadata, what)
            for name in [name for name in header.metadata if name.startswith("tokenizer.")]:
                del header.metadata[name]  # frees about a hundred thousand strings
            encoder = Encoder(tokenizer)
            encoder.encode("a")
            trial.passed()
        model = Model(paths)
        number = _numbers(header.metadata)
        engine = Engine(
            model, encoder.vocabulary, number("context_length") or None, _token_bytes(number), _fingerprint(paths)
        )
        return File(path, header, model, engine, tokenizer, encoder)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turn Python's garbage collection off. A vocabulary is some hundred thousand objects, and collections while they
    are made take a fifth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def footprint(path: Path) -> Footprint:
    """The memory that a GGUF file will need in llama.cpp, from its header."""
    what = f"model {str(path)!r}"
    _, header = check_parts(parts(path))
    number, tokenizer, note = _numbers(header.metadata), None, ""
    try:
        tokenizer = tokenizer_of(header.metadata, what)
    except LoadError as error:
        note = f"its tokenizer cannot be read: {error}"
    ends = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return Footprint(
        parameters=header.elements,
        weights=header.nbytes,
        dtype="as stored",
        cache=Cache((Layer(0, _token_bytes(number)),)),
        window=number("context_length") or None,
        config=None,
        tokenizer=tokenizer,
        ends=frozenset(end for end in ends if isinstance(end, int)),
        item=4,  # adapters of peft's are written in float32
        note=note,
        engine="llama.cpp",
    )


def _numbers(metadata: Mapping[str, Any]) -> Any:
    """A function from a metadata name to the architecture's number of that name: the maximum over the layers, or 0 if
    the file has none."""
    architecture = metadata.get("general.architecture")

    def number(name: str) -> int:
        value = metadata.get(f"{architecture}.{name}", 0)
        return max((v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)), default=0)

    return number


def _token_bytes(number: Any) -> int:
    """KV cache bytes of one token, at 16 bits a number."""
    heads = max(1, number("attention.head_count"))
    size = number("attention.key_length") or number("embedding_length") // heads
    return 2 * 2 * number("block_count") * size * (number("attention.head_count_kv") or heads)


def _fingerprint(paths: list[Path]) -> str:
    """Hash of each file's length, beginning and samples of the rest."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{size} ".encode() + file.read(2**20))
            for at in range(256):
                file.seek(size * at // 256)
                digest.update(file.read(64))
    return digest.hexdigest()
