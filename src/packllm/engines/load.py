"""From what a user names (hub id, folder, .gguf file, base+adapter, each as name=... too) to members."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from packllm.chat.prompt import Encoder
from packllm.engines.llama_cpp import adapters as llama_cpp_adapters
from packllm.engines.llama_cpp import files as llama_cpp
from packllm.engines.llama_cpp.native import VERSION, installed, library
from packllm.engines.member import Author, Member
from packllm.engines.server.address import is_address
from packllm.engines.server.member import connect
from packllm.engines.transformers import files, lora
from packllm.engines.transformers.adapters import Adapters
from packllm.engines.transformers.engine import Engine
from packllm.engines.transformers.footprint import Cache, Footprint, Layer
from packllm.engines.transformers.footprint import of as footprint
from packllm.engines.transformers.gguf import converted
from packllm.engines.transformers.gguf_header import MAGIC, check_header
from packllm.engines.transformers.merged_adapters import merge
from packllm.engines.transformers.precision import fastest
from packllm.engines.transformers.quantization import config_of
from packllm.errors import LoadError, OptionError, loading, refused

__all__ = ["Loader", "as_list", "is_spec", "without_secrets"]

log = logging.getLogger("packllm")

ENGINES = ("llama.cpp", "transformers")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMS = "a hub id, a folder, a .gguf file or base+adapter"
_REMOTE = re.compile(r"(?:([\w.-]+)=)?ray(?:\[([^]]*)\])?:(.+)")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Loader:
    """Loads members; a base that several adapters share is read from disk once.

    Args:
        dtype: "auto" (as stored), "fastest" (float32 or bfloat16, as measured once on this CPU; as stored where
            there is an accelerator), "float32", "float16", "bfloat16" or a torch dtype.
        device_map: as in accelerate; "auto" spreads over the accelerators, or stays on the CPU.
        trust_remote_code: run code that comes with a hub model.
        model_kwargs: further arguments of transformers' from_pretrained, such as revision, token,
            attn_implementation or quantization_config.
        quantization: as quantization.config_of.
        max_memory: accelerate's mapping of devices to sizes.
        engine: what runs .gguf files: "llama.cpp", "transformers" (converted to float32 once), or None: the first
            where it is installed and no argument is meant for the second.
    """

    def __init__(
        self,
        dtype: str | torch.dtype = "auto",
        device_map: Any = "auto",
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        quantization: Any = None,
        max_memory: Mapping[Any, Any] | None = None,
        engine: str | None = None,
    ) -> None:
        if engine not in (None, *ENGINES):
            raise OptionError(f"engine={engine!r} is unknown; valid: {', '.join(ENGINES)}")
        as_stored = dtype in ("auto", "fastest") and not model_kwargs and quantization is None and max_memory is None
        if engine == "llama.cpp" and not as_stored:
            raise OptionError(
                "engine='llama.cpp' runs a file as it is: dtype, model_kwargs and quantization are for transformers"
            )
        if engine == "llama.cpp":
            library()
        self._engine = engine
        self._by_default = as_stored
        self._files: dict[str, llama_cpp.File] = {}
        self._asked = dtype, device_map, trust_remote_code, model_kwargs, quantization, max_memory, engine
        self._words = files.check_model_kwargs(model_kwargs)
        self._hub = {name: self._words[name] for name in files.HUB if name in self._words}
        if not isinstance(dtype, str | torch.dtype):
            raise OptionError(f"dtype={dtype!r} is unknown; valid: auto, fastest, {', '.join(_DTYPES)}")
        if isinstance(dtype, str) and dtype not in ("auto", "fastest", *_DTYPES):
            raise OptionError(f"dtype={dtype!r} is unknown; valid: auto, fastest, {', '.join(_DTYPES)}")
        if dtype == "fastest":
            dtype = "auto" if torch.accelerator.is_available() else fastest()
        self._dtype = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        alone = device_map == "auto" and not torch.accelerator.is_available() and max_memory is None
        self.device_map = "cpu" if alone else device_map
        given = {"quantization_config": config_of(quantization, self.device_map), "max_memory": max_memory}
        for name, value in given.items():
            if value is not None and name in self._words:
                raise OptionError(f"model_kwargs[{name!r}] and an argument of Pack.load say the same; give one of them")
            self._words |= {} if value is None else {name: value}
        self._trust = trust_remote_code
        self._bases: dict[str, _Base] = {}

    def members(self, models: Any) -> list[Member]:
        """One member per model, with names that differ.

        Args:
            models: as for Pack.load.

        Raises:
            LoadError: nothing to load, a path that does not exist, files that are no model.
        """
        listed = [self._remote(model) for model in as_list(models)]
        servers = {i for i, model in enumerate(listed) if is_spec(model) and is_address(os.fspath(model))}
        specs = {
            i: self.spec(os.fspath(model)) for i, model in enumerate(listed) if is_spec(model) and i not in servers
        }
        uses = Counter(spec.key for spec in specs.values())
        members: list[Any] = []
        for i, model in enumerate(listed):
            member = (
                connect(os.fspath(model))
                if i in servers
                else self._member(specs[i], uses[specs[i].key] > 1)
                if i in specs
                else _member_of(model, i)
            )
            taken = {other.name for other in members}
            name, count = member.name, 2
            while name in taken:
                name, count = f"{member.name}-{count}", count + 1
            if name != member.name:
                member = copy.copy(member)  # the caller's own, or another pack's, keeps its name
                member.name = name
            members.append(member)
        return members

    def _remote(self, model: Any) -> Any:
        """A member in a worker of a Ray cluster for "ray:SPEC" (engines/ray.py); anything else as it is."""
        named = of_worker(model)
        if named is None:
            return model
        from packllm.engines import ray

        name, asked, spec = named.groups()
        return ray.member(partial(_alone, self._asked, spec), spec, name, ray.resources(asked or ""))

    def spec(self, text: str) -> Spec:
        """What a text names. An adapter by itself is one on the base that its config names."""
        spec = Spec.of(text)
        if spec.adapter is not None or not (folder := self._adapter_folder(spec.base)):
            return spec
        with loading(f"adapter {spec.base!r}"):
            base = lora.read_config(folder).get("base_model_name_or_path")
        here = [base, os.path.join(folder, base)] if isinstance(base, str) and base else []
        found = next((path for path in here if os.path.exists(path)), None)
        if found is None and not (here and _HUB_ID.fullmatch(str(base))):
            raise LoadError(
                f"{spec.base!r} is an adapter, and its base {base!r} is not found here; name the base: BASE+{spec.base}"
            )
        return Spec(spec.name, found or str(base), spec.base)

    def _adapter_folder(self, source: str) -> Path | None:
        """The folder of an adapter; None for anything else."""
        folder = Path(source)
        if folder.is_dir():
            if not (folder / lora.CONFIG).is_file():
                return None
            if any(path.suffix == ".safetensors" and path.name != lora.WEIGHTS for path in folder.iterdir()):
                raise LoadError(
                    f"{source!r} holds a model and an adapter; move the adapter_* files to a folder of their own, and "
                    "name what is meant: MODEL or MODEL+ADAPTER"
                )
            return folder
        if folder.exists():
            return None
        from transformers.utils import cached_file

        try:
            words: dict[str, Any] = {**self._hub, "_raise_exceptions_for_missing_entries": False}
            if cached_file(source, "config.json", **words) is None:
                found = cached_file(source, lora.CONFIG, **words)
                return Path(found).parent if found else None
        except Exception:  # no such repository, no network: reading the model will say so
            return None
        return None

    def footprint(self, spec: Spec) -> Footprint:
        """What the base of a spec will hold in memory; no weights are read."""
        found = footprint(spec.base, self._dtype, self._trust, self._words)
        if not (os.path.isfile(spec.base) and self._as_it_is()):
            return found
        weights, token = llama_cpp.held(_gguf(spec.base))
        return replace(found, engine="llama.cpp", weights=weights, dtype="as stored", cache=Cache((Layer(0, token),)))

    def adapter(self, name: str, weights: bool = True) -> lora.Adapter:
        """The files of an adapter, see lora.open_adapter."""
        return lora.open_adapter(name, self._hub, weights)

    def _member(self, spec: Spec, shared: bool) -> Member:
        """A member of the base's own engine, if others share it; an adapter used alone is merged, which is faster."""
        if os.path.isfile(spec.base) and (path := _gguf(spec.base)):
            if self._as_it_is():
                return self._by_llama_cpp(spec)
            if self._engine is None:
                _tell_cost(path)
        if spec.adapter is None:
            base = self._base(spec)
            return Member(base.model, base.tokenizer, spec.name, base.encoder, engine=base.engine)
        adapter = self.adapter(spec.adapter)
        factors = adapter.factors()
        base = self._base(spec)
        tokenizer, encoder = base.tokenizer, base.encoder
        with loading(f"the tokenizer of {adapter.what}"):
            own = files.own_tokenizer(adapter.folder, base.tokenizer, base.model.config)
            if own is not None:
                tokenizer, encoder = own, _encoder(own)
        with loading(adapter.what):
            if factors is None or not shared or not encoder.vocabulary.same_as(base.encoder.vocabulary):
                return Member(merge(base.model, adapter), tokenizer, spec.name, encoder)
            if base.engine.adapters is None:
                base.engine.adapters = Adapters(base.model)
            index = base.engine.adapters.attach(factors, adapter.what)
            return Member(base.model, tokenizer, spec.name, encoder, engine=base.engine, adapter=index)

    def _as_it_is(self) -> bool:
        """Whether llama.cpp runs .gguf files."""
        if self._engine is not None:
            return self._engine == "llama.cpp"
        return self._by_default and installed() == VERSION

    def _by_llama_cpp(self, spec: Spec) -> Member:
        if spec.key not in self._files:
            self._files[spec.key] = llama_cpp.read(Path(spec.base))
        file = self._files[spec.key]
        tokenizer, encoder, index = file.tokenizer, file.encoder, None
        if spec.adapter is not None and os.path.isfile(spec.adapter):
            index = llama_cpp_adapters.attach(file, Path(spec.adapter))
        elif spec.adapter is not None:
            adapter = lora.open_adapter(spec.adapter, self._hub)
            with loading(f"the tokenizer of {adapter.what}"):
                own = files.own_tokenizer(adapter.folder, file.tokenizer)
                if own is not None:
                    tokenizer, encoder = own, _encoder(own)
            if not encoder.vocabulary.same_as(file.encoder.vocabulary):
                raise refused(adapter.what, "it adds tokens to its base's vocabulary, which llama.cpp cannot")
            index = llama_cpp_adapters.attach(file, adapter)
        return Member(None, tokenizer, spec.name, encoder, engine=file.engine, adapter=index)

    def _base(self, spec: Spec) -> _Base:
        if spec.key not in self._bases:
            if os.path.isfile(spec.base):
                source: str | Path = converted(_gguf(spec.base))
                words = {name: word for name, word in self._words.items() if name not in files.HUB}
            else:
                source, words = spec.base, self._words
            try:
                model, tokenizer = files.read(source, self._dtype, self.device_map, self._trust, words)
            except LoadError as error:
                if spec.adapter is None:
                    raise
                raise LoadError(f"{error} (the base of adapter {spec.adapter!r})") from error
            with loading(f"model {spec.base!r}"):
                encoder = _encoder(tokenizer)
                self._bases[spec.key] = _Base(model, tokenizer, encoder, Engine(model, encoder.vocabulary))
        return self._bases[spec.key]


