"""Predict the memory of a torch model without loading its weights: a copy of the model on the meta device is built from
the config, and reads a few tokens to measure its KV cache."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.quantizers import AutoHfQuantizer

from packllm.engines.transformers import files, kv, packed
from packllm.engines.transformers.architecture import CARRIERS, text_part
from packllm.engines.transformers.gguf import config_of
from packllm.engines.transformers.gguf_header import check_parts, parts
from packllm.engines.transformers.gguf_tokenizer import tokenizer_of
from packllm.engines.transformers.prepacked import second_layout
from packllm.engines.transformers.quantization import bits_of
from packllm.errors import LoadError, first_line, loading
from packllm.machine import free_memory

LENGTHS = 128, 256
"""Lengths in tokens of the two runs that show how the cache grows."""

_RUNS = {"experts_implementation": "batched_mm"}
"""Settings with which a mixture of experts runs on the meta device."""


@dataclass(frozen=True)
class Layer:
    """Size of one layer's cache in bytes: `fixed`, plus `each` per token, for at most the last `most` tokens."""

    fixed: int
    each: int
    most: int | None = None

    def after(self, tokens: int) -> int:
        return self.fixed + self.each * (tokens if self.most is None else min(tokens, self.most))


@dataclass(frozen=True)
class Cache:
    """Size of the caches of one sequence."""

    layers: tuple[Layer, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes per token, until a sliding window is full."""
        return sum(layer.each for layer in self.layers)

    def after(self, tokens: int) -> int:
        """Bytes after a number of tokens."""
        return sum(layer.after(tokens) for layer in self.layers)


_known: dict[str, Cache] = {}
"""Results by model class, config, dtype, and whether sequences are packed."""


def cache_of(kind: Any, config: Any, dtype: torch.dtype, packs: bool | None = None) -> Cache:
    """The size of a model's cache.

    Args:
        kind: the model class of transformers.
        packs: whether its sequences are packed, in which case sliding windows keep all tokens. None: test it.
    """
    key = f"{kind.__module__} {kind.__name__} {dtype} {packs} {config.to_json_string()}"
    if key not in _known:
        text = config.get_text_config(decoder=True)
        try:
            with torch.device("meta"):
                twin = kind._from_config(config, dtype=dtype, **_RUNS).eval()
            _known[key] = _grown(twin, text, packs)
        except Exception:  # models that cannot run on the meta device
            _known[key] = Cache((Layer(0, _by_names(text) * dtype.itemsize),))
    return _known[key]


def _grown(twin: Any, config: Any, packs: bool | None) -> Cache:
    parameters = inspect.signature(twin.forward).parameters
    carrier = next(name for name in CARRIERS if name in parameters)
    if packs is None:
        packs = packed.can_pack(twin, config.vocab_size, carrier)
    sizes = []
    for count in LENGTHS:
        cache = kv.full(config) if packs else kv.new(config)
        with torch.inference_mode():
            ids = torch.ones(1, count, dtype=torch.long, device="meta")
            twin(input_ids=ids, use_cache=True, **{carrier: cache})
        sizes.append([_bytes(layer) for layer in cache.layers])
    few, many = LENGTHS
    layers = []
    for layer, before, after in zip(cache.layers, *sizes, strict=True):
        window = getattr(layer, "sliding_window", None)
        if window and window > few:
            layers.append(Layer(0, before // few, window - 1))
        else:
            each = (after - before) // (many - few)
            layers.append(Layer(after - each * many, each))
    return Cache(tuple(layers))


def _bytes(layer: Any) -> int:
    cache = DynamicCache()
    cache.layers = [layer]
    return sum(tensor.numel() * tensor.element_size() for tensor in kv.tensors(cache))


def _by_names(config: Any) -> int:
    """Numbers in the keys and values of one token, in all layers, from the usual fields of the config. Where layers
    differ in size, each is counted with the hidden size."""
    try:
        heads = getattr(config, "num_attention_heads", 0)
        size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
        width = size * (getattr(config, "num_key_value_heads", None) or heads)
    except Exception:  # transformers raises if a field differs between layers
        width = getattr(config, "hidden_size", 0)
    return int(2 * getattr(config, "num_hidden_layers", 0) * width)


@dataclass(frozen=True)
class Footprint:
    """The memory that a model will take.

    Attributes:
        parameters: their number; tied parameters count once.
        weights: bytes of the weights.
        dtype: of the weights, or the quantization method.
        cache: size of the cache of one sequence.
        window: context window in tokens; None if it has no limit.
        config: the config of transformers.
        tokenizer: None if it cannot be loaded.
        ends: ids that end an answer, according to the model.
        item: bytes of a number of an adapter's weights.
        note: what is uncertain in these figures; "" if nothing is.
        engine: what runs the model.
    """

    parameters: int
    weights: int
    dtype: str
    cache: Cache
    window: int | None
    config: Any
    tokenizer: Any
    ends: frozenset[int]
    item: int
    note: str = ""
    engine: str = "transformers"


def of(
    source: str, dtype: str | torch.dtype, trust: bool, words: Mapping[str, Any], prepack: bool = False
) -> Footprint:
    """The memory that a folder, a hub id or a .gguf file will take once it is loaded. No weights are read.

    Args:
        dtype: as in Pack.load, without "fastest".
        words: further arguments of from_pretrained.
        prepack: as in Pack.load.

    Raises:
        LoadError: the config is not available, cannot be read, or does not fit the weights.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    what = f"model {source!r}"
    hub = {name: words[name] for name in files.HUB if name in words}
    weights, note, config = None, "", None
    with loading(what):
        if gguf := os.path.isfile(source):
            paths = parts(Path(source))
            weights, header = check_parts(paths)
            config = config_of(paths, header)
        elif (folder := _folder(source, hub)) is not None:
            try:
                weights = files.check_folder(folder)
            except LoadError as error:
                if not (folder / "config.json").is_file():
                    raise
                note = f"from its config alone: {error}"
            files.check_claims(files.read_json(folder / "config.json"), weights, what)
        if config is None:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **hub)
        files.check_decoder(config, what)
        chosen = _dtype(dtype, config, weights, gguf)
        if gguf and hasattr(config, "quantization_config"):  # describes the file, which is converted
            del config.quantization_config
        twin = text_part(files.twin(config, weights, what, trust, dtype=chosen, **_RUNS).eval())
        try:
            if gguf:
                tokenizer: Any = tokenizer_of(header.metadata, what)
            else:
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **hub)
        except Exception as error:
            tokenizer, note = None, note or f"its tokenizer cannot be read: {first_line(error)}"
        ends = getattr(twin.generation_config, "eos_token_id", None)
        if not gguf:
            with suppress(Exception):  # the file is optional
                ends = GenerationConfig.from_pretrained(source, **hub).eos_token_id
        size, kind, problem = _held(twin, chosen, weights, words.get("quantization_config"))
        text = config.get_text_config(decoder=True)
        return Footprint(
            parameters=sum(parameter.numel() for parameter in twin.parameters()),
            weights=size + (second_layout(twin) if prepack else 0),
            dtype=kind,
            cache=cache_of(type(twin), config, chosen),
            window=getattr(text, "max_position_embeddings", None),
            config=config,
            tokenizer=tokenizer,
            ends=frozenset([ends] if isinstance(ends, int) else ends or ()),
            item=chosen.itemsize,
            note=note or problem,
        )


