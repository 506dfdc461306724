"""LoRA adapters for llama.cpp. A GGUF file is used as it is; a peft folder is first written to a temporary GGUF
file."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from packllm.engines.llama_cpp.files import File
from packllm.engines.transformers.gguf_header import Header, check_header
from packllm.engines.transformers.lora import Adapter, Factors
from packllm.errors import loading, refused

_IN_PAIRS = {"llama", "arcee", "granite", "granitemoe", "mistral3", "olmo", "smollm3"}
"""Architectures whose query and key rows are ordered differently in GGUF and in transformers. In GGUF, the two numbers
that are rotated together are neighbours; in transformers they are half a head apart."""
_NEOX = {2, 8, 40}  # llama.cpp's rope types with the row order of transformers


def attach(file: File, adapter: Adapter | Path) -> int:
    """Attach an adapter to the engine of a file.

    Args:
        adapter: an adapter that was read from its folder, or the path of a GGUF file.

    Returns:
        The adapter's index in the engine.

    Raises:
        LoadError: the adapter belongs to another model, or is more than plain LoRA.
    """
    if isinstance(adapter, Path):
        what = f"adapter {str(adapter)!r}"
        with loading(what):
            check_header(adapter)
            return file.engine.attach(file.model.attach(adapter, what), _digest(adapter))
    factors = adapter.factors()
    if factors is None:
        raise refused(adapter.what, "it is more than plain LoRA, which llama.cpp cannot run; use engine='transformers'")
    with loading(adapter.what), tempfile.TemporaryDirectory(prefix="packllm-") as folder:
        written = Path(folder, "adapter.gguf")
        _write(file, factors, adapter.what, written)
        return file.engine.attach(file.model.attach(written, adapter.what), _digest(written))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(file: File, factors: Factors, what: str, path: Path) -> None:
    """Write an adapter in llama.cpp's format. Its scale is part of the factors; llama.cpp uses 1 without an alpha."""
    import gguf

    metadata = file.header.metadata
    architecture = metadata["general.architecture"]
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise refused(what, f"the gguf package does not know its base's architecture {architecture!r}; update it")
    names = gguf.get_tensor_name_map(kind, metadata[f"{architecture}.block_count"])
    shapes = _shapes(file.header)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for module, (down, up) in factors.items():
        name = f"{names.get_name(module)}.weight"
        if name not in shapes:
            raise refused(what, f"it changes {module}, which its base lacks; is it of another model?")
        if shapes[name] != (down.shape[1], up.shape[0]):
            size = f"{up.shape[0]} x {down.shape[1]}, the base's weight {shapes[name][1]} x {shapes[name][0]}"
            raise refused(what, f"its update of {module} is of size {size}; is it of another model?")
        if heads := _heads(file, name, what):
            up = up.reshape(heads, 2, -1, up.shape[-1]).transpose(1, 2).reshape(up.shape)
        writer.add_tensor(f"{name}.lora_a", _array(down))
        writer.add_tensor(f"{name}.lora_b", _array(up))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(header: Header) -> Mapping[str, tuple[int, ...]]:
    return {name: shape for name, shape, _, _ in header.tensors}


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


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.float().numpy())