def _tell_cost(path: Path) -> None:
    """Say what it costs to run a .gguf file in transformers, where llama.cpp is not at hand."""
    if (found := installed()) == VERSION:
        return
    log.warning(
        "%s runs in transformers: it is written to the cache once as float32, %s, and held in memory so; "
        "pip install packllm[llama-cpp] %sruns it as it is",
        path.name,
        f"{4 * check_header(path).elements / 2**20:,.0f} MiB",
        f"(llama-cpp-python {VERSION}, not {found}) " if found else "",
    )


def of_worker(model: Any) -> re.Match[str] | None:
    """Name, resources and spec of a "ray:SPEC"; None for anything else."""
    return _REMOTE.fullmatch(os.fspath(model)) if is_spec(model) else None


def _alone(asked: tuple[Any, ...], spec: str) -> Member:
    """The member of one spec, by a loader of its own."""
    return Loader(*asked).members([spec])[0]


def as_list(models: Any) -> list[Any]:
    """What Pack.load takes, as a list: one model need not be in one.

    Raises:
        LoadError: nothing, or something that names no models.
    """
    if is_spec(models) or isinstance(models, Author) or _parts_of(models) is not None:
        return [models]
    if isinstance(models, bytes | bytearray | Mapping) or not isinstance(models, Iterable):
        raise LoadError(f"models={repr(models)[:200]} names no models; give a list of {_KINDS}")
    if not (listed := list(models)):
        raise LoadError("models is empty; name at least one hub id, folder, .gguf file or base+adapter")
    return listed


