"""What a torch model will hold in memory, found without its weights: a twin without memory is built of its config,
and run on a few tokens to see what its cache keeps of them."""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.quantizers import AutoHfQuantizer

from packllm.engines.transformers import files, kv, packed
from packllm.engines.transformers.architecture import CARRIERS, text_part
from packllm.engines.transformers.gguf_header import check_header
from packllm.engines.transformers.quantization import bits_of
from packllm.errors import LoadError, loading, told
from packllm.machine import free_memory

LENGTHS = 128, 256
"""Tokens that the twin reads, to tell what grows with them."""

_RUNS = {"experts_implementation": "batched_mm"}
"""What lets a mixture of experts run without numbers."""


@dataclass(frozen=True)
class Layer:
    """What one layer's cache keeps: `fixed` bytes, and `each` of every token, of no more than the last `most`."""

    fixed: int
    each: int
    most: int | None = None

    def after(self, tokens: int) -> int:
        return self.fixed + self.each * (tokens if self.most is None else min(tokens, self.most))


@dataclass(frozen=True)
class Cache:
    """What the caches of one sequence hold, in bytes."""

    layers: tuple[Layer, ...]

    @property
    def token_bytes(self) -> int:
        """Of each token, as long as no window is full."""
        return sum(layer.each for layer in self.layers)

    def after(self, tokens: int) -> int:
        """After so many tokens."""
        return sum(layer.after(tokens) for layer in self.layers)


_known: dict[str, Cache] = {}
"""By class, configuration, type and whether sequences are packed."""


def cache_of(kind: Any, config: Any, dtype: torch.dtype, packs: bool | None = None) -> Cache:
    """What a model's cache will hold.

    Args:
        kind: its class, of transformers.
        packs: whether its sequences are packed: then windows keep all. None: as its twin tells.
    """
    key = f"{kind.__module__} {kind.__name__} {dtype} {packs} {config.to_json_string()}"
    if key not in _known:
        text = config.get_text_config(decoder=True)
        try:
            with torch.device("meta"):
                twin = kind._from_config(config, dtype=dtype, **_RUNS).eval()
            _known[key] = _grown(twin, text, packs)
        except Exception:  # what needs numbers to run
            _known[key] = Cache((Layer(0, _by_names(text) * dtype.itemsize),))
    return _known[key]


