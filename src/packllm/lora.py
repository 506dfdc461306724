"""LoRA adapters merged into a base: W + (alpha / r) B A (arXiv 2106.09685)."""

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


def merge(base: Any, adapter: str) -> Any:
    """The base with the adapter's update added to its weights. What the adapter leaves alone is shared.

    Plain LoRA is read and added here, in a fraction of a second; other kinds of adapters go through peft.

    Args:
        base: a loaded transformers model; it stays as it is.
        adapter: folder or hub id of an adapter in safetensors format.

    Raises:
        LoadError: no such adapter, another format than safetensors, or an adapter of another model.
    """
    folder = Path(adapter) if Path(adapter).is_dir() else _download(adapter)
    if not (folder / "adapter_model.safetensors").exists():
        raise LoadError(f"adapter {adapter!r} has no adapter_model.safetensors; other formats can run code")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        keys = {name: _KEY.fullmatch(name) for name in tensors}
        if not all(keys.values()) or not _is_plain(config):
            return _merge_with_peft(base, folder)
        return _merge_plain(base, config, {(key[1], key[2]): tensors[name] for name, key in keys.items() if key})
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError, UserWarning) as error:
        raise LoadError(f"cannot load adapter {adapter!r}: {str(error).splitlines()[0]}") from error


def _download(adapter: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=["adapter_*"]))
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot load adapter {adapter!r}: {str(error).splitlines()[0]}") from error


def _is_plain(config: dict[str, Any]) -> bool:
    usual = all(config.get(name, values[0]) in values for name, values in _PLAIN.items())
    return usual and not any(config.get(name) for name in _ABSENT)


def _merge_plain(base: Any, config: dict[str, Any], factors: dict[tuple[str, str], Tensor]) -> Any:
    names = sorted({name for name, _ in factors})
    if not names:
        raise ValueError("it holds no LoRA weights")
    shared = [*base.parameters(), *base.buffers()]
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in shared})
    for name in names:
        module = model.get_submodule(name)
        a, b, weight = factors[name, "A"].float(), factors[name, "B"].float(), module.weight
        if weight.is_meta:
            raise ValueError(f"{name} of the base is offloaded; adapters need the base in memory")
        rank = a.shape[0]
        scale = _alpha(config, name) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        a, b = a.to(weight.device), b.to(weight.device)
        if config.get("fan_in_fan_out"):  # layers that keep their weight transposed, as GPT-2's
            a, b = b.T, a.T
        merged = torch.addmm(weight.detach().float(), b, a, alpha=scale).to(weight.dtype)
        module.weight = torch.nn.Parameter(merged, requires_grad=False)
    return model


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
