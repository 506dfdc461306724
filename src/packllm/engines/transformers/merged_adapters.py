"""Adapters merged into their base: plain LoRA here, others by peft, and checked: every tensor used, nothing changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from packllm.engines.transformers.files import check_finite
from packllm.engines.transformers.lora import Adapter, add, check_fit, check_pattern, open_adapter, setting_of
from packllm.errors import loading, refused, told

_MODULE = re.compile(r"base_model\.model\.(.+)\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b.*")
_AGAIN = re.compile(r"(.+)\.(modules_to_save|original_module)\.weight")  # peft saves enlarged embeddings twice
_BIAS = re.compile(r"base_model\.model\.(.+)\.lora_B\.bias")  # of a layer that may have none itself
_FULL = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")


def merge(base: Any, adapter: Adapter | str) -> Any:
    """The base with the adapter's update added to its weights. What the adapter leaves alone is shared.

    Plain LoRA is added here, in a fraction of a second; other kinds of adapters go through peft.

    Args:
        base: a loaded transformers model; it stays as it is.
        adapter: as read, or its folder.

    Raises:
        LoadError: an adapter of another model, or one that cannot be merged exactly.
    """
    opened = open_adapter(adapter) if isinstance(adapter, str) else adapter
    factors = opened.factors()
    if factors is None:
        return _with_peft(base, opened)
    with loading(opened.what):
        check_fit(base, factors, opened.what)
        model = add(base, factors)
        check_finite({f"{name}.weight": model.get_submodule(name).weight for name in factors}, opened.what)
        return model


def _with_peft(base: Any, adapter: Adapter) -> Any:
    """A copy of the base with an adapter that peft knows added to its weights.

    Saved embeddings with more rows than the base's (tokens that were added for the adapter) enlarge the copy.

    Raises:
        LoadError: peft is not installed or refuses; a tensor of the adapter is not used, or of another shape; its
            effect is no change of weights.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise refused(adapter.what, "it is more than plain LoRA and needs peft; install packllm[lora]") from None
    with loading(adapter.what), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")  # it would change nothing
        config = _bounded(adapter)
        model = _prepared(base, adapter)
        tuned: Any = PeftModel.from_pretrained(model, adapter.folder, config=config, is_trainable=False)
        _check_all_used(adapter, get_peft_model_state_dict(tuned, save_embedding_layers=False), tuned.state_dict())
        kind, held = adapter.config.get("peft_type"), next(iter(adapter.tensors))
        if not hasattr(tuned, "merge_and_unload"):
            raise refused(adapter.what, f"{held} is of the kind {kind}, which adds to the prompt and cannot be merged")
        ids = torch.arange(1, 6, device=base.device)[None]
        with torch.inference_mode():
            expected = tuned.eval()(input_ids=ids, use_cache=False).logits.float()
        try:
            merged = tuned.merge_and_unload(safe_merge=True)
        except Exception as error:
            raise refused(
                adapter.what, f"{held} is of the kind {kind}, which cannot be merged: {told(error)}"
            ) from error
        check_finite(dict(merged.named_parameters()), adapter.what)
        with torch.inference_mode():
            found = merged.eval()(input_ids=ids, use_cache=False).logits.float()
        room = 1e-3 if merged.dtype == torch.float32 else 0.1
        if not (found - expected).abs().max() <= room * expected.abs().max().clamp(min=1):
            raise refused(adapter.what, "it computes something else once it is merged; it cannot be a member")
        return merged


def _bounded(adapter: Adapter) -> Any:
    """Its config for peft, with the modules by their names: peft matches patterns of strangers without a bound."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(adapter.folder))
    names = sorted({found[1] for key in adapter.tensors if (found := _MODULE.fullmatch(key))})
    if adapter.config.get("peft_type") == "LORA" and names and not adapter.config.get("target_parameters"):
        config.target_modules = set(names)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern = {name: setting_of(adapter.config, "rank_pattern", "r", name) for name in names}
        config.alpha_pattern = {name: setting_of(adapter.config, "alpha_pattern", "lora_alpha", name) for name in names}
        return config
    for setting, value in vars(config).items():
        if "pattern" in setting or setting.startswith(("target_", "exclude_", "feedforward_", "modules_")):
            for pattern in [value] if isinstance(value, str) else value if isinstance(value, Iterable) else ():
                if isinstance(pattern, str):
                    check_pattern(setting, pattern)
    return config


def _prepared(base: Any, adapter: Adapter) -> Any:
    """A copy of the base whose embedding and head are tensors of their own, with as many rows as the adapter saved."""
    model = copy.deepcopy(base)
    saved = _saved_embeddings(model, adapter)
    rows = {tensor.shape[0] for tensor in saved.values()}
    if len(rows) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in saved.items())
        raise refused(adapter.what, f"it holds embeddings of different sizes: {shapes}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name, tensor in saved.items():
        width = embedding.weight.shape[1]
        if tensor.ndim != 2 or tensor.shape[1] != width:
            raise refused(adapter.what, f"{name} is of size {tuple(tensor.shape)}, the base's is {width} wide")
    if rows and rows != {embedding.weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for key, tensor in adapter.tensors.items():
        if (found := _BIAS.fullmatch(key)) and getattr(module := _module(model, found[1]), "bias", 0) is None:
            module.bias = torch.nn.Parameter(tensor.new_zeros(tensor.shape, device=base.device), requires_grad=False)
    tied = head is not None and head.weight is embedding.weight
    if tied and not adapter.config.get("trainable_token_indices"):  # those change both; else merging one would too
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return model


def _module(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:  # what an adapter of another model changes; it is said later
        return None


def _saved_embeddings(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """The whole embedding and head that an adapter brings, by module."""
    own = {id(module): name for name, module in model.named_modules()}
    names = {own.get(id(module)) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    found = {}
    for key, tensor in adapter.tensors.items():
        match = _FULL.fullmatch(key)
        if match and match[1] in names:
            found[match[1]] = tensor
    return found


def _check_all_used(adapter: Adapter, trained: Mapping[str, Tensor], everything: Mapping[str, Tensor]) -> None:
    """Refuse an adapter of which peft left something out.

    Args:
        trained: what peft would save of the model that it made.
        everything: all weights of that model; whole embeddings may have gone there.
    """
    for name, tensor in adapter.tensors.items():
        again = _AGAIN.fullmatch(name)
        whole = adapter.tensors.get(f"{again[1]}.weight") if again else None
        if again and whole is not None and (again[2] == "original_module" or torch.equal(whole, tensor)):
            continue
        used = trained.get(name, everything.get(name))
        if used is None:
            raise refused(adapter.what, f"it holds {name}, which its base lacks; is it of another model?")
        if used.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, the base takes {tuple(used.shape)}"
            raise refused(adapter.what, f"{name} is of size {shapes}")
        if not torch.allclose(used.float().cpu(), tensor.float(), rtol=1e-2, atol=1e-2):
            raise refused(adapter.what, f"{name} is not taken over as it is")
    if missing := sorted(trained.keys() - adapter.tensors.keys()):
        raise refused(adapter.what, f"it lacks {missing[0]}")
