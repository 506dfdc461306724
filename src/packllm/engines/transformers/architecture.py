"""What an architecture needs of whoever runs it.

Nothing here is a list of names. The signature says which argument carries what was read so far (its name differs
between versions of transformers too); a few tokens, read in several ways at load, say which of them give what one
fresh pass gives. An architecture is then run in the fastest way that does; one without such a way is refused.
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
"""Arguments that take a transformers Cache, the newest name first."""

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.2
"""How far logits of the same text may lie apart, as a share of their spread: in float32, and in half precision. A
state that is lost moves them by about their spread."""

_known: dict[str, Architecture] = {}
"""By class and configuration: the weights play no part, so models of one kind are tried once."""


@dataclass(frozen=True)
class Architecture:
    """How a model can be run.

    Attributes:
        carrier: the argument that takes the cache; None: none does, or what it carries is wrong. The text is then
            read again from its start at every pass.
        masked: whether a mask is given though all is seen: some take its absence for another way of reading.
        blocks: whether several tokens may follow others in one pass: some recurrent layers begin a block from an empty
            state. They are read one by one then.
        croppable: whether the cache, where it says that it can drop its last tokens, then is as if it had never
            read them.
        steady: whether a token is read the same however long the text is: not so where rotary positions are scaled
            by its length. A token then depends on those after it in its pass.
        switch: the length beyond which positions are scaled in another way, and all is read again in it; 0: none.
        whole: whether logits are the head applied to the body's output: some models cap or scale them after.
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
        """What a model needs: looked up, or tried on eight tokens.

        Args:
            model: a transformers causal LM in evaluation mode.
            vocabulary_size: ids that it and its tokenizer both have.

        Raises:
            LoadError: it does not run on tokens alone, or reads what comes later.
        """
        kind = f"{type(model).__name__} {model.config.to_json_string()} {model.dtype} {vocabulary_size}"
        if kind not in _known:
            _known[kind] = _tried(model, vocabulary_size)
        return _known[kind]

    def new_cache(self, config: Any) -> DynamicCache:
        """An empty cache for a model of this configuration."""
        cache = kv.new(config) if self.carrier else kv.text()
        if self.carrier and self.switch:
            cache.layers += kv.text().layers  # one more than the model has, for the ids
        return cache

    def read(
        self,
        function: Any,
        tokens: Tensor,
        cache: DynamicCache,
        seen: int,
        run: Callable[..., Any] = lambda function, **inputs: function(**inputs),
    ) -> Tensor:
        """What a model, or its body, makes of tokens that come after those in a cache, which takes them in.

        Args:
            function: the model or its body.
            tokens: int64 (1, n).
            cache: from new_cache.
            seen: N, tokens in the cache.
            run: calls the function.

        Returns:
            (1, n, V) logits, or (1, n, d) what the body gives.
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
        if self.masked and not (seen and kv.is_recurrent(cache)):  # those expect a mask of the new tokens alone
            inputs["attention_mask"] = tokens.new_ones(1, seen + count)
        output = run(function, input_ids=tokens, **inputs)
        states = output.logits if "logits" in output else output.last_hidden_state
        return states[:, -count:]


def _tried(model: Any, vocabulary_size: int) -> Architecture:
    """The first way of running a model that gives what fresh passes give."""
    name = type(model).__name__
    _refuse_encoder_decoder(model.config, name)
    trial = _Trial(model, vocabulary_size)
    if not trial.is_causal():
        raise LoadError(
            f"{name} is an encoder ({model.config.model_type}): it reads what comes later, and its logits change with "
            "the tokens after them; members are decoders (causal models; for BERT, one trained with is_decoder=True)"
        )
    for architecture in _candidates(model):
        if trial.holds(architecture):
            if architecture.carrier is None:
                log.warning("%s: its state cannot be carried; every token reads the text from its start again", name)
            return replace(architecture, whole=trial.head_is_whole(architecture))
    raise LoadError(f"{name} does not give the same logits twice for the same tokens")


def _candidates(model: Any) -> Iterator[Architecture]:
    """Ways that a model may be run, what costs least first."""
    parameters = inspect.signature(model.forward).parameters
    config = model.config.get_text_config(decoder=True)
    steady, switch = _scaling(config)
    # Layers of the model's own are run as `generate` runs them: the whole prompt, then token by token.
    own = _has_own_layers(model.config)
    crops, sizes = (True, False) if steady and not own else (False,), (False,) if own else (True, False)
    masks = (False, True) if "attention_mask" in parameters else (False,)
    for carrier in (*(name for name in CARRIERS if name in parameters), None):
        for blocks, masked, croppable in itertools.product(sizes, masks, crops):
            yield Architecture(carrier, masked, blocks, croppable, steady, switch)


def _has_own_layers(config: Any) -> bool:
    """Whether the cache has layers that only this model has."""
    try:
        return any(type(layer).__module__ not in (kv.__name__, cache_utils.__name__) for layer in kv.new(config).layers)
    except Exception:
        return True


def _scaling(config: Any) -> tuple[bool, int]:
    """Whether rotary positions are the same at every length, and the length at which they switch, if they do."""
    settings = getattr(config, "rope_parameters", None) or {}
    told = json.dumps(settings, default=str)
    if "longrope" in told:
        lengths = re.findall(r'"original_max_position_embeddings": (\d+)', told)
        return False, max(map(int, lengths), default=getattr(config, "original_max_position_embeddings", 0))
    return "dynamic" not in told, 0


class _Trial:
    """A few tokens of a model, read in one fresh pass, for other ways of reading them to be held against."""

    COUNT = 8

    def __init__(self, model: Any, vocabulary_size: int) -> None:
        self._model = model
        # Ordinary ids: control tokens, which some models treat apart, come first or last.
        steps = torch.arange(self.COUNT) * max(1, vocabulary_size // (3 * self.COUNT))
        self._ids = ((vocabulary_size // 3 + steps) % vocabulary_size).to(device_of(model))
        try:
            self._fresh = self._read_fresh(self._ids)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LoadError(f"{type(model).__name__} does not run on tokens alone: {first}") from error
        self._tolerance = TOLERANCE
        quantised = getattr(model, "hf_quantizer", None) is not None
        self._rounds = quantised or model.dtype != torch.float32
        self._allowed = max(TOLERANCE, torch.finfo(model.dtype).eps)
        if self._rounds:  # rounding moves logits too: by less than the loss of what came before
            lost = self._apart(self._read_fresh(self._ids[5:]), 5).median().item()
            self._tolerance = min(HALF_TOLERANCE, lost / 4)
            if quantised:  # int8 of bitsandbytes rounds by what the tokens of a pass have in common
                self._allowed = self._tolerance

    @torch.inference_mode()
    def _read_fresh(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids[None], use_cache=False).logits[0].float()

    def is_causal(self) -> bool:
        """Whether other tokens at the end leave the logits before them as they are. Both passes have the same shape, so
        that rounding hardly tells them apart."""
        other = self._read_fresh(torch.cat([self._ids[:5], self._ids[:3]]))
        return bool(self._apart(other[:5], 0).median() <= self._allowed)

    def holds(self, architecture: Architecture) -> bool:
        """Whether the model, run so, gives what a fresh pass gives: read in parts, cropped, and while another text is
        read."""
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
        self._read_fresh(self._ids[3:])  # what another text leaves behind in the model must not matter
        if not right(5, 7):
            return False
        if architecture.croppable and kv.is_full(cache):
            kv.crop(cache, 1)
            return right(6, 7)
        return right(7, 8)

    def _is_fresh(self, logits: Tensor, start: int) -> bool:
        """Whether (n, V) logits are those of the fresh pass from a place on."""
        apart = self._apart(logits, start)
        if not self._rounds:
            return bool((apart <= self._tolerance).all())
        return bool(apart.median() <= self._tolerance)  # rounding sends single tokens to other experts

    def _apart(self, logits: Tensor, start: int) -> Tensor:
        """(n,), how far logits (n, V) are from the fresh pass, as a share of the spread of that."""
        fresh = self._fresh[start : start + len(logits)]
        spread = (fresh - fresh.mean(-1, keepdim=True)).norm(dim=-1)
        return (logits - fresh).norm(dim=-1) / spread.clamp_min(1e-6)

    @torch.inference_mode()
    def head_is_whole(self, architecture: Architecture) -> bool:
        """Whether the head on the body's output gives the model's own logits."""
        model = self._model
        body, head = decoder(model), model.get_output_embeddings()
        if body is None or head is None:
            return False
        if architecture.carrier and architecture.carrier not in inspect.signature(body.forward).parameters:
            return False
        try:
            ours = head(body(input_ids=self._ids[None], use_cache=False).last_hidden_state)[0].float()
        except Exception:  # a body with other arguments: the model's own path always works
            return False
        return ours.shape == self._fresh.shape and torch.allclose(self._fresh, ours, atol=1e-4, rtol=1e-4)


def device_of(model: Any) -> torch.device:
    """Where a model takes its ids: one whose first weights are offloaded is on no device itself."""
    place = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return model.device if model.device.type != "meta" or place is None else torch.device(place)


def decoder(model: Any) -> Any:
    """The part of a model below its LM head; None if it does not tell."""
    body = model.get_decoder() if hasattr(model, "get_decoder") else None
    return None if body is model else body


def auto_class(config: Any) -> Any:
    """The class that loads what of a checkpoint writes text: AutoModelForCausalLM, or for most models that see images
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
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})  # code that comes with the checkpoint
    kind = type(config)
    images = kind in IMAGES and kind not in CAUSAL and not own
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def text_part(model: Any) -> Any:
    """A model, rid of what reads images and sound: what stands beside its decoder and plays no part in text."""
    body, base = decoder(model), model.base_model
    others = {name: child for name, child in base.named_children() if child is not body}
    if body is None or len(others) == len(list(base.children())):
        return model
    ids = torch.full((1, 1), model.config.get_text_config(decoder=True).vocab_size // 3, device=device_of(model))
    words: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if ids.is_meta:  # without a cache some masks need numbers
        words |= {"use_cache": True, "past_key_values": DynamicCache()}
    with torch.inference_mode():
        try:
            before = model(**words).logits
        except Exception:  # it is said later, and better
            return model
        for name, child in others.items():
            setattr(base, name, None)
            try:
                after = model(**words).logits
                same = before.is_meta or torch.equal(after, before)
            except Exception:
                same = False
            if not same:
                setattr(base, name, child)
    return model


def _refuse_encoder_decoder(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise LoadError(f"{name} is an encoder-decoder, which continues no text of its own; give a decoder-only model")
