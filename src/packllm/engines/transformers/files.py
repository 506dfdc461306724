"""Reads transformers models from untrusted files. Errors say what the files contain. Code is not run without consent,
and the config's claims are checked against the weights before a model is built."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook

from packllm.engines.transformers.architecture import auto_class, text_part
from packllm.errors import LoadError, OptionError, loading, refused

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of from_pretrained about the location of files; the tokenizer gets them too."""

OWN = {
    "dtype": "dtype=",
    "torch_dtype": "dtype=",
    "device_map": "device_map=",
    "trust_remote_code": "trust_remote_code=",
    "use_safetensors": "",
    "output_loading_info": "",
    "state_dict": "",
    "gguf_file": "",
    "weights_only": "",
    "ignore_mismatched_sizes": "",
}
"""Arguments of from_pretrained that are refused in model_kwargs, with the argument of Pack.load to use instead."""

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point types of safetensors files that models can be run in."""

_LFS = b"version https://git-lfs"
_DEPTH = re.compile(r"(^|_)(n_)?(layers?|depth|blocks?|experts)$")
_MOST_LAYERS = 10_000  # limit if there are no weights to check the config against


def check_model_kwargs(words: Any) -> dict[str, Any]:
    """Check `model_kwargs` and return a copy.

    Raises:
        OptionError: it is no mapping of names, or has an argument of Pack.load or one that packllm sets itself.
    """
    if words is None:
        return {}
    if not isinstance(words, Mapping) or not all(isinstance(name, str) for name in words):
        raise OptionError(f"model_kwargs={words!r} must be a dict of arguments of transformers' from_pretrained")
    for name in words:
        if name in OWN:
            remedy = f"give it to Pack.load as {OWN[name]}" if OWN[name] else "packllm sets it itself"
            raise OptionError(f"model_kwargs[{name!r}] cannot be set; {remedy}")
    return dict(words)


def read(source: str | Path, dtype: Any, device_map: Any, trust: bool, words: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a folder or hub id.

    Args:
        source: folder or hub id.
        dtype, device_map: as in from_pretrained.
        trust: whether to run code that comes with the model.
        words: further arguments of from_pretrained.

    Raises:
        LoadError: it cannot be loaded; the message has the folder and the reason.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    kind: Any = AutoModelForCausalLM
    hub = {name: words[name] for name in HUB if name in words}
    what = f"model {str(source)!r}"
    folder = Path(source, str(words.get("subfolder") or "")) if os.path.isdir(source) else None
    with loading(what):
        weights = check_folder(folder) if folder else None
        if folder:
            check_claims(read_json(folder / "config.json"), weights, what)
    with _stating_code(), loading(what):
        config = None
        if not trust:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
            check_decoder(config, what)
            check_size(config, weights, what)
            kind = auto_class(config)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **hub)
        loaded: Any = kind.from_pretrained(
            source,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust,
            use_safetensors=True,
            output_loading_info=True,
            **words,
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):  # transformers would initialize them randomly
            raise LoadError(f"{what} lacks {len(missing)} of its weights, such as {missing[0]!r}")
        check_decoder(model.config, what)
        model = text_part(model)
        check_finite(dict(model.named_parameters()), what)
    return model, tokenizer


def own_tokenizer(folder: Path, tokenizer: Any, config: Any = None) -> Any | None:
    """The tokenizer in an adapter's folder, or the base's tokenizer with the chat template in that folder; None if the
    folder has neither. `config` is the base's transformers config, if there is one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file() and config is None:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    template: Any = None
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").is_file():
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not template:
        return None
    if isinstance(template, list):  # several templates by name
        template = {one["name"]: one["template"] for one in template}
    with_template = copy.copy(tokenizer)
    with_template.chat_template = template
    return with_template


