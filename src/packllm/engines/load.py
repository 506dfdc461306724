"""Loads members from their names: a hub id, folder, .gguf file, server or base+adapter, each also as name=..."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from packllm.chat.prompt import Encoder
from packllm.engines.llama_cpp import adapters as llama_cpp_adapters
from packllm.engines.llama_cpp import files as llama_cpp
from packllm.engines.llama_cpp.native import VERSION, binding, installed
from packllm.engines.member import Author, Member
from packllm.engines.server.address import is_address
from packllm.engines.server.member import connect
from packllm.engines.spec import HUB_ID, Spec, gguf, is_spec, name_of, of_worker
from packllm.engines.transformers import files, lora
from packllm.engines.transformers.adapters import Adapters
from packllm.engines.transformers.engine import Engine
from packllm.engines.transformers.footprint import Footprint
from packllm.engines.transformers.footprint import of as footprint
from packllm.engines.transformers.gguf import converted
from packllm.engines.transformers.gguf_header import check_parts, parts
from packllm.engines.transformers.merged_adapters import merge
from packllm.engines.transformers.precision import fastest
from packllm.engines.transformers.quantization import config_of
from packllm.errors import LoadError, OptionError, loading, refused

log = logging.getLogger("packllm")

ENGINES = ("llama.cpp", "transformers")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Loader:
    """Loads members. A base that several adapters share is read from disk once.

    Args:
        dtype: "auto" (as stored), "fastest" (on a CPU, float32 or bfloat16, measured once; as stored with an
            accelerator), "float32", "float16", "bfloat16" or a torch dtype.
        device_map: as in accelerate; "auto" uses the accelerators, or the CPU if there are none.
        trust_remote_code: whether to run code that comes with a hub model.
        model_kwargs: further arguments of transformers' from_pretrained, such as revision, token,
            attn_implementation or quantization_config.
        quantization: see quantization.config_of.
        max_memory: accelerate's mapping of devices to sizes.
        engine: the engine of .gguf files: "llama.cpp", "transformers" (converted to float32 once), or None: llama.cpp
            if it is installed and no argument is only for transformers.
        prepack: as in Pack.load.
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
        prepack: bool = False,
    ) -> None:
        trust_remote_code, prepack = _switch("trust_remote_code", trust_remote_code), _switch("prepack", prepack)
        if engine not in (None, *ENGINES):
            raise OptionError(f"engine={engine!r} is unknown; valid: {', '.join(ENGINES)}")
        as_stored = dtype in ("auto", "fastest") and not (model_kwargs or quantization or max_memory or prepack)
        if engine == "llama.cpp" and not as_stored:
            raise OptionError(
                "engine='llama.cpp' cannot convert a file: dtype, model_kwargs, quantization and prepack are for "
                "transformers; leave them out, or use engine='transformers'"
            )
        if engine == "llama.cpp":
            binding()
        self._engine, self.prepack = engine, prepack
        self._by_default = as_stored
        self._files: dict[str, llama_cpp.File] = {}
        self._asked = dtype, device_map, trust_remote_code, model_kwargs, quantization, max_memory, engine, prepack
        self._words = files.check_model_kwargs(model_kwargs)
        self._hub = {name: self._words[name] for name in files.HUB if name in self._words}
        if not isinstance(dtype, str | torch.dtype):
            raise OptionError(f"dtype={dtype!r} is unknown; valid: auto, fastest, {', '.join(_DTYPES)}")
        if isinstance(dtype, str) and dtype not in ("auto", "fastest", *_DTYPES):
            raise OptionError(f"dtype={dtype!r} is unknown; valid: auto, fastest, {', '.join(_DTYPES)}")
        if dtype == "fastest":
            dtype = "auto" if torch.accelerator.is_available() else fastest()
        self._dtype = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        on_cpu = device_map == "auto" and not torch.accelerator.is_available() and max_memory is None
        self.device_map = "cpu" if on_cpu else device_map
        arguments = {"quantization_config": config_of(quantization, self.device_map), "max_memory": max_memory}
        for name, value in arguments.items():
            if value is not None and name in self._words:
                raise OptionError(f"model_kwargs[{name!r}] and an argument of Pack.load say the same; give one of them")
            self._words |= {} if value is None else {name: value}
        self.trust = trust_remote_code
        self._bases: dict[str, _Base] = {}

    def members(self, models: Any) -> list[Member]:
        """One member per model, with different names.

        Args:
            models: as for Pack.load.

        Raises:
            LoadError: no models, a path that does not exist, or files that are no model.
        """
        models_ = [self._remote(model) for model in as_list(models)]
        servers = {i for i, model in enumerate(models_) if is_spec(model) and is_address(os.fspath(model))}
        specs = {
            i: self.spec(os.fspath(model)) for i, model in enumerate(models_) if is_spec(model) and i not in servers
        }
        uses = Counter(spec.key for spec in specs.values())
        members: list[Any] = []
        for i, model in enumerate(models_):
            member = (
                connect(os.fspath(model))
                if i in servers
                else self._member(specs[i], uses[specs[i].key] > 1)
                if i in specs
                else _member_of(model, i)
            )
            names = {other.name for other in members}
            name, count = member.name, 2
            while name in names:
                name, count = f"{member.name}-{count}", count + 1
            if name != member.name:
                member = copy.copy(member)  # a copy: the object may be in another pack too, with its name
                member.name = name
            members.append(member)
        for engine in {id(member.engine): member.engine for member in members if isinstance(member, Member)}.values():
            if self.prepack and isinstance(engine, Engine):
                engine.prepack()
        return members

    def _remote(self, model: Any) -> Any:
        """For "ray:SPEC" a member in a worker of a Ray cluster (engines/ray.py); any other model unchanged."""
        match = of_worker(model)
        if match is None:
            return model
        from packllm.engines import ray

        name, resources, spec = match.groups()
        return ray.member(partial(_alone, self._asked, spec), spec, name, ray.resources(resources or ""))

    def spec(self, text: str) -> Spec:
        """Parse the name of a model. The base of a lone adapter is the one that its config names."""
        spec = Spec.of(text)
        if spec.adapter is not None or not (folder := self._adapter_folder(spec.base)):
            return spec
        with loading(f"adapter {spec.base!r}"):
            base = lora.read_config(folder).get("base_model_name_or_path")
        candidates = [base, os.path.join(folder, base)] if isinstance(base, str) and base else []
        base_path = next((path for path in candidates if os.path.exists(path)), None)
        if base_path is None and not (candidates and HUB_ID.fullmatch(str(base))):
            raise LoadError(
                f"{spec.base!r} is an adapter, and its base {base!r} is not on this machine; name it: BASE+{spec.base}"
            )
        return Spec(spec.name, base_path or str(base), spec.base)

    def _adapter_folder(self, source: str) -> Path | None:
        """The folder of an adapter; None for anything else."""
        folder = Path(source)
        if os.path.isdir(folder):  # unlike Path's, false of a name that is too long
            if not (folder / lora.CONFIG).is_file():
                return None
            if any(path.suffix == ".safetensors" and path.name != lora.WEIGHTS for path in folder.iterdir()):
                raise LoadError(
                    f"{source!r} contains a model and an adapter; move the adapter_* files to a folder of their own, "
                    "and name the one to load: MODEL or MODEL+ADAPTER"
                )
            return folder
        if os.path.exists(folder):
            return None
        from transformers.utils import cached_file

        try:
            arguments: dict[str, Any] = {**self._hub, "_raise_exceptions_for_missing_entries": False}
            if cached_file(source, "config.json", **arguments) is None:
                config_file = cached_file(source, lora.CONFIG, **arguments)
                return Path(config_file).parent if config_file else None
        except Exception:  # no such repository or no network: loading the model will report it
            return None
        return None

    def footprint(self, spec: Spec) -> Footprint:
        """The memory that the base of a spec will need; no weights are read."""
        if os.path.isfile(spec.base) and self._as_it_is():
            with loading(f"model {spec.base!r}"):
                return llama_cpp.footprint(gguf(spec.base))
        return footprint(spec.base, self._dtype, self.trust, self._words, self.prepack)

    def adapter(self, name: str, weights: bool = True) -> lora.Adapter:
        """The files of an adapter, see lora.open_adapter."""
        if os.path.isfile(name) and gguf(name):
            told = "GGUF adapters run in llama.cpp alone (packllm[llama-cpp]), on a .gguf base; or give its folder"
            raise refused(f"adapter {name!r}", told)
        return lora.open_adapter(name, self._hub, weights)

    def _member(self, spec: Spec, shared: bool) -> Member:
        """A member with the base's engine, if others share it. A single adapter is merged, which is faster."""
        if os.path.isfile(spec.base) and (path := gguf(spec.base)):
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
            adapter_tokenizer = files.own_tokenizer(adapter.folder, base.tokenizer, base.model.config)
            if adapter_tokenizer is not None:
                tokenizer, encoder = adapter_tokenizer, _encoder(adapter_tokenizer)
        with loading(adapter.what):
            if factors is None or not shared or not encoder.vocabulary.same_as(base.encoder.vocabulary):
                return Member(merge(base.model, adapter), tokenizer, spec.name, encoder)
            if base.engine.adapters is None:
                base.engine.adapters = Adapters(base.model)
            index = base.engine.adapters.attach(factors, adapter.what)
            return Member(base.model, tokenizer, spec.name, encoder, engine=base.engine, adapter=index)

    def _as_it_is(self) -> bool:
        """Whether llama.cpp runs .gguf files, without conversion."""
        if self._engine is not None:
            return self._engine == "llama.cpp"
        return self._by_default and installed() == VERSION

    def _by_llama_cpp(self, spec: Spec) -> Member:
        if spec.key not in self._files:
            self._files[spec.key] = llama_cpp.read(Path(spec.base))
        file = self._files[spec.key]
        tokenizer, encoder, index = file.tokenizer, file.encoder, None
        if spec.adapter is not None and os.path.isfile(spec.adapter):
            index = llama_cpp_adapters.attach(file, gguf(spec.adapter))
        elif spec.adapter is not None:
            adapter = self.adapter(spec.adapter)
            with loading(f"the tokenizer of {adapter.what}"):
                adapter_tokenizer = files.own_tokenizer(adapter.folder, file.tokenizer)
                if adapter_tokenizer is not None:
                    tokenizer, encoder = adapter_tokenizer, _encoder(adapter_tokenizer)
            if not encoder.vocabulary.same_as(file.encoder.vocabulary):
                raise refused(adapter.what, "it adds tokens to its base's vocabulary, which llama.cpp cannot")
            index = llama_cpp_adapters.attach(file, adapter)
        return Member(None, tokenizer, spec.name, encoder, engine=file.engine, adapter=index)

    def _base(self, spec: Spec) -> _Base:
        if spec.key not in self._bases:
            if os.path.isfile(spec.base):
                source: str | Path = converted(gguf(spec.base))
                arguments = {name: value for name, value in self._words.items() if name not in files.HUB}
            else:
                source, arguments = spec.base, self._words
            try:
                model, tokenizer = files.read(source, self._dtype, self.device_map, self.trust, arguments)
            except LoadError as error:
                if spec.adapter is None:
                    raise
                raise LoadError(f"{error} (the base of adapter {spec.adapter!r})") from error
            with loading(f"model {spec.base!r}"):
                encoder = _encoder(tokenizer)
                self._bases[spec.key] = _Base(model, tokenizer, encoder, Engine(model, encoder.vocabulary))
        return self._bases[spec.key]


