"""Finds out how a model's architecture can be run.

This uses no list of names. The signature of forward() shows which argument takes the cache (its name also depends on
the version of transformers). When a model is loaded, a few tokens are read in several ways, and the results compared
with those of one fresh pass. The fastest way with equal results is used; a model without any is refused.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils

from packllm.engines.transformers import kv
from packllm.errors import LoadError

log = logging.getLogger("packllm")

CARRIERS = ("cache", "past_key_values", "cache_params")
"""Arguments that take a transformers cache, the newest name first."""

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.2
"""The largest difference between logits of the same text, relative to their spread: in float32, and in half precision.
If a state were lost, the difference would be about 1."""

_known: dict[str, Architecture] = {}
"""Results by class and configuration: they do not depend on the weights, so each kind of model is tried once."""


@dataclass(frozen=True)
class Architecture:
    """How a model can be run.

    Attributes:
        carrier: the argument that takes the cache; None: there is none, or the cache gives wrong results. Then every
            pass reads the whole text again.
        masked: whether to pass a mask of ones: some models read differently without one.
        blocks: whether a pass may read several tokens after earlier ones. Some recurrent layers start every block from
            an empty state; with these, tokens are read one by one.
        croppable: whether the cache is correct again after its last tokens are removed, if it supports removal.
        steady: whether the result for a token does not depend on the length of the text. It does if rotary positions
            are scaled by the length; then it also depends on later tokens of the same pass.
        switch: the length from which positions are scaled differently, so that all is read again; 0: none.
        whole: whether logits are the head applied to the body's output; some models cap or scale them afterwards.
    """

    carrier: str | None
    masked: bool = False
    blocks: bool = True
    croppable: bool = True
    steady: bool = True
    switch: int = 0
    whole: bool = False

    @classmethod
    def of(cls, model: Any, vocabulary_size: int) -> Architecture:
        """Find out how a model can be run: from an earlier result, or by a trial on eight tokens.

        Args:
            model: a transformers causal LM in evaluation mode.
            vocabulary_size: number of ids that it and its tokenizer both have.

        Raises:
            LoadError: it does not run on tokens alone, or attends to later tokens.
        """
        kind = f"{type(model).__name__} {model.config.to_json_string()} {model.dtype} {vocabulary_size}"
        if kind not in _known:
            _known[kind] = _tried(model, vocabulary_size)
        return _known[kind]

    def new_cache(self, config: Any) -> DynamicCache:
        """An empty cache for a model of this configuration."""
        cache = kv.new(config) if self.carrier else kv.text()
        if self.carrier and self.switch:
            cache.layers += kv.text().layers  # an additional layer for the ids
        return cache

    def read(
        self,
        function: Any,
        tokens: Tensor,
        cache: DynamicCache,
        seen: int,
        run: Callable[..., Any] = lambda function, **inputs: function(**inputs),
    ) -> Tensor:
        """Read tokens after those in a cache, which takes them in; return the output of a model or its body.

        Args:
            function: the model or its body.
            tokens: int64 (1, n).
            cache: from new_cache.
            seen: N, number of tokens in the cache.
            run: calls the function.

        Returns:
            (1, n, V) logits, or (1, n, d) hidden states of the body.
        """
        count = tokens.shape[1]
        if self.carrier and seen and count > 1 and not self.blocks:
            steps = zip(tokens.split(1, 1), range(seen, seen + count), strict=True)
            return torch.cat([self.read(function, token, cache, n, run) for token, n in steps], 1)
        inputs: dict[str, Any] = {"use_cache": False}
        if self.carrier is None or self.switch:
            text = kv.append_text(cache, tokens)
            if self.carrier is None or seen <= self.switch < seen + count:
                tokens = text
        if self.carrier:
            if tokens.shape[1] > count:
                cache.layers = [*kv.new(function.config).layers, cache.layers[-1]]
            inputs = {"use_cache": True, self.carrier: cache}
        if self.masked and not (
            seen and kv.is_recurrent(cache)
        ):  # recurrent models expect a mask of only the new tokens
            inputs["attention_mask"] = tokens.new_ones(1, seen + count)
        output = run(function, input_ids=tokens, **inputs)
        states = output.logits if "logits" in output else output.last_hidden_state
        return states[:, -count:]


def _tried(model: Any, vocabulary_size: int) -> Architecture:
    """The fastest way of running a model that gives the same results as fresh passes."""
    name = type(model).__name__
    _refuse_encoder_decoder(model.config, name)
    trial = _Trial(model, vocabulary_size)
    if not trial.is_causal():
        raise LoadError(
            f"{name} is an encoder ({model.config.model_type}): it attends to later tokens, so that its logits change "
            "with them; members must be decoders (causal models; for BERT, one trained with is_decoder=True)"
        )
    for architecture in _candidates(model):
        if trial.holds(architecture):
            if architecture.carrier is None:
                log.warning("%s: its state cannot be cached; every token reads the whole text again", name)
            return replace(architecture, whole=trial.head_is_whole(architecture))
    raise LoadError(f"{name} does not give the same logits twice for the same tokens, so it cannot be a member")


def _candidates(model: Any) -> Iterator[Architecture]:
    """The possible ways of running a model, the fastest first."""
    parameters = inspect.signature(model.forward).parameters
    config = model.config.get_text_config(decoder=True)
    steady, switch = _scaling(config)
    # A model's own kinds of cache layers are used as in `generate`: the whole prompt, then token by token.
    own_layers = _has_own_layers(model.config)
    crops, sizes = (True, False) if steady and not own_layers else (False,), (False,) if own_layers else (True, False)
    masks = (False, True) if "attention_mask" in parameters else (False,)
    for carrier in (*(name for name in CARRIERS if name in parameters), None):
        for blocks, masked, croppable in itertools.product(sizes, masks, crops):
            yield Architecture(carrier, masked, blocks, croppable, steady, switch)


def _has_own_layers(config: Any) -> bool:
    """Whether the cache has kinds of layers that only this model has."""
    try:
        return any(type(layer).__module__ not in (kv.__name__, cache_utils.__name__) for layer in kv.new(config).layers)
    except Exception:
        return True


def _scaling(config: Any) -> tuple[bool, int]:
    """Whether rotary positions do not depend on the length, and the length at which their scaling switches, or 0."""
    settings = getattr(config, "rope_parameters", None) or {}
    text = json.dumps(settings, default=str)
    if "longrope" in text:
        lengths = re.findall(r'"original_max_position_embeddings": (\d+)', text)
        return False, max(map(int, lengths), default=getattr(config, "original_max_position_embeddings", 0))
    return "dynamic" not in text, 0


class _Trial:
    """A few tokens read in one fresh pass, with which other ways of reading are compared."""

    COUNT = 8

    def __init__(self, model: Any, vocabulary_size: int) -> None:
        self._model = model
        # Ordinary ids: control tokens, which some models treat differently, have the first or last ids.
        steps = torch.arange(self.COUNT) * max(1, vocabulary_size // (3 * self.COUNT))
        self._ids = ((vocabulary_size // 3 + steps) % vocabulary_size).to(device_of(model))
        try:
            self._fresh = self._read_fresh(self._ids)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LoadError(f"{type(model).__name__} does not run on tokens alone: {reason}") from error
        self._tolerance = TOLERANCE
        quantised = getattr(model, "hf_quantizer", None) is not None
        self._rounds = quantised or model.dtype != torch.float32
        self._allowed = max(TOLERANCE, torch.finfo(model.dtype).eps)
        if self._rounds:  # rounding changes logits too, but less than a lost state
            loss = self._distance(self._read_fresh(self._ids[5:]), 5).median().item()
            self._tolerance = min(HALF_TOLERANCE, loss / 4)
            if quantised:  # in int8 of bitsandbytes rounding depends on all tokens of a pass
                self._allowed = self._tolerance

    @torch.inference_mode()
    def _read_fresh(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids[None], use_cache=False).logits[0].float()

    def is_causal(self) -> bool:
        """Whether logits do not change with later tokens. Both passes have the same shape, so that rounding hardly
        differs."""
        other = self._read_fresh(torch.cat([self._ids[:5], self._ids[:3]]))
        return bool(self._distance(other[:5], 0).median() <= self._allowed)

    def holds(self, architecture: Architecture) -> bool:
        """Whether the model, run in this way, gives the results of a fresh pass: read in parts, after a crop, and with
        another text read in between."""
        try:
            return self._read_in_parts(architecture)
        except Exception as error:
            log.debug("%s does not run as %s: %s", type(self._model).__name__, architecture, error)
            return False

    @torch.inference_mode()
    def _read_in_parts(self, architecture: Architecture) -> bool:
        cache = architecture.new_cache(self._model.config)

        def right(start: int, stop: int) -> bool:
            logits = architecture.read(self._model, self._ids[None, start:stop], cache, start)[0]
            return self._is_fresh(logits.float(), start)

        if not right(0, 5):
            return False
        self._read_fresh(self._ids[3:])  # a text read in between must have no effect
        if not right(5, 7):
            return False
        if architecture.croppable and kv.is_full(cache):
            kv.crop(cache, 1)
            return right(6, 7)
        return right(7, 8)

    def _is_fresh(self, logits: Tensor, start: int) -> bool:
        """Whether logits (n, V) equal those of the fresh pass from a position on."""
        apart = self._distance(logits, start)
        if not self._rounds:
            return bool((apart <= self._tolerance).all())
        return bool(apart.median() <= self._tolerance)  # rounding may route single tokens to other experts

    def _distance(self, logits: Tensor, start: int) -> Tensor:
        """The distance of logits (n, V) from the fresh pass, relative to its spread: (n,)."""
        fresh = self._fresh[start : start + len(logits)]
        spread = (fresh - fresh.mean(-1, keepdim=True)).norm(dim=-1)
        return (logits - fresh).norm(dim=-1) / spread.clamp_min(1e-6)

    @torch.inference_mode()
    def head_is_whole(self, architecture: Architecture) -> bool:
        """Whether the head, applied to the body's output, gives the model's logits."""
        model = self._model
        body, head = decoder(model), model.get_output_embeddings()
        if body is None or head is None:
            return False
        if architecture.carrier and architecture.carrier not in inspect.signature(body.forward).parameters:
            return False
        try:
            ours = head(body(input_ids=self._ids[None], use_cache=False).last_hidden_state)[0].float()
        except Exception:  # a body with other arguments; the whole model can be used instead
            return False
        return ours.shape == self._fresh.shape and torch.allclose(self._fresh, ours, atol=1e-4, rtol=1e-4)


def device_of(model: Any) -> torch.device:
    """The device of a model's inputs. A model with offloaded first weights has no device itself."""
    place = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return model.device if model.device.type != "meta" or place is None else torch.device(place)