def check_decoder(config: Any, what: str) -> None:
    """Refuse an encoder-decoder. A config cannot tell encoders from decoders (GPT-NeoX has is_decoder=False too);
    Architecture recognises them by a trial."""
    if getattr(config, "is_encoder_decoder", False):
        raise LoadError(f"{what} is an encoder-decoder ({config.model_type}); members are decoders (causal models)")


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights with NaN or infinity, by name; one pass over them, without copies."""
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
            continue
        values = tensor.detach()
        if type(values) not in (Tensor, torch.nn.Parameter):  # quantised weights: codes and scales
            continue
        if values.element_size() == 1:  # float8 has no minimum
            values = values.to(torch.bfloat16)
        low, high = values.aminmax()  # both are NaN if any value is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise LoadError(f"{what} is damaged: {name} has NaN or infinity; get the file again")


@dataclass(frozen=True)
class Weights:
    """Facts from the headers of weight files: number of tensors and of their elements, the first floating-point type,
    as safetensors names it, and the size of the files in bytes."""

    tensors: int
    elements: int
    floating: str = ""
    size: int = 0


def check_folder(folder: Path) -> Weights:
    """Facts about the weights in a model's folder, from their headers.

    Raises:
        LoadError: the folder has no model that can be loaded; the message says what it has.
    """
    what, names = f"model {str(folder)!r}", sorted(os.listdir(folder))
    if not names:
        raise refused(what, "it is an empty folder; download the model into it")
    for name in names:
        if is_lfs_pointer(folder / name):
            raise refused(what, f"it has git-lfs pointers instead of files, such as {name}; run `git lfs pull` there")
    safe = [name for name in names if name.endswith(".safetensors")]
    if "config.json" not in names:
        ggufs = [name for name in names if name.endswith(".gguf")]
        remedy = f"; name the file: {os.path.join(folder, ggufs[0])}" if ggufs else ""
        raise refused(what, f"it has no config.json, but {list_names(names)}{remedy}")
    if not safe:
        unsafe = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        if unsafe:
            raise refused(
                what,
                f"it has its weights as {unsafe[0]} only, a format that can run code; save them as safetensors "
                "(load the model in transformers where you trust it, then model.save_pretrained)",
            )
        raise refused(what, f"it has no .safetensors file, but {list_names(names)}")
    files = _weight_files(folder, safe)
    tensors = elements = size = 0
    floating = ""
    for file in files:
        path = folder / file
        size += path.stat().st_size
        with loading(f"model {str(path)!r}", "; the file is damaged or cut"), safe_open(path, "pt") as reader:
            for key in reader.keys():  # noqa: SIM118  (it is no mapping)
                tensors += 1
                tensor = reader.get_slice(key)
                elements += math.prod(tensor.get_shape())
                if not floating and tensor.get_dtype() in FLOATING:
                    floating = tensor.get_dtype()
    return Weights(tensors, elements, floating, size)


def _weight_files(folder: Path, safe: list[str]) -> list[str]:
    """The files that transformers will read: those in the index, if there is one."""
    if "model.safetensors" in safe:
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return safe
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise refused(f"model {str(index.parent)!r}", "its index has no weight_map of file names; download it again")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not file.endswith(".safetensors") or os.path.basename(file) != file:
            raise LoadError(
                f"cannot load model: {str(index)!r} names {file!r}, which is no safetensors file of its folder"
            )
        if file not in safe:
            raise LoadError(
                f"cannot load model {str(folder)!r}: it lacks {file}, which its index names; download it again"
            )
    return files


def is_lfs_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > 1024:
        return False
    with open(path, "rb") as file:
        return file.read(len(_LFS)) == _LFS


def list_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def read_json(path: Path) -> dict[str, Any]:
    with loading(f"model: {str(path)!r}", "; it is not a valid JSON file"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise LoadError(f"cannot load model: {str(path)!r} is not a JSON object but {type(content).__name__}")
    return content


# A config is untrusted: its claims are checked against the weights before a model is built from it.


def check_claims(config: Mapping[str, Any], weights: Weights | None, what: str, at: str = "") -> None:
    """Refuse numbers of layers that cannot fit the weights: configs make lists of this length before any model
    exists."""
    limit = _MOST_LAYERS if weights is None else 4 * weights.tensors + 1024
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_claims(value, weights, what, f"{at}{name}.")
        elif isinstance(value, int) and value > limit and _DEPTH.search(str(name)):
            suffix = "" if weights is None else f"; its weights are {weights.tensors} tensors"
            raise LoadError(f"{what} claims {at}{name}={value} in its config{suffix}; the config is damaged")


def check_size(config: Any, weights: Weights | None, what: str) -> None:
    """Build the model without memory, and refuse one that is larger than its weights."""
    if weights is not None:
        twin(config, weights, what)


def twin(config: Any, weights: Weights | None, what: str, trust: bool = False, **words: Any) -> Any:
    """The model of a config without memory: only names, shapes and types of its weights.

    Args:
        config: the config.
        weights: facts about its weight files; None if unknown.
        what: its name in error messages.
        trust: whether to run code that comes with the model.
        words: further arguments of from_config, such as dtype.

    Raises:
        LoadError: it is larger than its weights.
    """
    limit = 20 * weights.tensors + 10_000 if weights else 20 * _MOST_LAYERS
    with _few_modules(limit, what), torch.device("meta"):
        model: Any = auto_class(config).from_config(config, trust_remote_code=trust, **words)
    if weights is None:
        return model
    claimed = sum(math.prod(parameter.shape) for parameter in model.parameters())
    # Quantised weights are packed, up to 16 numbers in an int32; other models are no larger than their files.
    packed = getattr(config, "quantization_config", None) is not None
    limit = weights.elements * (32 if packed else 2) + 2**20
    if claimed > limit:
        raise LoadError(
            f"{what} does not fit its config: a model of {claimed:,} parameters from weights of {weights.elements:,}"
        )
    return model


@contextmanager
def _few_modules(most: int, what: str) -> Iterator[None]:
    """Stop building a model, in this thread, once it has more than `most` modules."""
    thread, count = threading.get_ident(), 0

    def counted(*_: Any) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if count > most:
            raise LoadError(
                f"{what} does not fit its config, which builds more than {most:,} modules, too many for its weights"
            )

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _stating_code() -> Iterator[None]:
    """Add to an error that a model's own code is needed how to allow it."""
    try:
        yield
    except LoadError as error:
        if "trust_remote_code" not in str(error.__cause__):
            raise
        raise LoadError(f"{error}; trust_remote_code=True runs it") from error.__cause__