def _switch(name: str, value: Any) -> bool:
    """A loading argument that is on or off; the command line gives words, and "false" must not turn it on."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise OptionError(f"{name}={value!r} must be True or False") from None


def _tell_cost(path: Path) -> None:
    """Log the cost of a .gguf file in transformers, if llama.cpp is not installed."""
    if (version := installed()) == VERSION:
        return
    log.warning(
        "%s runs in transformers: it is converted to float32 in the cache once, %s, and needs as much memory; "
        "pip install packllm[llama-cpp] %savoids both",
        path.name,
        f"{4 * check_parts(parts(path))[0].elements / 2**20:,.0f} MiB",
        f"(llama-cpp-python {VERSION}, not {version}) " if version else "",
    )


def _alone(asked: tuple[Any, ...], spec: str) -> Member:
    """The member of one spec, loaded by its own loader."""
    return Loader(*asked).members([spec])[0]


def as_list(models: Any) -> list[Any]:
    """The argument of Pack.load as a list; it may also be a single model.

    Raises:
        LoadError: the list is empty, or the argument names no models.
    """
    if is_spec(models) or isinstance(models, Author) or _parts_of(models) is not None:
        return [models]
    if isinstance(models, bytes | bytearray | Mapping) or not isinstance(models, Iterable):
        raise LoadError(f"models={repr(models)[:200]} names no models; give a list of {_KINDS}")
    if not (models_ := list(models)):
        raise LoadError("models is empty; name at least one hub id, folder, .gguf file or base+adapter")
    return models_


def without_secrets(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """model_kwargs for a record: without the hub's token, with quantisation settings as dicts."""
    arguments = {
        name: value.to_dict() if hasattr(value, "to_dict") else value
        for name, value in (model_kwargs or {}).items()
        if name != "token"
    }
    return arguments or None


