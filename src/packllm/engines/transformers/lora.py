"""LoRA adapters (arXiv 2106.09685): reading, checking against their base, and merging into it, W + (alpha / r) B A."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from packllm.engines.transformers.files import FLOATING, check_finite, is_lfs_pointer, list_names
from packllm.errors import LoadError, loading, refused

Factors = dict[str, tuple[Tensor, Tensor]]
"""An adapter's update of each module that it changes: float32 (down (r, in), up (out, r)). up @ down is added to the
weight in nn.Linear's layout, (out, in)."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_WANTED = [
    "adapter_*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "chat_templ*",
]
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # other values also change the base's weights
}
_BY_PEFT = {"modules_to_save", "target_parameters", "trainable_token_indices", "use_dora", "lora_bias", *_PLAIN}
"""LoRA settings beyond the plain form; peft merges such adapters."""
_NO_MATTER = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha"),
    *("lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
    *("use_rslora",),
}
"""LoRA settings that are read here, or that only describe the training and not the result."""


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter's files.

    Attributes:
        name: the user's name of it.
        folder: folder of its files.
        config: its adapter_config.json.
        tensors: its weights by name, all finite.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def what(self) -> str:
        return f"adapter {self.name!r}"

    def factors(self) -> Factors | None:
        """The update of a plain LoRA adapter; None for any other kind, which peft can merge.

        Raises:
            LoadError: an unsupported setting, or tensors that do not fit the settings.
        """
        with loading(self.what):
            if self.config.get("peft_type") != "LORA":
                return None
            _check_settings(self.config, self.what)
            keys = {name: _KEY.fullmatch(name) for name in self.tensors}
            if not self.tensors:
                raise refused(self.what, "it has no weights; download it again")
            if not all(keys.values()) or not _is_plain(self.config):
                return None
            parts = {(key[1], key[2]): self.tensors[name] for name, key in keys.items() if key}
            return {name: self._pair(name, parts) for name in sorted({name for name, _ in parts})}

    def _pair(self, name: str, parts: Mapping[tuple[str, str], Tensor]) -> tuple[Tensor, Tensor]:
        for part in "AB":
            if (name, part) not in parts:
                raise refused(self.what, f"it lacks {name}.lora_{part}.weight")
        down, up = parts[name, "A"].float(), parts[name, "B"].float()
        rank = setting_of(self.config, "rank_pattern", "r", name)
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise refused(
                self.what, f"the factors of {name} are {tuple(down.shape)} and {tuple(up.shape)}, its rank {rank}"
            )
        scale = setting_of(self.config, "alpha_pattern", "lora_alpha", name)
        scale /= math.sqrt(rank) if self.config.get("use_rslora") else rank
        check_finite({f"{name}.lora_B.weight": up * scale}, self.what)
        return down, up * scale


def open_adapter(adapter: str, hub: Mapping[str, Any] | None = None, weights: bool = True) -> Adapter:
    """Read the files of an adapter.

    Args:
        adapter: folder or hub id of an adapter in safetensors format.
        hub: arguments of from_pretrained about the hub.
        weights: whether to read its weights; otherwise they are shapes and types without memory, and nothing is
            downloaded.

    Raises:
        LoadError: no such adapter, another format than safetensors, damaged files, or weights with NaN or infinity.
    """
    what = f"adapter {adapter!r}"
    with loading(what):
        arguments = {**(hub or {}), **({} if weights else {"local_files_only": True})}
        folder = Path(adapter) if Path(adapter).is_dir() else _download(adapter, arguments)
        for name in (WEIGHTS, CONFIG):
            if is_lfs_pointer(folder / name):
                raise refused(what, f"it has a git-lfs pointer instead of {name}; run `git lfs pull` there")
        if not (folder / WEIGHTS).exists():
            names_ = list_names(sorted(path.name for path in folder.iterdir()))
            raise refused(what, f"it has no {WEIGHTS}; other formats can run code; it has {names_}")
        config = read_config(folder)
        tensors = load_file(folder / WEIGHTS) if weights else _shapes(folder / WEIGHTS)
        check_finite(tensors, what)
        return Adapter(adapter, folder, config, tensors)


