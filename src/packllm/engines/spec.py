"""The names of models: hub ids, folders, .gguf files, base+adapter, and their prefixes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packllm.engines.transformers import files
from packllm.engines.transformers.gguf_header import MAGIC
from packllm.errors import LoadError, loading

_ELSEWHERE = "for a model on a server https://HOST/v1#MODEL, for one in a worker ray:SPEC"
_FORMS = "a hub id, a folder, a .gguf file or base+adapter"
_REMOTE = re.compile(r"(?:([\w.-]+)=)?ray(?:\[([^]]*)\])?:(.+)")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_spec(model: Any) -> bool:
    """Whether it is a text or path, which names a model."""
    return isinstance(model, str | os.PathLike) and isinstance(os.fspath(model), str)


def of_worker(model: Any) -> re.Match[str] | None:
    """Name, resources and spec of "ray:SPEC" as a match; None for anything else."""
    return _REMOTE.fullmatch(os.fspath(model)) if is_spec(model) else None


@dataclass(frozen=True)
class Spec:
    """A parsed model name: a base and possibly an adapter, each an existing path or a possible hub id."""

    name: str
    base: str
    adapter: str | None

    @property
    def key(self) -> str:
        """The base's path or id in a normal form."""
        return os.path.realpath(self.base) if os.path.exists(self.base) else self.base

    @classmethod
    def of(cls, text: str) -> Spec:
        match = None if os.path.exists(text) else re.match(r"([\w.-]+)=", text)
        base, adapter = _split(text[match.end() :] if match else text)
        return cls(match[1] if match else name_of(adapter or base), base, adapter)


def _split(spec: str) -> tuple[str, str | None]:
    expanded = os.path.expanduser(spec)
    if os.path.exists(expanded):
        return expanded, None
    base, separator, adapter = spec.rpartition("+")
    parts = (os.path.expanduser(base), os.path.expanduser(adapter)) if separator else (expanded, None)
    for part in parts:
        if part is None or os.path.exists(part):
            continue
        if part.endswith(".gguf"):
            raise LoadError(f"model file {part!r} does not exist")
        if engine := re.match(r"([A-Za-z][\w.-]+):", part):
            raise LoadError(f"model {part!r} names no engine that there is: {engine[1]!r}; give {_FORMS}; {_ELSEWHERE}")
        if not HUB_ID.fullmatch(part):
            raise LoadError(f"model {part!r} does not exist; give {_FORMS}")
    return parts


def gguf(path: str) -> Path:
    """The path of a GGUF file. Raise LoadError that says what the file is if it is anything else."""
    file = Path(path)
    with loading(f"{path!r}"):
        if files.is_lfs_pointer(file):
            raise LoadError(f"{path!r} is a git-lfs pointer instead of the file; run `git lfs pull` there")
        with open(file, "rb") as stream:
            magic = stream.read(len(MAGIC)) == MAGIC
    if file.suffix.lower() == ".gguf" or magic:
        return file
    kind = f"a {file.suffix} file" if file.suffix else "a file"
    remedy = "name its folder" if file.suffix in (".safetensors", ".json") else "give a folder or a .gguf file"
    raise LoadError(f"{path!r} is {kind}, which is no model by itself; {remedy}")


def name_of(path: str) -> str:
    return os.path.basename(os.path.abspath(path)).removesuffix(".gguf")