def _grown(twin: Any, config: Any, packs: bool | None) -> Cache:
    parameters = inspect.signature(twin.forward).parameters
    carrier = next(name for name in CARRIERS if name in parameters)
    if packs is None:
        packs = packed.can_pack(twin, config.vocab_size, carrier)
    found = []
    for count in LENGTHS:
        cache = kv.full(config) if packs else kv.new(config)
        with torch.inference_mode():
            ids = torch.ones(1, count, dtype=torch.long, device="meta")
            twin(input_ids=ids, use_cache=True, **{carrier: cache})
        found.append([_bytes(layer) for layer in cache.layers])
    few, many = LENGTHS
    layers = []
    for layer, before, after in zip(cache.layers, *found, strict=True):
        window = getattr(layer, "sliding_window", None)
        if window and window > few:
            layers.append(Layer(0, before // few, window - 1))
        else:
            each = (after - before) // (many - few)
            layers.append(Layer(after - each * many, each))
    return Cache(tuple(layers))


def _bytes(layer: Any) -> int:
    held = DynamicCache()
    held.layers = [layer]
    return sum(tensor.numel() * tensor.element_size() for tensor in kv.tensors(held))


def _by_names(config: Any) -> int:
    """Numbers of keys and values that all layers keep of a token, going by the usual names; where sizes differ between
    layers as many as the hidden states have."""
    try:
        heads = getattr(config, "num_attention_heads", 0)
        size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
        width = size * (getattr(config, "num_key_value_heads", None) or heads)
    except Exception:  # transformers refuses to tell one number where there are several
        width = getattr(config, "hidden_size", 0)
    return int(2 * getattr(config, "num_hidden_layers", 0) * width)


@dataclass(frozen=True)
class Footprint:
    """What a model will hold.

    Attributes:
        parameters: how many it has; tied ones once.
        weights: bytes of its weights.
        dtype: of the weights, or the method by which they are quantised.
        cache: of one sequence.
        window: most tokens that it reads, None if it has no limit.
        config: transformers'.
        tokenizer: None where it cannot be read.
        ends: ids that the model says end an answer.
        item: bytes of a number of what is added to it.
        note: what is not sure; "" if all is.
        engine: what runs it.
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


def of(source: str, dtype: str | torch.dtype, trust: bool, words: Mapping[str, Any]) -> Footprint:
    """What a folder, a hub id or a .gguf file will hold once it is loaded; no weights are read.

    Args:
        dtype: as for Pack.load, but for "fastest".
        words: further arguments of from_pretrained.

    Raises:
        LoadError: its config cannot be had or read, or does not fit its weights.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    what = f"model {source!r}"
    hub = {name: words[name] for name in files.HUB if name in words}
    weights, note = None, ""
    with ExitStack() as stack:
        stack.enter_context(loading(what))
        where: str = source
        if os.path.isfile(source):
            weights = check_header(Path(source))
            where = stack.enter_context(tempfile.TemporaryDirectory())  # what lies beside the file has no say
            hub = {"gguf_file": os.path.abspath(source)}
        elif (folder := _folder(source, hub)) is not None:
            try:
                weights = files.check_folder(folder)
            except LoadError as error:
                if not (folder / "config.json").is_file():
                    raise
                note = f"by its config alone: {error}"
            files.check_claims(files.read_json(folder / "config.json"), weights, what)
        config: Any = AutoConfig.from_pretrained(where, trust_remote_code=trust, **hub)
        files.check_decoder(config, what)
        chosen = _dtype(dtype, config, weights, "gguf_file" in hub)
        if "gguf_file" in hub and hasattr(config, "quantization_config"):  # how the file is; it is converted
            del config.quantization_config
        twin = text_part(files.twin(config, weights, what, trust, dtype=chosen, **_RUNS).eval())
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=trust, **hub)
        except Exception as error:
            tokenizer, note = None, note or f"its tokenizer cannot be read: {told(error)}"
        try:
            ends = GenerationConfig.from_pretrained(where, **hub).eos_token_id
        except Exception:  # there need not be one
            ends = getattr(twin.generation_config, "eos_token_id", None)
        size, kind, problem = _held(twin, chosen, weights, words.get("quantization_config"))
        text = config.get_text_config(decoder=True)
        return Footprint(
            parameters=sum(parameter.numel() for parameter in twin.parameters()),
            weights=size,
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
    """Bytes that are free where models go by this device_map, and where that is."""
    places = [device_map] if isinstance(device_map, str | int | torch.device) else []
    if not torch.cuda.is_available() or str(device_map) == "cpu":
        return free_memory(), "cpu"
    chosen = [place for place in places if str(place).startswith("cuda") or isinstance(place, int)]
    if str(device_map) == "cuda":
        chosen = [torch.device("cuda", torch.cuda.current_device())]
    free = [torch.cuda.mem_get_info(place)[0] for place in chosen or range(torch.cuda.device_count())]
    return sum(free), " + ".join(map(str, chosen)) or f"{len(free)} GPU"


def _folder(source: str, hub: Mapping[str, Any]) -> Path | None:
    """Where the files of a model are: its own folder, or that of the hub's cache with at least the config."""
    if os.path.isdir(source):
        return Path(source, str(hub.get("subfolder") or ""))
    from transformers.utils import cached_file

    try:
        found = cached_file(source, "config.json", **hub)
    except Exception as error:
        reason = f"it is not here, and so nothing is known of its size ({told(error)})"
        raise LoadError(f"model {source!r}: {reason}; download it, or name a folder") from error
    return Path(found).parent if found else None


def _dtype(dtype: str | torch.dtype, config: Any, weights: files.Weights | None, gguf: bool) -> torch.dtype:
    """The type that weights will be held in."""
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
    """(bytes of the weights of a model, their type or the method that quantises them, what stands in the way)."""
    whole = _bytes_of(twin, dtype)
    name = str(dtype).removeprefix("torch.")
    stored = getattr(twin.config, "quantization_config", None)
    if stored is not None:
        said = stored if isinstance(stored, Mapping) else vars(stored)
        name = str(getattr(said.get("quant_method"), "value", said.get("quant_method")))
        try:
            quantiser: Any = AutoHfQuantizer.from_config(stored, pre_quantized=True)
            quantiser.validate_environment(device_map=None)
        except Exception as error:
            return weights.size if weights else whole, name, f"it cannot be loaded here: {told(error)}"
        if getattr(quantiser.quantization_config, "dequantize", False):
            return whole, str(dtype).removeprefix("torch."), f"it is {name}, and held in full here"
        return (weights.size, name, "") if weights else (whole, name, f"it is {name}, and smaller than told here")
    if wanted is None:
        return whole, name, ""
    bits = bits_of(wanted)
    if bits is None:
        return whole, name, "it will be quantised, and smaller than told here"
    head = twin.get_output_embeddings()
    linear = [module.weight for module in twin.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    saved = sum(weight.numel() for weight in linear) * (dtype.itemsize - bits / 8)
    return int(whole - saved), f"{bits:.0f} bits", ""


def _bytes_of(twin: Any, dtype: torch.dtype) -> int:
    """Bytes that a model's weights take once it is loaded in this type; tied ones once."""
    plan = twin._get_dtype_plan(dtype) if hasattr(twin, "_get_dtype_plan") else {}  # modules that stay in float32
    kept = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in plan]
    total = 0
    for name, tensor in _tensors(twin):
        single = tensor.is_floating_point() and any(pattern.search(name) for pattern in kept)
        total += tensor.numel() * (4 if single else tensor.element_size())
    return total


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
