"""Merges adapters into their base: plain LoRA here, other kinds by peft. Checks that every tensor is used and that the
merged model gives the same results."""

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
from packllm.errors import first_line, loading, refused

_MODULE = re.compile(r"base_model\.model\.(.+)\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\b.*")
_AGAIN = re.compile(r"(.+)\.(modules_to_save|original_module)\.weight")  # peft saves resized embeddings twice
_BIAS = re.compile(r"base_model\.model\.(.+)\.lora_B\.bias")  # the layer itself may have no bias
_FULL = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")


def merge(base: Any, adapter: Adapter | str) -> Any:
    """The base with the adapter's update added to its weights; unchanged tensors are shared.

    Plain LoRA is added here, in a fraction of a second; other kinds of adapters are merged by peft.

    Args:
        base: a loaded transformers model; it is not changed.
        adapter: an opened adapter, or its folder.

    Raises:
        LoadError: an adapter of another model, or one that cannot be merged exactly.
    """
    files_ = open_adapter(adapter) if isinstance(adapter, str) else adapter
    factors = files_.factors()
    if factors is None:
        return _with_peft(base, files_)
    with loading(files_.what):
        check_fit(base, factors, files_.what)
        model = add(base, factors)
        check_finite({f"{name}.weight": model.get_submodule(name).weight for name in factors}, files_.what)
        return model


def _with_peft(base: Any, adapter: Adapter) -> Any:
    """A copy of the base with an adapter merged by peft.

    If the adapter has embeddings with more rows than the base's (for added tokens), the copy's are resized.

    Raises:
        LoadError: peft is not installed or refuses the adapter; a tensor of the adapter is not used or has another
            shape; or the adapter does more than change weights.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise refused(adapter.what, "it is more than plain LoRA and needs peft; install packllm[lora]") from None
    with loading(adapter.what), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")  # the adapter would have no effect
        config = _bounded(adapter)
        model = _prepared(base, adapter)
        tuned: Any = PeftModel.from_pretrained(model, adapter.folder, config=config, is_trainable=False)
        _check_all_used(adapter, get_peft_model_state_dict(tuned, save_embedding_layers=False), tuned.state_dict())
        kind, example = adapter.config.get("peft_type"), next(iter(adapter.tensors))
        if not hasattr(tuned, "merge_and_unload"):
            raise refused(
                adapter.what, f"{example} is of the kind {kind}, which adds to the prompt and cannot be merged"
            )
        ids = torch.arange(1, 6, device=base.device)[None]
        with torch.inference_mode():
            expected = tuned.eval()(input_ids=ids, use_cache=False).logits.float()
        try:
            merged = tuned.merge_and_unload(safe_merge=True)
        except Exception as error:
            raise refused(
                adapter.what, f"{example} is of the kind {kind}, which cannot be merged: {first_line(error)}"
            ) from error
        check_finite(dict(merged.named_parameters()), adapter.what)
        with torch.inference_mode():
            logits = merged.eval()(input_ids=ids, use_cache=False).logits.float()
        room = 1e-3 if merged.dtype == torch.float32 else 0.1
        if not (logits - expected).abs().max() <= room * expected.abs().max().clamp(min=1):
            raise refused(adapter.what, "its results differ once it is merged, so it cannot be a member")
        return merged


def _bounded(adapter: Adapter) -> Any:
    """The adapter's config for peft, with modules given by name: peft would match untrusted patterns without a
    limit."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(adapter.folder))
    names = sorted({match[1] for key in adapter.tensors if (match := _MODULE.fullmatch(key))})
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
    """A copy of the base with separate tensors for embedding and head, with as many rows as the adapter's."""
    model = copy.deepcopy(base)
    saved = _saved_embeddings(model, adapter)
    rows = {tensor.shape[0] for tensor in saved.values()}
    if len(rows) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in saved.items())
        raise refused(adapter.what, f"it has embeddings of different sizes: {shapes}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name, tensor in saved.items():
        width = embedding.weight.shape[1]
        if tensor.ndim != 2 or tensor.shape[1] != width:
            raise refused(adapter.what, f"{name} is of size {tuple(tensor.shape)}, the base's is {width} wide")
    if rows and rows != {embedding.weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for key, tensor in adapter.tensors.items():
        if (match := _BIAS.fullmatch(key)) and getattr(module := _module(model, match[1]), "bias", 0) is None:
            module.bias = torch.nn.Parameter(tensor.new_zeros(tensor.shape, device=base.device), requires_grad=False)
    tied = head is not None and head.weight is embedding.weight
    # Untie embedding and head, so that merging into one does not change the other. Trainable token indices change both.
    if tied and not adapter.config.get("trainable_token_indices"):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return model


def _module(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:  # an adapter of another model; a later check reports it
        return None


def _saved_embeddings(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """The complete embedding and head in an adapter, by module."""
    name_of = {id(module): name for name, module in model.named_modules()}
    names = {name_of.get(id(module)) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    tensors = {}
    for key, tensor in adapter.tensors.items():
        match = _FULL.fullmatch(key)
        if match and match[1] in names:
            tensors[match[1]] = tensor
    return tensors


def _check_all_used(adapter: Adapter, trained: Mapping[str, Tensor], everything: Mapping[str, Tensor]) -> None:
    """Refuse an adapter if peft ignored some of it.

    Args:
        adapter: the adapter.
        trained: the tensors that peft would save from its model.
        everything: all weights of that model; complete embeddings may be there.
    """
    for name, tensor in adapter.tensors.items():
        duplicate = _AGAIN.fullmatch(name)
        original = adapter.tensors.get(f"{duplicate[1]}.weight") if duplicate else None
        if duplicate and original is not None and (duplicate[2] == "original_module" or torch.equal(original, tensor)):
            continue
        used = trained.get(name, everything.get(name))
        if used is None:
            raise refused(adapter.what, f"it has {name}, which its base lacks; is it of another model?")
        if used.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, the base takes {tuple(used.shape)}"
            raise refused(adapter.what, f"{name} is of size {shapes}")
        if not torch.allclose(used.float().cpu(), tensor.float(), rtol=1e-2, atol=1e-2):
            raise refused(adapter.what, f"peft changes {name} when it loads it")
    if missing := sorted(trained.keys() - adapter.tensors.keys()):
        raise refused(adapter.what, f"it lacks {missing[0]}")
