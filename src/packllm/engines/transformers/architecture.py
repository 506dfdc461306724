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
from dataclasses import astuple, dataclass, replace
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
        positions: whether rows with gaps are told their position ids.
        padded: whether rows of different lengths, padded on the left, give together what each gives alone.
        masked: whether a mask is given even where no row has gaps: some take its absence for another way of reading.
        blocks: whether several tokens may follow others in one pass: some recurrent layers begin a block from an empty
            state. They are read one by one then.
        croppable: whether the cache, where it says that it can drop its last tokens, then is as if it had never
            read them.
        ragged: whether rows may drop different numbers of tokens, which leaves gaps: not where a window is measured
            in columns.
        steady: whether a token is read the same however long the text is: not so where rotary positions are scaled
            by its length. A row then depends on those beside it, and a token on those drafted after it.
        switch: the length beyond which positions are scaled in another way, and all is read again in it; 0: none.
        whole: whether logits are the head applied to the body's output: some models cap or scale them after.
    """

    carrier: str | None
    positions: bool = True
    padded: bool = True
    masked: bool = False
    blocks: bool = True
    croppable: bool = True
    ragged: bool = True
    steady: bool = True
    switch: int = 0
    whole: bool = False

    @classmethod
    def of(cls, model: Any, vocabulary_size: int, fill: int = 0) -> Architecture:
        """What a model needs: looked up, or tried on eight tokens.

        Args:
            model: a transformers causal LM in evaluation mode.
            vocabulary_size: ids that it and its tokenizer both have.
            fill: the id that rows are padded with.

        Raises:
            LoadError: it does not run on tokens alone, or reads what comes later.
        """
        kind = f"{type(model).__name__} {model.config.to_json_string()} {model.dtype} {vocabulary_size} {fill}"
        if kind not in _known:
            _known[kind] = _tried(model, vocabulary_size, fill)
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
        mask: Tensor | None = None,
        run: Callable[..., Any] = lambda function, **inputs: function(**inputs),
    ) -> Tensor:
        """What a model, or its body, makes of tokens that come after those in a cache, which takes them in.

        Args:
            function: the model or its body.
            tokens: int64 (B, n).
            cache: from new_cache.
            seen: N, tokens in the cache.
            mask: int64 (B, N + n), 0 at columns that a row does not have; None: it has all.
            run: calls the function.

        Returns:
            (B, n, V) logits, or (B, n, d) what the body gives.
        """
        count = tokens.shape[1]
        if mask is None and self.masked:
            mask = tokens.new_ones(len(tokens), seen + count)
        if self.carrier and seen and count > 1 and not self.blocks:
            masks = [None if mask is None else mask[:, : seen + at + 1] for at in range(count)]
            steps = zip(tokens.split(1, 1), range(seen, seen + count), masks, strict=True)
            return torch.cat([self.read(function, token, cache, n, part, run) for token, n, part in steps], 1)
        inputs: dict[str, Any] = {"use_cache": False}
        if self.carrier is None or self.switch:
            text = kv.append_text(cache, tokens)
            if self.carrier is None or seen <= self.switch < seen + count:
                tokens = text
        if self.carrier:
            if tokens.shape[1] > count:
                cache.layers = [*kv.new(function.config).layers, cache.layers[-1]]
            inputs = {"use_cache": True, self.carrier: cache}
        if mask is not None and not (seen and kv.is_recurrent(cache)):  # those expect a mask of the new tokens alone
            inputs["attention_mask"] = mask
            if self.positions:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = run(function, input_ids=tokens, **inputs)
        states = output.logits if "logits" in output else output.last_hidden_state
        return states[:, -count:]


def _tried(model: Any, vocabulary_size: int, fill: int) -> Architecture:
    """The first way of running a model that gives what fresh passes give."""
    name = type(model).__name__
    _refuse_encoder_decoder(model.config, name)
    trial = _Trial(model, vocabulary_size, fill)
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
    (steady, switch), windows = _scaling(config), _has_windows(config)
    masks, positions = "attention_mask" in parameters, "position_ids" in parameters
    told = [True, False] if positions else [False]  # some count positions by themselves, from another number
    rows = [(each, True) for each in told] if masks and steady else []
    # Layers of the model's own are run as `generate` runs them: the whole prompt, then token by token.
    own = _has_own_layers(model.config)
    crops, sizes = (True, False) if steady and not own else (False,), (False,) if own else (True, False)
    ways = list(itertools.product(sizes, (False, True) if masks else (False,), crops))
    for carrier in (*(name for name in CARRIERS if name in parameters), None):
        for tells, padded in (*rows, (positions, False)):
            for blocks, masked, croppable in ways:
                for ragged in (True, False) if padded and tells and croppable and not windows else (False,):
                    yield Architecture(carrier, tells, padded, masked, blocks, croppable, ragged, steady, switch)


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


def _has_windows(config: Any) -> bool:
    """Whether some layer may see only the tokens nearby, which eight tokens cannot show."""
    if kinds := getattr(config, "layer_types", None):
        return any(kind != "full_attention" for kind in kinds)
    near = re.compile("window|chunk(?!_size_feed)|local(?!_expert)")
    return any(value and near.search(key) for key, value in config.to_dict().items())


PLAIN, WITH_BLOCKS, WITH_CROPS, WITH_GAPS = 4, 5, 6, 7
"""How many claims of an Architecture, in order, have played a part by each stage of a trial: what fails there fails
for all that make the same."""


class _Trial:
    """A few tokens of a model, read in one fresh pass, for other ways of reading them to be held against."""

    COUNT = 8
    GAP = 2
    """Columns of padding before the second row."""

    def __init__(self, model: Any, vocabulary_size: int, fill: int) -> None:
        self._model, self._fill = model, fill
        # Ordinary ids: control tokens, which some models treat apart, come first or last.
        steps = torch.arange(self.COUNT) * max(1, vocabulary_size // (3 * self.COUNT))
        self._ids = ((vocabulary_size // 3 + steps) % vocabulary_size).to(model.device)
        try:
            self._fresh = self._read_fresh(self._ids)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LoadError(f"{type(model).__name__} does not run on tokens alone: {first}") from error
        self._failed: list[tuple[Any, ...]] = []
        self._claims = PLAIN
        self._tolerance = TOLERANCE
        if model.dtype != torch.float32:  # rounding moves logits too: by less than the loss of what came before
            lost = self._apart(self._read_fresh(self._ids[5:]), 5).median().item()
            self._tolerance = min(HALF_TOLERANCE, lost / 4)

    @torch.inference_mode()
    def _read_fresh(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids[None], use_cache=False).logits[0].float()

    def is_causal(self) -> bool:
        """Whether other tokens at the end leave the logits before them as they are. Both passes have the same shape, so
        that rounding hardly tells them apart."""
        other = self._read_fresh(torch.cat([self._ids[:5], self._ids[:3]]))
        return bool(self._apart(other[:5], 0).median() <= max(TOLERANCE, torch.finfo(self._model.dtype).eps))

    def holds(self, architecture: Architecture) -> bool:
        """Whether the model, run so, gives what a fresh pass gives: read in parts, cropped, beside a row that is
        padded, and while another text is read."""
        claims = astuple(architecture)
        if any(claims[: len(failed)] == failed for failed in self._failed):
            return False
        self._claims = PLAIN
        try:
            right = self._read_in_parts(architecture)
            if right and architecture.padded and not kv.is_plain(architecture.new_cache(self._model.config)):
                right = self._read_in_parts(replace(architecture, padded=False, ragged=False))  # and without a mask
        except Exception as error:
            log.debug("%s does not run as %s: %s", type(self._model).__name__, architecture, error)
            right = False
        if not right:
            self._failed.append(claims[: self._claims])
        return right

    @torch.inference_mode()
    def _read_in_parts(self, architecture: Architecture) -> bool:
        ids, gap, cache = self._ids, self.GAP, architecture.new_cache(self._model.config)
        rows, mask = ids[None], None
        if architecture.padded:  # the second row lags behind by the gap
            rows = torch.stack([ids, torch.cat([ids.new_full((gap,), self._fill), ids[:-gap]])])
            mask = (torch.arange(self.COUNT, device=ids.device) >= torch.tensor([[0], [gap]], device=ids.device)).long()

        def read(start: int, stop: int) -> Tensor:
            part = None if mask is None else mask[:, :stop]
            return architecture.read(self._model, rows[:, start:stop], cache, start, part).float()

        if not self._same(read(0, 5), (0, -gap)):
            return False
        self._claims = WITH_BLOCKS
        self._read_fresh(ids[3:])  # what another text leaves behind in the model must not matter
        crops = architecture.croppable and cache.is_croppable
        if crops:
            cache.activate_past_recording()
        if not self._same(read(5, 7), (5, 5 - gap)):
            return False
        if not crops:
            return self._same(read(7, 8), (7, 7 - gap))
        self._claims = WITH_CROPS
        cache.crop(-1)
        if not architecture.ragged:
            return self._same(read(6, 7), (6, 6 - gap))
        self._claims = WITH_GAPS
        assert mask is not None
        mask, rows = mask.clone(), rows.clone()
        mask[1, 5], rows[1, 6] = 0, ids[5 - gap]  # the second row drops one token more
        return self._same(read(6, 7), (6, 5 - gap))

    def _same(self, rows: Tensor, places: tuple[int, int]) -> bool:
        """Whether logits (1 or 2, n, V) are those of the fresh pass, each row from its place on; a place below 0
        begins with padding."""
        return all(self._is_fresh(row[max(0, -at) :], max(0, at)) for row, at in zip(rows, places, strict=False))

    def _is_fresh(self, logits: Tensor, start: int) -> bool:
        """Whether (n, V) logits are those of the fresh pass from a place on."""
        apart = self._apart(logits, start)
        if self._model.dtype == torch.float32:
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
    ids = torch.full((1, 1), model.config.get_text_config(decoder=True).vocab_size // 3, device=model.device)
    with torch.inference_mode():
        try:
            before = model(input_ids=ids, use_cache=False).logits
        except Exception:  # it is said later, and better
            return model
        for name, child in others.items():
            setattr(base, name, None)
            try:
                same = torch.equal(model(input_ids=ids, use_cache=False).logits, before)
            except Exception:
                same = False
            if not same:
                setattr(base, name, child)
    return model


def _refuse_encoder_decoder(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise LoadError(f"{name} is an encoder-decoder, which continues no text of its own; give a decoder-only model")