def free_where(device_map: Any) -> tuple[int, str]:
    """Free bytes on the devices of a device_map, and the name of these devices."""
    places = [device_map] if isinstance(device_map, str | int | torch.device) else []
    if not torch.cuda.is_available() or str(device_map) == "cpu":
        return free_memory(), "cpu"
    chosen = [place for place in places if str(place).startswith("cuda") or isinstance(place, int)]
    if str(device_map) == "cuda":
        chosen = [torch.device("cuda", torch.cuda.current_device())]
    free = [torch.cuda.mem_get_info(place)[0] for place in chosen or range(torch.cuda.device_count())]
    return sum(free), " + ".join(map(str, chosen)) or f"{len(free)} GPU"


def _folder(source: str, hub: Mapping[str, Any]) -> Path | None:
    """The folder of a model's files: its own, or the hub's cache if that has at least the config. None: the hub has no
    config."""
    if os.path.isdir(source):
        return Path(source, str(hub.get("subfolder") or ""))
    from transformers.utils import cached_file

    try:
        config_path = cached_file(source, "config.json", **hub)
    except Exception as error:
        reason = f"it is not downloaded, so its size is unknown ({first_line(error)})"
        raise LoadError(f"model {source!r}: {reason}; download it first, or give a folder") from error
    return Path(config_path).parent if config_path else None


def _dtype(dtype: str | torch.dtype, config: Any, weights: files.Weights | None, gguf: bool) -> torch.dtype:
    """The dtype of the loaded weights."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    if gguf:
        return torch.float32
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return files.FLOATING.get(weights.floating if weights else "", torch.float32)


def _held(twin: Any, dtype: torch.dtype, weights: files.Weights | None, wanted: Any) -> tuple[int, str, str]:
    """(bytes of a model's weights, their dtype or quantization method, a problem or "")."""
    full_size = _bytes_of(twin, dtype)
    name = str(dtype).removeprefix("torch.")
    stored = getattr(twin.config, "quantization_config", None)
    if stored is not None:
        settings = stored if isinstance(stored, Mapping) else vars(stored)
        name = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
        try:
            quantiser: Any = AutoHfQuantizer.from_config(stored, pre_quantized=True)
            quantiser.validate_environment(device_map=None)
        except Exception as error:
            return weights.size if weights else full_size, name, f"it cannot be loaded here: {first_line(error)}"
        # compressed-tensors are decompressed at the first pass, unless FP8 kernels are asked for.
        unpacked = name == "compressed-tensors" and not getattr(quantiser, "use_fp8_kernel", False)
        if unpacked or getattr(quantiser.quantization_config, "dequantize", False):
            return full_size, str(dtype).removeprefix("torch."), f"it is stored as {name}, and dequantized here"
        return (
            (weights.size, name, "")
            if weights
            else (full_size, name, f"it is stored as {name}, and smaller than this figure")
        )
    if wanted is None:
        return full_size, name, ""
    bits = bits_of(wanted)
    if bits is None:
        return full_size, name, "it will be quantized, and smaller than this figure"
    head = twin.get_output_embeddings()
    linear = [module.weight for module in twin.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    saved = sum(weight.numel() for weight in linear) * (dtype.itemsize - bits / 8)
    return int(full_size - saved), f"{bits:.0f} bits", ""


def _bytes_of(twin: Any, dtype: torch.dtype) -> int:
    """Bytes of a model's weights when loaded in this dtype; tied ones count once."""
    plan = twin._get_dtype_plan(dtype) if hasattr(twin, "_get_dtype_plan") else {}  # modules that stay in float32
    float32_patterns = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in plan]
    total = 0
    for name, tensor in _tensors(twin):
        single = tensor.is_floating_point() and any(pattern.search(name) for pattern in float32_patterns)
        total += tensor.numel() * (4 if single else tensor.element_size())
    return total


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