_KINDS = (
    "hub ids, folders, .gguf files, base+adapter, ray:SPEC, (model, tokenizer) pairs, transformers pipelines or Members"
)


def _parts_of(model: Any) -> tuple[Any, Any] | None:
    """(model, tokenizer) from such a pair or a transformers pipeline; None for anything else."""
    pair = model if isinstance(model, tuple | list) else (getattr(model, "model", None), getattr(model, "tokenizer", 0))
    if len(pair) == 2 and isinstance(pair[0], torch.nn.Module) and not isinstance(pair[1], torch.nn.Module):
        return pair[0], pair[1]
    return None


def _member_of(model: Any, at: int) -> Author:
    """A member made of a loaded object; the model is put into evaluation mode without gradients."""
    if isinstance(model, Author):
        return model
    parts = None if isinstance(model, torch.nn.Module) else _parts_of(model)
    if parts is None:
        is_module = isinstance(model, torch.nn.Module)
        remedy = "give its tokenizer too: (model, tokenizer)" if is_module else f"give {_KINDS}"
        raise LoadError(f"models[{at}] is {model if model is None else type(model).__name__}; {remedy}")
    torch_model, tokenizer = parts
    what = f"models[{at}], a {type(torch_model).__name__}"
    with loading(what):
        if not hasattr(torch_model, "config") or isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
            raise LoadError(f"{what} with a {type(tokenizer).__name__} is no transformers model and its tokenizer")
        files.check_decoder(torch_model.config, what)
        files.check_finite(dict(torch_model.named_parameters()), what)
        name = name_of(str(getattr(torch_model.config, "name_or_path", "") or type(torch_model).__name__))
        return Member(torch_model, tokenizer, name, _encoder(tokenizer))


def _encoder(tokenizer: Any) -> Encoder:
    """An Encoder that is tested on a text, so that a faulty tokenizer is reported at loading."""
    encoder = Encoder(tokenizer)
    encoder.encode("a")
    return encoder


@dataclass(frozen=True)
class _Base:
    """A loaded model with the engine of the members that share it."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    engine: Engine
