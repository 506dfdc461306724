"""Read a GGUF file's header, and check it against the file: counts, sizes and types in it cannot be trusted."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from packllm.engines.transformers.files import Weights, check_claims
from packllm.errors import LoadError, refused

MAGIC = b"GGUF"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        metadata: values by name: numbers, texts, and lists of these.
        tensors: (name, shape, type, position in the file) of each.
        elements: total number of elements.
        nbytes: total size of the tensors.
    """

    metadata: dict[str, Any]
    tensors: list[tuple[str, tuple[int, ...], int, int]]
    elements: int
    nbytes: int

    @property
    def kind(self) -> str:
        """The content type: "model", "adapter", or another word of the file."""
        return str(self.metadata.get("general.type") or "model")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor, its rows' length first."""
        return {name: shape for name, shape, _, _ in self.tensors}


def read_header(path: Path) -> Header:
    """The header of a GGUF file, checked against the file's size.

    Raises:
        LoadError: the file is not a GGUF file, is cut off or damaged, or has tensors of an unknown type.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise LoadError(f"{str(path)!r} needs the gguf package; install packllm[gguf]") from None
    what = f"cannot read {str(path)!r}"
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise LoadError(f"{what}: it is not a GGUF file")
        if size < 24:
            raise LoadError(f"{what}: it is cut off or damaged: its header is incomplete")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            try:
                metadata, infos, start = _header(data)
            except (struct.error, ValueError, OverflowError) as error:
                raise LoadError(f"{what}: it is cut off or damaged: {error}") from error
    elements = nbytes = 0
    for name, shape, kind, offset in infos:
        if kind not in set(GGMLQuantizationType):
            raise LoadError(f"{what}: tensor {name!r} has the unknown quantization type {kind}")
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        count = math.prod(shape)
        held = -(-count // block) * width
        if (end := start + offset + held) > size:
            raise LoadError(f"{what}: it is cut off: tensor {name!r} ends at byte {end:,} of {size:,}")
        elements, nbytes = elements + count, nbytes + held
    tensors = [(name, shape, kind, start + offset) for name, shape, kind, offset in infos]
    return Header(metadata, tensors, elements, nbytes)


def check_header(path: Path) -> Weights:
    """Read a GGUF file's header, and check its claims about the tensors.

    Raises:
        LoadError: as check_parts.
    """
    return check_parts([path])[0]


def check_parts(paths: Sequence[Path]) -> tuple[Weights, Header]:
    """As check_header, for a model in one or several files.

    Returns:
        The weights of all parts, and one header: the metadata of the first part, and the tensors of all.

    Raises:
        LoadError: as read_header; it is no model, holds no tensors, or claims what these cannot bear.
    """
    headers = [read_header(path) for path in paths]
    first, name = headers[0], str(paths[0])
    tensors = [tensor for one in headers for tensor in one.tensors]
    whole = Header(first.metadata, tensors, sum(one.elements for one in headers), sum(one.nbytes for one in headers))
    if first.kind == "adapter":
        raise refused(f"model {name!r}", f"it is an adapter; name the model that it is for: BASE.gguf+{name}")
    if first.kind != "model":
        raise refused(f"model {name!r}", f"it is no model: it says that it is of the type {first.kind[:40]!r}")
    weights = Weights(len(tensors), whole.elements, size=sum(path.stat().st_size for path in paths))
    if not tensors:
        raise LoadError(f"cannot read {name!r}: it has no tensors")
    numbers = {key: n for key, n in first.metadata.items() if isinstance(n, int)}
    layers = {"num_hidden_layers" if key.endswith(".block_count") else key: n for key, n in numbers.items()}
    check_claims(layers, weights, repr(name))
    return weights, whole


def parts(path: Path) -> list[Path]:
    """The file, or all parts of the split model that it belongs to, in order.

    Raises:
        LoadError: one is missing.
    """
    found = _PART.fullmatch(path.name)
    if not found or not int(found[3]):
        return [path]
    names = [f"{found[1]}-{at + 1:05d}-of-{found[3]}.gguf" for at in range(min(int(found[3]), 10_000))]
    for name in names:
        if not path.with_name(name).is_file():
            raise refused(f"model {str(path)!r}", f"it is in {len(names)} parts, and {name} is not beside it")
    return [path.with_name(name) for name in names]


_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def _header(data: mmap) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
    """(metadata, (name, shape, type, offset) of each tensor, offset of the tensor data)."""
    at = 4

    def take(form: str, whole: bool = False) -> Any:
        nonlocal at
        values = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return values if whole else values[0]

    def texts(count: int) -> list[str]:
        """A vocabulary is a hundred thousand of these."""
        nonlocal at
        found, place, end, size_at = [], at, len(data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = size_at(data, place)
            start, place = place + 8, place + 8 + length
            if place > end:
                raise ValueError("a text in its header is longer than the file")
            found.append(str(data[start:place], "utf-8", "replace"))
        at = place
        return found

    def text() -> str:
        return texts(1)[0]

    def value(kind: int, depth: int = 0) -> Any:
        nonlocal at
        if kind in _SCALARS:
            return take(_SCALARS[kind])
        if kind == 8:
            return text()
        if kind != 9 or depth > 4:
            raise ValueError(f"its header has a value of unknown type {kind}")
        inner, count = take("<I"), take("<Q")
        if inner == 8:
            return texts(count)
        if inner not in _SCALARS:
            return [value(inner, depth + 1) for _ in range(count)]
        if at + count * struct.calcsize(_SCALARS[inner]) > len(data):
            raise ValueError("a list in its header is longer than the file")
        return list(take(f"<{count}{_SCALARS[inner][1]}", whole=True))

    version, tensors, entries = take("<I"), take("<Q"), take("<Q")
    if version not in (2, 3):
        raise ValueError(f"it has GGUF version {version}; supported are 2 and 3")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = text()
        metadata[name] = value(take("<I"))
    infos = []
    for _ in range(tensors):
        name, dimensions = text(), take("<I")
        if dimensions > 8:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(take("<Q") for _ in range(dimensions))
        infos.append((name, shape, take("<I"), take("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise ValueError(f"its alignment is {alignment}")
    return metadata, infos, -(-at // alignment) * alignment
