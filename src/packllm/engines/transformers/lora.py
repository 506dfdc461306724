"""LoRA adapters (arXiv 2106.09685): read, and merged into a base, W + (alpha / r) B A."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from packllm.errors import LoadError

_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base's weights too
    "use_dora": (False,),
    "lora_bias": (False,),
}
_ABSENT = ("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices", "megatron_config")
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


Factors = dict[str, tuple[Tensor, Tensor]]
"""An adapter's update of each module it changes: float32 (down (r, in), up (out, r)), to add up @ down to the
weight as nn.Linear holds it, (out, in)."""


def read(adapter: str) -> Factors | None:
    """The factors of a plain LoRA adapter; None for one of another kind, which peft can merge.

    Args:
        adapter: folder or hub id of an adapter in safetensors format.

    Raises:
        LoadError: no such adapter, or another format than safetensors.
    """
    folder = Path(adapter) if Path(adapter).is_dir() else _download(adapter)
    if not (folder / "adapter_model.safetensors").exists():
        raise LoadError(f"adapter {adapter!r} has no adapter_model.safetensors; other formats can run code")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        keys = {name: _KEY.fullmatch(name) for name in tensors}
        if not all(keys.values()) or not _is_plain(config):
            return None
        return _factors(config, {(key[1], key[2]): tensors[name] for name, key in keys.items() if key})
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _refused(adapter, error) from error


def merge(base: Any, adapter: str) -> Any:
    """The base with the adapter's update added to its weights. What the adapter leaves alone is shared.

    Plain LoRA is read and added here, in a fraction of a second; other kinds of adapters go through peft.

    Args:
        base: a loaded transformers model; it stays as it is.
        adapter: as in read().

    Raises:
        LoadError: as read(), or an adapter of another model.
    """
    factors = read(adapter)
    try:
        if factors is not None:
            return add(base, factors)
        return _merge_with_peft(base, Path(adapter) if Path(adapter).is_dir() else _download(adapter))
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, UserWarning) as error:
        raise _refused(adapter, error) from error


def add(base: Any, factors: Factors) -> Any:
    """A copy of the base with the update added; it shares all tensors that do not change."""
    shared = [*base.parameters(), *base.buffers()]
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in shared})
    for name, (down, up) in factors.items():
        module = module_of(model, name)
        weight = module.weight
        update = up.to(weight.device) @ down.to(weight.device)
        if isinstance(module, Conv1D):  # keeps its weight transposed
            update = update.T
        merged = (weight.detach().float() + update).to(weight.dtype)
        module.weight = torch.nn.Parameter(merged, requires_grad=False)
    return model


def module_of(base: Any, name: str) -> Any:
    """The module of that name; its weight must be in memory."""
    module = base.get_submodule(name)
    if module.weight.is_meta:
        raise ValueError(f"{name} of the base is offloaded; adapters need the base in memory")
    return module


def _refused(adapter: str, error: Exception) -> LoadError:
    return LoadError(f"cannot load adapter {adapter!r}: {str(error).splitlines()[0]}")


def _factors(config: dict[str, Any], tensors: dict[tuple[str, str], Tensor]) -> Factors:
    factors = {}
    for name in sorted({name for name, _ in tensors}):
        down, up = tensors[name, "A"].float(), tensors[name, "B"].float()
        rank = down.shape[0]
        factors[name] = down, up * (_alpha(config, name) / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not factors:
        raise ValueError("it holds no LoRA weights")
    return factors


def _download(adapter: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=["adapter_*"]))
    except (OSError, ValueError) as error:
        raise _refused(adapter, error) from error


def _is_plain(config: dict[str, Any]) -> bool:
    usual = all(config.get(name, values[0]) in values for name, values in _PLAIN.items())
    return usual and not any(config.get(name) for name in _ABSENT)


def _alpha(config: dict[str, Any], name: str) -> float:
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return config["lora_alpha"]


def _merge_with_peft(base: Any, folder: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise LoadError(
            f"adapter {str(folder)!r} is more than plain LoRA and needs peft; install packllm[lora]"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")  # it would change nothing
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
