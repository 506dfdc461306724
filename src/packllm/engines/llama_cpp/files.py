"""Load a .gguf file, in one or several parts: engine, tokenizer and encoder. Nothing is written to disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packllm.chat.prompt import Encoder
from packllm.engines.llama_cpp.engine import Engine
from packllm.engines.llama_cpp.model import Model, Trial
from packllm.engines.llama_cpp.tokenizer import tokenizer_of
from packllm.engines.transformers.gguf_header import Header, check_parts
from packllm.errors import loading, refused

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


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
    with loading(what):
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


def held(path: Path) -> tuple[int, int]:
    """Bytes of a GGUF file's weights, and KV cache bytes of one token in llama.cpp; both from the header."""
    paths = parts(path)
    _, header = check_parts(paths)
    return sum(part.stat().st_size for part in paths), _token_bytes(_numbers(header.metadata))


def parts(path: Path) -> list[Path]:
    """The file, or all parts of the split model that it belongs to, in order."""
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    names = [f"{match[1]}-{at + 1:05d}-of-{match[3]}.gguf" for at in range(min(int(match[3]), 10_000))]
    for name in names:
        if not path.with_name(name).is_file():
            raise refused(f"model {str(path)!r}", f"it is in {len(names)} parts, and {name} is not beside it")
    return [path.with_name(name) for name in names]


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