def decoder(model: Any) -> Any:
    """The part of a model below its LM head; None if the model does not tell it."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else None
    return None if body is model else body


def auto_class(config: Any) -> Any:
    """The class that loads the text model of a checkpoint: AutoModelForCausalLM, or for most vision-language models
    AutoModelForImageTextToText.

    Args:
        config: of the checkpoint, by AutoConfig.

    Raises:
        LoadError: the checkpoint is an encoder-decoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as IMAGES
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    _refuse_encoder_decoder(config, type(config).__name__)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})  # the checkpoint comes with code
    kind = type(config)
    images = kind in IMAGES and kind not in CAUSAL and not has_own_code
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def text_part(model: Any) -> Any:
    """A model without its parts for images and sound: those beside its decoder that do not affect text."""
    body, base = decoder(model), model.base_model
    others = {name: child for name, child in base.named_children() if child is not body}
    if body is None or len(others) == len(list(base.children())):
        return model
    ids = torch.full((1, 1), model.config.get_text_config(decoder=True).vocab_size // 3, device=device_of(model))
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if ids.is_meta:  # without a cache some masks need real data
        inputs |= {"use_cache": True, "past_key_values": DynamicCache()}
    with torch.inference_mode():
        try:
            before = model(**inputs).logits
        except Exception:  # a later check has a better error message
            return model
        for name, child in others.items():
            setattr(base, name, None)
            try:
                after = model(**inputs).logits
                same = before.is_meta or torch.equal(after, before)
            except Exception:
                same = False
            if not same:
                setattr(base, name, child)
    return model


def _refuse_encoder_decoder(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise LoadError(f"{name} is an encoder-decoder, which cannot continue a text; give a decoder-only model")
