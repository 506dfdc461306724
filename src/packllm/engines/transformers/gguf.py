"""Convert a .gguf file into a folder of float32 safetensors, once, tensor by tensor. Only the file itself is read,
never the files beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from packllm.cache import cache_folder
from packllm.engines.transformers.files import check_size
from packllm.engines.transformers.gguf_header import Header, check_parts, parts
from packllm.engines.transformers.gguf_tokenizer import tokenizer_of
from packllm.errors import LoadError, PackError, loading

log = logging.getLogger("packllm")

_MANIFEST = "packllm-2.json"
"""The number counts what conversions hold: older ones are made again."""
_CHUNK = 2**22
_RACY = 2.0  # seconds; a file changed more recently may change again without new timestamps
_without_cache: dict[str, tempfile.TemporaryDirectory] = {}
"""Conversions that could not be cached, by key; deleted when the process ends."""


def converted(path: Path) -> Path:
    """The folder of a .gguf file's model as float32 safetensors, which the first call writes.

    It is kept in the cache folder under a hash of the whole file, and converted again if it is damaged. If the cache
    cannot be written, the conversion lasts for this process only.

    Raises:
        LoadError: the file is not a GGUF file, is damaged, or has an unsupported model; or there is no space for the
            conversion.
    """
    with loading(f"{str(path)!r}"):
        path, *others = parts(path)
        key = _key(path)
        if others:
            key = hashlib.sha256(" ".join([key, *map(_key, others)]).encode()).hexdigest()
    folder = cache_folder() / "gguf" / f"{path.stem[:80]}-{key[:16]}"
    if key in _without_cache:
        return Path(_without_cache[key].name)
    try:
        return _cached(path, folder)
    except OSError as error:
        log.warning(
            "%s is converted for this process only: cannot write the cache %s: %s", path.name, folder.parent, error
        )
    try:
        draft = tempfile.TemporaryDirectory(prefix="packllm-")
        _convert(path, Path(draft.name))
    except OSError as error:
        size = 4 * check_parts(parts(path))[0].elements
        raise LoadError(
            f"cannot convert {str(path)!r}: {error}; it takes {size / 2**20:,.0f} MiB in {str(folder.parent)!r} or "
            "the folder for temporary files; free some space, or set PACKLLM_CACHE to another folder"
        ) from error
    _without_cache[key] = draft
    return Path(draft.name)


def _cached(path: Path, folder: Path) -> Path:
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        complete = draft / "whole"
        complete.mkdir()
        _convert(path, complete)
        _seal(complete)
        with suppress(OSError):  # a damaged conversion
            os.rename(folder, draft / "damaged")
        # Renaming is atomic: another process never sees an incomplete folder.
        os.rename(complete, folder)
    except OSError:
        if not _is_whole(folder):  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


# The cache: keys of files, and complete conversions


def _key(path: Path) -> str:
    """Hash of the whole file. It is cached for the path until the file's times or size change."""
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    note = cache_folder() / "gguf-keys" / hashlib.sha256(identity.encode()).hexdigest()
    with suppress(OSError, ValueError):
        cached = note.read_text()
        if len(cached) == 64 and int(cached, 16) >= 0:
            return cached
    key = _digest(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _RACY:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(key)
    return key


def _digest(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    bar = tqdm(total=size, desc=f"Reading {path.name}", unit="B", unit_scale=True, disable=None, delay=2, leave=False)
    with bar, open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _seal(folder: Path) -> None:
    """Write the manifest of a complete conversion. It is written last, so that an incomplete one has none."""
    files = {file.name: [*_stat(file), _digest(file)] for file in folder.iterdir()}
    (folder / _MANIFEST).write_text(json.dumps(files))


def _is_whole(folder: Path) -> bool:
    """Whether a conversion matches its manifest: by each file's size and time, or else by its content."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())
        for name, (size, time_ns, digest) in files.items():
            now = _stat(folder / name)
            if now[0] != size or (now[1] != time_ns and _digest(folder / name) != digest):
                return False
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return bool(files)


def _stat(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


# The conversion


def _convert(path: Path, folder: Path) -> None:
    """Write the model of a .gguf file into a folder. An OSError with an errno means that the folder cannot be
    written."""
    from transformers import AutoModelForCausalLM

    paths, what = parts(path), f"cannot read {str(path)!r}"
    weights, header = check_parts(paths)
    # transformers reads from an empty folder, so that no config, template or code beside the file has an effect.
    with tempfile.TemporaryDirectory() as empty, _reading(path):
        words: dict[str, Any] = {"gguf_file": str(path.absolute()), "trust_remote_code": False}
        config = config_of(paths, header)
        check_size(config, weights, what)
        tokenizer_of(header.metadata, f"model {str(path)!r}").save_pretrained(folder)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        try:
            _write_each(paths, model, folder / "model.safetensors")
        except _UnknownNames as error:
            if len(paths) > 1:
                raise LoadError(
                    f"{what}: {error}, and it is in parts; merge them (llama-gguf-split --merge)"
                ) from error
            log.info("%s is converted in memory, not tensor by tensor: %s", path.name, error)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                empty, dtype=torch.float32, output_loading_info=True, **words
            )
            if missing := sorted(loaded[1]["missing_keys"]):
                raise LoadError(f"{what}: it has no tensor for {missing[0]}") from None
            model.load_state_dict(
                loaded[0].state_dict(), assign=True
            )  # transformers regards the loaded model as quantized
            model.save_pretrained(folder)
        settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        clean = type(model.config).from_dict({**settings, "architectures": [type(model).__name__], "dtype": "float32"})
        clean.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)


def config_of(paths: Sequence[Path], header: Header) -> Any:
    """The config that a model's header describes.

    Args:
        paths: its file, or all parts of it.
        header: of all of them.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as empty:
        config = AutoConfig.from_pretrained(empty, gguf_file=str(paths[0].absolute()), trust_remote_code=False)
    if len(paths) > 1:  # transformers has looked for a head in the first part alone
        config.tie_word_embeddings = "output.weight" not in header.shapes
    return config


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors into LoadErrors that name the file, except those of writing to the disk."""
    try:
        yield
    except PackError:
        raise
    except OSError as error:
        if error.errno:
            raise
        raise LoadError(f"cannot read {str(path)!r}: {error}") from error
    except BaseException as error:
        with loading(f"{str(path)!r}"):
            raise error


class _UnknownNames(Exception):
    """The table of tensor names does not cover this model."""


def _write_each(paths: Sequence[Path], model: Any, file: Path) -> None:
    """Write the tensors of a model's parts into one safetensors file under transformers' names. One tensor is in memory
    at a time.

    Args:
        model: the model on the meta device, which has the names and shapes.
    """
    path, table = paths[0], _table(paths, model)
    places, header = _layout(model)
    written: set[str] = set()
    with open(file, "wb") as out:
        out.write(header)
        for name, tensor in _tensors(path, table):
            if name not in places:
                continue
            shape, offset = places[name]
            if tuple(tensor.shape) != shape:
                raise LoadError(
                    f"cannot read {str(path)!r}: {name} has shape {tuple(tensor.shape)}, but its header implies {shape}"
                )
            out.seek(len(header) + offset)
            out.write(tensor.float().contiguous().numpy().data.cast("B"))
            written.add(name)
    if missing := sorted(places.keys() - written):
        if missing[0] in table.names.values():
            raise LoadError(f"cannot read {str(path)!r}: it has no tensor for {missing[0]}")
        raise _UnknownNames(f"no tensor for {missing[0]}")


def _layout(model: Any) -> tuple[dict[str, tuple[tuple[int, ...], int]], bytes]:
    """(shape and offset of each parameter, the header of a safetensors file of them in float32)."""
    places, entries, offset = {}, {}, 0
    for name, parameter in model.named_parameters():  # tied parameters appear once
        shape, end = tuple(parameter.shape), offset + 4 * parameter.numel()
        places[name] = shape, offset
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return places, struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class _Table:
    """How transformers reads the tensors of one file.

    Attributes:
        tensors: GGUFReader's, of all memory-mapped parts.
        names: transformers' name of each tensor, by its name in the file.
        processor: converts a tensor to transformers' layout.
        parsed: transformers' reading of the header; processors collect the experts' tensors in its "tensors".
    """

    tensors: list[Any]
    names: dict[str, str]
    processor: Any
    parsed: dict[str, Any]


def _table(paths: Sequence[Path], model: Any) -> _Table:
    try:
        from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
        from transformers.modeling_gguf_pytorch_utils import (
            GGUF_SUPPORTED_ARCHITECTURES,
            TENSOR_PROCESSORS,
            TensorProcessor,
            load_gguf_checkpoint,
            read_field,
        )
    except ImportError as error:
        raise _UnknownNames(str(error)) from error
    path, readers = paths[0], [GGUFReader(path) for path in paths]
    architecture = read_field(readers[0], "general.architecture")[0]
    kinds = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES or not kinds:
        raise _UnknownNames(f"architecture {architecture!r}")
    parsed = {**load_gguf_checkpoint(path, return_tensors=False), "tensors": {}}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
    name_map = get_tensor_name_map(kinds[0], model.config.num_hidden_layers)
    names: dict[str, str] = {}
    for full in model.state_dict():
        full = processor.preprocess_name(full)
        name, dot, last = full.rpartition(".")
        stem, suffix = (name, dot + last) if last in ("weight", "bias") else (full, "")
        # Some files have only the body of a model, whose names lack the first part.
        parts = stem.split(".")
        own_name = next((own for at in range(len(parts)) if (own := name_map.get_name(".".join(parts[at:])))), None)
        if own_name:
            names.setdefault(own_name + suffix, full)
        else:
            processor.perform_fallback_tensor_mapping(names, suffix, "", full)
    return _Table([tensor for reader in readers for tensor in reader.tensors], names, processor, parsed)


def _tensors(path: Path, table: _Table) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, float32 tensor) of all tensors of a file."""
    from gguf import dequantize

    merged = table.parsed["tensors"]
    ordered = sorted(table.tensors, key=lambda tensor: _block(tensor.name))
    block: list[str] = []
    for tensor in tqdm(ordered, desc=f"Converting {path.name} (once)", unit="tensor", disable=None, delay=1):
        if _block(tensor.name) != block:  # the processor merges experts within their block
            yield from _emptied(merged)
            block = _block(tensor.name)
        result = table.processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=table.names,
            parsed_parameters=table.parsed,
        )
        if result.name in table.names:
            yield table.names[result.name], torch.from_numpy(numpy.require(result.weights, numpy.float32, ["C", "W"]))
    yield from _emptied(merged)


def _block(name: str) -> list[str]:
    return name.split(".")[:2]


def _emptied(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    while tensors:
        yield tensors.popitem()
