"""LoRA adapters for llama.cpp, from peft folders and from GGUF files.

llama.cpp aborts the process on some faulty files, and ignores some tensors. So it never reads a file from elsewhere:
every adapter is checked against its base, and written to a temporary GGUF file.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from packllm.engines.llama_cpp.files import File
from packllm.engines.transformers.gguf_header import Header, read_header
from packllm.engines.transformers.lora import Adapter
from packllm.errors import loading, refused

_IN_PAIRS = {"llama", "arcee", "granite", "granitemoe", "mistral3", "olmo", "smollm3"}
"""Architectures whose query and key rows are ordered differently in GGUF and in transformers. In GGUF, the two numbers
that are rotated together are neighbours; in transformers they are half a head apart."""
_NEOX = {2, 8, 40}  # llama.cpp's rope types with the row order of transformers

_TYPES = {0: "F32", 1: "F16", 8: "Q8_0", 30: "BF16"}
"""Types of numbers that adapters are written in, by GGUF's number."""


@dataclass(frozen=True)
class _Part:
    """One factor of an update: its numbers as the file has them, and their type."""

    shape: tuple[int, ...]
    kind: int
    data: np.ndarray


_Parts = dict[str, dict[str, _Part]]
"""By the name of the base's weight, factors "a" (rows as long as the base's, r of them) and "b" (the rows' length is r,
as many as the base's)."""


def attach(file: File, adapter: Adapter | Path) -> int:
    """Attach an adapter to the engine of a file.

    Args:
        adapter: an adapter that was read from its folder, or the path of a GGUF file.

    Returns:
        The adapter's index in the engine.

    Raises:
        LoadError: the adapter is damaged, belongs to another model, or is more than plain LoRA.
    """
    what = f"adapter {str(adapter)!r}" if isinstance(adapter, Path) else adapter.what
    with loading(what), tempfile.TemporaryDirectory(prefix="packllm-") as folder:
        if isinstance(adapter, Path):
            header = read_adapter(adapter, str(file.header.metadata["general.architecture"]))
            parts, alpha = _of_file(adapter, header, what), header.metadata.get("adapter.lora.alpha", 0.0)
        else:
            parts, alpha = _of_folder(file, adapter), 0.0  # its scale is in the factors: without alpha it is 1
        _check(file.header.shapes, parts, what)
        written = Path(folder, "adapter.gguf")
        _write(file, parts, float(alpha), written)
        size = sum(part.data.nbytes for pair in parts.values() for part in pair.values())
        return file.engine.attach(file.model.attach(written, what), _digest(written), size)


def read_adapter(path: Path, architecture: str | None = None) -> Header:
    """The header of an adapter's GGUF file.

    Args:
        architecture: its base's, where that is known.

    Raises:
        LoadError: it is damaged, no LoRA adapter, or one for another architecture.
    """
    what = f"adapter {str(path)!r}"
    header = read_header(path)
    metadata = header.metadata
    if header.kind != "adapter":
        raise refused(what, f"it is no adapter but a {header.kind[:40]}")
    if metadata.get("adapter.type") != "lora":
        raise refused(
            what, f"it is of the type {str(metadata.get('adapter.type'))[:40]!r}; llama.cpp runs 'lora' alone"
        )
    if any("alora" in name for name in metadata):
        raise refused(
            what, "it is an activated LoRA (aLoRA), which applies only after certain tokens; it is not supported"
        )
    if architecture is not None and (own := metadata.get("general.architecture")) != architecture:
        raise refused(what, f"it is for models of architecture {str(own)[:40]!r}, and its base is {architecture!r}")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise refused(what, f"adapter.lora.alpha={str(alpha)[:40]} is no number")
    if not header.tensors:
        raise refused(what, "it holds no weights")
    return header