def without_secrets(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """model_kwargs as they may be written down: without the hub's token, and settings of quantisation as dicts."""
    kept = {
        name: word.to_dict() if hasattr(word, "to_dict") else word
        for name, word in (model_kwargs or {}).items()
        if name != "token"
    }
    return kept or None


def is_spec(model: Any) -> bool:
    """Whether it is a text or path that names a model."""
    return isinstance(model, str | os.PathLike) and isinstance(os.fspath(model), str)


_KINDS = (
    "hub ids, folders, .gguf files, base+adapter, ray:SPEC, (model, tokenizer) pairs, transformers pipelines or Members"
)


def _parts_of(model: Any) -> tuple[Any, Any] | None:
    """(model, tokenizer) of a pair or of a transformers pipeline; None for anything else."""
    pair = model if isinstance(model, tuple | list) else (getattr(model, "model", None), getattr(model, "tokenizer", 0))
    if len(pair) == 2 and isinstance(pair[0], torch.nn.Module) and not isinstance(pair[1], torch.nn.Module):
        return pair[0], pair[1]
    return None


def _member_of(model: Any, at: int) -> Author:
    """A member of an object that is loaded already; it is put into evaluation, without gradients."""
    if isinstance(model, Author):
        return model
    parts = None if isinstance(model, torch.nn.Module) else _parts_of(model)
    if parts is None:
        lone = isinstance(model, torch.nn.Module)
        remedy = "give its tokenizer too: (model, tokenizer)" if lone else f"give {_KINDS}"
        raise LoadError(f"models[{at}] is {model if model is None else type(model).__name__}; {remedy}")
    loaded, tokenizer = parts
    what = f"models[{at}], a {type(loaded).__name__}"
    with loading(what):
        if not hasattr(loaded, "config") or isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
            raise LoadError(f"{what} with a {type(tokenizer).__name__} is no transformers model and its tokenizer")
        files.check_decoder(loaded.config, what)
        files.check_finite(dict(loaded.named_parameters()), what)
        name = _name(str(getattr(loaded.config, "name_or_path", "") or type(loaded).__name__))
        return Member(loaded, tokenizer, name, _encoder(tokenizer))


def _encoder(tokenizer: Any) -> Encoder:
    """Of a tokenizer that works: what is odd in it shows when it is used, and is better said at loading."""
    encoder = Encoder(tokenizer)
    encoder.encode("a")
    return encoder


@dataclass(frozen=True)
class _Base:
    """A model as loaded, with the engine of the members that share it."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    engine: Engine


@dataclass(frozen=True)
class Spec:
    """What a user names: a base and perhaps an adapter, each a path that exists or something that may be a hub id."""

    name: str
    base: str
    adapter: str | None

    @property
    def key(self) -> str:
        """The base's own name, however it was written."""
        return os.path.realpath(self.base) if os.path.exists(self.base) else self.base

    @classmethod
    def of(cls, text: str) -> Spec:
        named = None if os.path.exists(text) else re.match(r"([\w.-]+)=", text)
        base, adapter = _split(text[named.end() :] if named else text)
        return cls(named[1] if named else _name(adapter or base), base, adapter)


def _split(spec: str) -> tuple[str, str | None]:
    whole = os.path.expanduser(spec)
    if os.path.exists(whole):
        return whole, None
    base, plus, adapter = spec.rpartition("+")
    parts = (os.path.expanduser(base), os.path.expanduser(adapter)) if plus else (whole, None)
    for part in parts:
        if part is None or os.path.exists(part):
            continue
        if part.endswith(".gguf"):
            raise LoadError(f"model file {part!r} does not exist")
        if engine := re.match(r"([A-Za-z][\w.-]+):", part):
            raise LoadError(f"model {part!r} names no engine that there is: {engine[1]!r}; give {_FORMS}")
        if not _HUB_ID.fullmatch(part):
            raise LoadError(f"model {part!r} does not exist; give {_FORMS}")
    return parts


def _gguf(path: str) -> Path:
    """A file that is to be a GGUF file; LoadError says what else it is."""
    file = Path(path)
    with loading(f"{path!r}"):
        if files.is_lfs_pointer(file):
            raise LoadError(f"{path!r} is a git-lfs pointer instead of the file; run `git lfs pull` there")
        with open(file, "rb") as opened:
            magic = opened.read(len(MAGIC)) == MAGIC
    if file.suffix.lower() == ".gguf" or magic:
        return file
    kind = f"a {file.suffix} file" if file.suffix else "a file"
    remedy = "name its folder" if file.suffix in (".safetensors", ".json") else "give a folder or a .gguf file"
    raise LoadError(f"{path!r} is {kind}, which is no model by itself; {remedy}")


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path)).removesuffix(".gguf")
