"""LoRA adapters (arXiv 2106.09685): read, held against their base, and merged into it, W + (alpha / r) B A."""

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
"""An adapter's update of each module it changes: float32 (down (r, in), up (out, r)), to add up @ down to the
weight as nn.Linear holds it, (out, in)."""

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
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base's weights too
}
_BY_PEFT = {"modules_to_save", "target_parameters", "trainable_token_indices", "use_dora", "lora_bias", *_PLAIN}
"""Settings of LoRA beyond the plain form that peft merges."""
_NO_MATTER = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha"),
    *("lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type"),
    *("use_rslora",),
}
"""Settings of LoRA that are read here, or say how an adapter was trained and not what it computes."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files have it.

    Attributes:
        name: as the user named it.
        folder: where its files are.
        config: its adapter_config.json.
        tensors: its weights by name, checked to be finite.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def what(self) -> str:
        return f"adapter {self.name!r}"

    def factors(self) -> Factors | None:
        """The update of a plain LoRA adapter; None for one of another kind, which peft can merge.

        Raises:
            LoadError: a setting that cannot be followed, or tensors that do not fit the settings.
        """
        with loading(self.what):
            if self.config.get("peft_type") != "LORA":
                return None
            _check_settings(self.config, self.what)
            keys = {name: _KEY.fullmatch(name) for name in self.tensors}
            if not self.tensors:
                raise refused(self.what, "it holds no weights")
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
    """The files of an adapter, read.

    Args:
        adapter: folder or hub id of an adapter in safetensors format.
        hub: words about the hub, as from_pretrained takes them.
        weights: whether its weights are read; else they are shapes and types without memory, and nothing is
            downloaded.

    Raises:
        LoadError: no such adapter, another format than safetensors, damaged files, NaN or infinity in its weights.
    """
    what = f"adapter {adapter!r}"
    with loading(what):
        words = {**(hub or {}), **({} if weights else {"local_files_only": True})}
        folder = Path(adapter) if Path(adapter).is_dir() else _download(adapter, words)
        for name in (WEIGHTS, CONFIG):
            if is_lfs_pointer(folder / name):
                raise refused(what, f"it holds a git-lfs pointer instead of {name}; run `git lfs pull` there")
        if not (folder / WEIGHTS).exists():
            held = list_names(sorted(path.name for path in folder.iterdir()))
            raise refused(what, f"it has no {WEIGHTS}; other formats can run code; it has {held}")
        config = read_config(folder)
        tensors = load_file(folder / WEIGHTS) if weights else _shapes(folder / WEIGHTS)
        check_finite(tensors, what)
        return Adapter(adapter, folder, config, tensors)


def _shapes(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without memory, by its header."""
    with safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        return {
            name: torch.empty(held.get_shape(), dtype=FLOATING.get(held.get_dtype(), torch.uint8), device="meta")
            for name, held in slices.items()
        }


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's adapter_config.json."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise LoadError(f"{str(folder / CONFIG)!r} is not a JSON object but {type(config).__name__}")
    return config


def check_fit(base: Any, factors: Factors, what: str) -> None:
    """Refuse factors of modules that the base lacks, keeps elsewhere or has in another shape: products would
    broadcast, and change what they should not."""
    for name, (down, up) in factors.items():
        try:
            module = base.get_submodule(name)
        except AttributeError:
            raise refused(what, f"it changes {name}, which its base lacks; is it of another model?") from None
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear | Conv1D) or not isinstance(weight, Tensor):
            raise refused(what, f"it changes {name}, a {type(module).__name__}; only linear layers can be")
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
    """A copy of the base with the update added; it shares all tensors that do not change."""
    shared = [*base.parameters(), *base.buffers()]
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in shared})
    for name, (down, up) in factors.items():
        module = model.get_submodule(name)
        weight = module.weight
        update = up.to(weight.device) @ down.to(weight.device)
        if isinstance(module, Conv1D):  # keeps its weight transposed
            update = update.T
        merged = (weight.detach().float() + update).to(weight.dtype)
        module.weight = torch.nn.Parameter(merged, requires_grad=False)
    return model


def _download(adapter: str, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    words = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if name in hub}
    return Path(snapshot_download(adapter, allow_patterns=_WANTED, **words))


def _check_settings(config: Mapping[str, Any], what: str) -> None:
    """Refuse a setting that would be ignored: what it asks for would be missing without a word."""
    for name, value in config.items():
        if value and name not in _NO_MATTER and name not in _BY_PEFT:
            raise refused(
                what,
                f"it sets {name}={str(value)[:200]!r}, which packllm does not follow; merge it where it was made",
            )


def _is_plain(config: Mapping[str, Any]) -> bool:
    usual = all(config.get(name, values[0]) in values for name, values in _PLAIN.items())
    return usual and not any(config.get(name) for name in _BY_PEFT - _PLAIN.keys())


def setting_of(config: Mapping[str, Any], patterns: str, setting: str, name: str) -> Any:
    """A setting of one module: that of the first pattern that matches its name's end, as peft has it."""
    value = config[setting]
    for pattern, own in (config.get(patterns) or {}).items():
        check_pattern(patterns, pattern)
        if re.match(rf"(.*\.)?({pattern})$", name):
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoadError(f"{setting}={value!r} of {name} is no number")
    if setting == "r" and not (isinstance(value, int) and value > 0):
        raise LoadError(f"the rank of {name} is {value!r}; it must be 1 or more")
    return value


def check_pattern(setting: str, pattern: str) -> None:
    """Refuse a pattern that might take for ever: a stranger's adapter has them matched as regular expressions.

    Names, alternatives and a few wildcards pass; what repeats a group, looks around or refers back does not.
    """
    bare = re.sub(r"\\[.dwbsDWBS]|\[[\w.\-]*\]", "x", pattern)
    special = sum(map(bare.count, "*+?{(")) - bare.count("(?:")
    if len(pattern) > 500 or special > 3 or re.search(r"\)[*+?{]|\\|\(\?(?!:)", bare):
        raise LoadError(
            f"{setting} holds the pattern {pattern[:200]!r}, too intricate to be matched safely; name the modules"
        )