def _of_file(path: Path, header: Header, what: str) -> _Parts:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    parts: _Parts = {}
    data = np.memmap(path, np.uint8, "r")
    for name, shape, kind, start in header.tensors:
        stem, _, role = name.rpartition(".lora_")
        if role not in ("a", "b") or not stem:
            raise refused(what, f"its tensor {name!r} is no factor of an update (….lora_a, ….lora_b)")
        if role in parts.setdefault(stem, {}):
            raise refused(what, f"it has the tensor {name!r} twice")
        if kind not in _TYPES:
            supported = ", ".join(_TYPES.values())
            raise refused(
                what, f"its tensor {name!r} is of type {GGMLQuantizationType(kind).name}; {supported} can be used"
            )
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if len(shape) < 2 or not math.prod(shape) or shape[0] % block:
            raise refused(what, f"its tensor {name!r} is of size {_size(shape)}")
        stored = data[start : start + math.prod(shape) // block * width]
        rows = stored.reshape(*reversed(shape[1:]), shape[0] // block * width)
        if not np.isfinite(dequantize(rows, GGMLQuantizationType(kind))).all():
            raise refused(what, f"{name} holds NaN or infinity; the file is damaged or diverged in training")
        parts[stem][role] = _Part(shape, kind, rows)
    return parts


def _of_folder(file: File, adapter: Adapter) -> _Parts:
    import gguf

    factors = adapter.factors()
    if factors is None:
        raise refused(adapter.what, "it is more than plain LoRA, which llama.cpp cannot run; use engine='transformers'")
    metadata = file.header.metadata
    architecture = metadata["general.architecture"]
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise refused(adapter.what, f"the gguf package does not know the architecture {architecture!r}; update it")
    names = gguf.get_tensor_name_map(kind, metadata[f"{architecture}.block_count"])
    shapes, parts = file.header.shapes, _Parts()
    for module, (down, up) in factors.items():
        name = f"{names.get_name(module)}.weight"
        if name not in shapes:
            raise refused(adapter.what, f"it changes {module}, which its base lacks; is it of another model?")
        if shapes[name][1:] == (up.shape[0],) and (heads := _heads(file, name, adapter.what)):
            up = up.reshape(heads, 2, -1, up.shape[-1]).transpose(1, 2).reshape(up.shape)
        parts[name] = {"a": _part(down), "b": _part(up)}
    return parts


def _part(tensor: Tensor) -> _Part:
    data = np.ascontiguousarray(tensor.float().numpy())
    return _Part(tuple(reversed(data.shape)), 0, data.view(np.uint8))


def _check(shapes: Mapping[str, tuple[int, ...]], parts: _Parts, what: str) -> None:
    """Refuse factors of what the base lacks or has in another size."""
    for name, pair in parts.items():
        for role in "ab":
            if role not in pair:
                raise refused(what, f"it lacks {name}.lora_{role}")
        if name not in shapes:
            raise refused(what, f"it changes {name}, which its base lacks; is it of another model?")
        a, b = pair["a"].shape, pair["b"].shape
        if name.startswith("token_embd."):  # looked up, not multiplied
            a, b = (b[1], b[0], *b[2:]), a
        if a[1] != b[0] or a[2:] != b[2:]:
            raise refused(what, f"its factors of {name} are of size {_size(a)} and {_size(b)}: the ranks differ")
        if (a[0], b[1], *a[2:]) != shapes[name]:
            sizes = f"{_size((a[0], b[1], *a[2:]))}, the base's weight {_size(shapes[name])}"
            raise refused(what, f"its update of {name} is of size {sizes}; is it of another model?")


def _size(shape: tuple[int, ...]) -> str:
    """A size in torch's order: rows first."""
    return " x ".join(map(str, reversed(shape)))


def _write(file: File, parts: _Parts, alpha: float, path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, file.header.metadata["general.architecture"])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, pair in parts.items():
        for role, part in pair.items():
            writer.add_tensor(f"{name}.lora_{role}", part.data, raw_dtype=GGMLQuantizationType(part.kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _heads(file: File, name: str, what: str) -> int:
    """The number of heads of a weight whose rows GGUF orders in pairs; 0 for any other weight."""
    role = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2])
    metadata = file.header.metadata
    architecture = metadata["general.architecture"]
    if role is None or file.model.native.llama_model_rope_type(file.model.pointer) in _NEOX:
        return 0
    if architecture not in _IN_PAIRS:
        raise refused(
            what, f"how llama.cpp orders {name} of {architecture!r} is not known here; give the adapter as a GGUF file"
        )
    heads: Any = metadata.get(f"{architecture}.attention.{role}", metadata[f"{architecture}.attention.head_count"])
    return heads[int(name.split(".")[1])] if isinstance(heads, list) else heads
