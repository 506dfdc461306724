"""What a GGUF file's header says, checked against the file: counts, sizes and types are a stranger's claims."""

from __future__ import annotations

import math
import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from packllm.engines.transformers.files import Weights, check_claims
from packllm.errors import LoadError

MAGIC = b"GGUF"


def check_header(path: Path) -> Weights:
    """What a GGUF file's header says of its tensors.

    Raises:
        LoadError: no GGUF file, one that is cut or damaged, or with tensors of an unknown type.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise LoadError(f"{str(path)!r} needs the gguf package; install packllm[gguf]") from None
    what = f"cannot read {str(path)!r}"
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise LoadError(f"{what}: it is no GGUF file")
        if size < 24:
            raise LoadError(f"{what}: it is cut off or damaged: its header is not whole")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            try:
                numbers, infos, start = _header(data)
            except (struct.error, ValueError, OverflowError) as error:
                raise LoadError(f"{what}: it is cut off or damaged: {error}") from error
    elements = 0
    for name, shape, kind, offset in infos:
        if kind not in set(GGMLQuantizationType):
            raise LoadError(f"{what}: tensor {name!r} is of the unknown quantisation type {kind}")
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        count = math.prod(shape)
        end = start + offset + -(-count // block) * width
        if end > size:
            raise LoadError(f"{what}: it is cut off: tensor {name!r} ends at byte {end:,} of {size:,}")
        elements += count
    if not infos:
        raise LoadError(f"{what}: it holds no tensors")
    weights = Weights(len(infos), elements, size=size)
    layers = {"num_hidden_layers" if name.endswith(".block_count") else name: n for name, n in numbers.items()}
    check_claims(layers, weights, f"{str(path)!r}")
    return weights


_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def _header(data: mmap) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
    """(numbers of the metadata, (name, shape, type, offset) of each tensor, where the tensors begin)."""
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        length = take("<Q")
        if at + length > len(data):
            raise ValueError("a text in its header is longer than the file")
        at += length
        return data[at - length : at].decode("utf-8", "replace")

    def value(kind: int, depth: int = 0) -> Any:
        nonlocal at
        if kind in _SCALARS:
            return take(_SCALARS[kind])
        if kind == 8:
            return text()
        if kind != 9 or depth > 4:
            raise ValueError(f"its header holds a value of the unknown type {kind}")
        inner, count = take("<I"), take("<Q")
        if inner in _SCALARS:
            at += count * struct.calcsize(_SCALARS[inner])
            if at > len(data):
                raise ValueError("a list in its header is longer than the file")
        else:
            for _ in range(count):
                value(inner, depth + 1)
        return None

    version, tensors, entries = take("<I"), take("<Q"), take("<Q")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version}; 2 and 3 can be read")
    found: dict[str, Any] = {}
    for _ in range(entries):
        name = text()
        found[name] = value(take("<I"))
    infos = []
    for _ in range(tensors):
        name, dimensions = text(), take("<I")
        if dimensions > 8:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(take("<Q") for _ in range(dimensions))
        infos.append((name, shape, take("<I"), take("<Q")))
    alignment = found.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise ValueError(f"its alignment is {alignment}")
    numbers = {name: n for name, n in found.items() if isinstance(n, int)}
    return numbers, infos, -(-at // alignment) * alignment