def _shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without memory, from its header."""
    with safe_open(file, "pt") as reader:
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118  (it is no mapping)
        return {
            name: torch.empty(tensor.get_shape(), dtype=FLOATING.get(tensor.get_dtype(), torch.uint8), device="meta")
            for name, tensor in slices.items()
        }


def read_config(folder: Path) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise LoadError(f"{str(folder / CONFIG)!r} is not a JSON object but {type(config).__name__}")
    return config


def check_fit(base: Any, factors: Factors, what: str) -> None:
    """Refuse factors of modules that the base lacks, has elsewhere or has in another shape. Otherwise products would
    broadcast, and change other weights."""
    for name, (down, up) in factors.items():
        try:
            module = base.get_submodule(name)
        except AttributeError:
            raise refused(what, f"it changes {name}, which its base lacks; is it of another model?") from None
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear | Conv1D) or not isinstance(weight, Tensor):
            raise refused(what, f"it changes {name}, a {type(module).__name__}; only linear layers are supported")
        if weight.is_meta:
            raise refused(what, f"{name} of the base is offloaded; adapters need the base in memory")
        if not weight.is_floating_point():
            raise refused(what, f"{name} of the base is quantised; adapters need it in floating point")
        shape = tuple(weight.T.shape if isinstance(module, Conv1D) else weight.shape)
        if shape != (up.shape[0], down.shape[1]):
            raise refused(
                what,
                f"its update of {name} is of size {up.shape[0]} x {down.shape[1]}, the base's weight "
                f"{shape[0]} x {shape[1]}; is it of another model, or of one with more tokens in its vocabulary?",
            )


def add(base: Any, factors: Factors) -> Any:
    """A copy of the base with the update added; unchanged tensors are shared."""
    shared = [*base.parameters(), *base.buffers()]
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in shared})
    for name, (down, up) in factors.items():
        module = model.get_submodule(name)
        weight = module.weight
        update = up.to(weight.device) @ down.to(weight.device)
        if isinstance(module, Conv1D):  # its weight is transposed
            update = update.T
        merged = (weight.detach().float() + update).to(weight.dtype)
        module.weight = torch.nn.Parameter(merged, requires_grad=False)
    return model


def _download(adapter: str, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    arguments = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
    return Path(snapshot_download(adapter, allow_patterns=_WANTED, **arguments))


def _check_settings(config: Mapping[str, Any], what: str) -> None:
    """Refuse settings that would be ignored: their effect would be missing silently."""
    for name, value in config.items():
        if value and name not in _NO_MATTER and name not in _BY_PEFT:
            raise refused(
                what,
                f"it sets {name}={str(value)[:200]!r}, which packllm does not support; merge it where it was trained",
            )


def _is_plain(config: Mapping[str, Any]) -> bool:
    usual = all(config.get(name, values[0]) in values for name, values in _PLAIN.items())
    return usual and not any(config.get(name) for name in _BY_PEFT - _PLAIN.keys())


def setting_of(config: Mapping[str, Any], patterns: str, setting: str, name: str) -> Any:
    """A setting of one module: the value of the first pattern that matches the end of its name, as in peft."""
    value = config[setting]
    for pattern, matched in (config.get(patterns) or {}).items():
        check_pattern(patterns, pattern)
        if re.match(rf"(.*\.)?({pattern})$", name):
            value = matched
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoadError(f"{setting}={value!r} of {name} must be a number")
    if setting == "r" and not (isinstance(value, int) and value > 0):
        raise LoadError(f"the rank of {name} is {value!r}; it must be 1 or more")
    return value


def check_pattern(setting: str, pattern: str) -> None:
    """Refuse patterns that could take forever: untrusted adapters have their patterns matched as regular expressions.

    Names, alternatives and a few wildcards are allowed; repeated groups, lookaround and backreferences are not.
    """
    bare = re.sub(r"\\[.dwbsDWBS]|\[[\w.\-]*\]", "x", pattern)
    special = sum(map(bare.count, "*+?{(")) - bare.count("(?:")
    if len(pattern) > 500 or special > 3 or re.search(r"\)[*+?{]|\\|\(\?(?!:)", bare):
        raise LoadError(
            f"{setting} has the pattern {pattern[:200]!r}, which is too complex to be matched safely; name the modules"
        )
