"""Quantised weights for accelerators: the argument `quantization` of Pack.load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from packllm.errors import LoadError, OptionError

NAMES = ("int8", "int4")

ON_CPU = (
    "on a CPU quantised torch models are slower or worse: int8 weights took 66 ms a token against 59 in float32, "
    "dynamic int8 raised the NLL from 2.9 to 4.0 nats a token, int4 failed; give a .gguf file of the model instead"
)


def config_of(quantization: Any, device_map: Any) -> Any | None:
    """The transformers config for a value of `quantization`.

    Args:
        quantization: such a config, the same as a dict, "int8" or "int4" (by torchao or bitsandbytes, whichever is
            installed), or None for no quantisation.
        device_map: where models will go.

    Raises:
        OptionError: any other value.
        LoadError: models go to a CPU, or the necessary package is not installed.
    """
    if quantization is None:
        return None
    known = isinstance(quantization, Mapping) or hasattr(quantization, "quant_method") or quantization in NAMES
    if not known:
        raise OptionError(
            f"quantization={quantization!r} is unknown; valid: {', '.join(NAMES)}, a quantisation config of "
            "transformers or the same as a dict"
        )
    if not torch.accelerator.is_available() or str(device_map) == "cpu":
        raise LoadError(f"quantization={_short(quantization)} is for accelerators: {ON_CPU}")
    if isinstance(quantization, str):
        return _by_installed(quantization)
    return dict(quantization) if isinstance(quantization, Mapping) else quantization


def _by_installed(name: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    first, second = ("torchao", "bitsandbytes") if name == "int8" else ("bitsandbytes", "torchao")
    # For int8, torchao rounds only weights; bitsandbytes also rounds activations, depending on the rest of the pass.
    package = first if find_spec(first) else second
    if package == "bitsandbytes" and find_spec(package):
        if name == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if package == "torchao" and find_spec(package):
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if name == "int8" else Int4WeightOnlyConfig())
    raise LoadError(f"quantization={name!r} needs bitsandbytes or torchao; pip install bitsandbytes")


def _short(quantization: Any) -> str:
    return repr(quantization) if isinstance(quantization, str) else type(quantization).__name__


def bits_of(quantization: Any) -> float | None:
    """Bits per weight of a linear layer, scales included, as far as the config tells; else None."""
    settings = quantization if isinstance(quantization, Mapping) else vars(quantization)
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return 4.5  # a float32 scale for 64 weights
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return 8
    kind = type(settings.get("quant_type")).__name__
    return 4.25 if "Int4" in kind else 8 if "Int8" in kind else None


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors of a weight: itself, or codes and scales."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
        return
    yield tensor
    for holder in (getattr(tensor, "quant_state", None), tensor):  # bitsandbytes'
        for name in ("absmax", "code", "SCB"):
            if isinstance(scale := getattr(holder, name, None), Tensor):
                yield scale
