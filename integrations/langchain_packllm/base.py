"""The common base of PackLLM and ChatPackLLM: a loaded pack, its options as fields, and the options of a call."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, cast

from langchain_core.language_models import BaseLanguageModel
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from pydantic import ConfigDict, Field, SecretStr, model_validator

import packllm

LOADING = (
    *("dtype", "device_map", "trust_remote_code", "model_kwargs"),
    *("quantization", "max_memory", "engine", "prepack"),
)
OPTIONS = tuple(packllm.OptionFields.model_fields)


class PackModel(packllm.OptionFields, BaseLanguageModel):
    """A LangChain model whose answers come from a packllm.Pack."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    pack: packllm.Pack = Field(default=cast(packllm.Pack, None), exclude=True, repr=False)
    """The pack that answers, given or loaded from `models`; `pack.close()` frees its memory."""

    max_retries: int | None = Field(default=None, exclude=True, repr=False)
    """Accepted as by LangChain's models, without effect: a local member that fails would fail again."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """Accepted as by LangChain's models, without effect: local members need none. It is never serialised."""

    def __init__(
        self,
        *,
        models: Any = None,
        pack: packllm.Pack | None = None,
        dtype: Any = "auto",
        device_map: Any = "auto",
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        quantization: Any = None,
        max_memory: Any = None,
        engine: str | None = None,
        prepack: bool = False,
        **fields: Any,
    ) -> None:
        """Load `models`, or use `pack`: exactly one of the two.

        Args:
            models: as for Pack.load: hub ids, local folders, (model, tokenizer) pairs, members, ...
            pack: a loaded pack; its options hold where `fields` has none.
            dtype: of the weights of `models`, as for Pack.load.
            device_map: the devices of `models`, as for Pack.load.
            trust_remote_code: whether code that comes with `models` may run.
            model_kwargs: further arguments of transformers' from_pretrained, as for Pack.load.
            quantization, max_memory, engine, prepack: as for Pack.load.
            fields: packllm's options (see packllm.OptionFields) and LangChain's own fields (cache, tags, ...).

        Raises:
            ValidationError: a field is unknown (the message has the valid ones) or out of range; nothing was loaded.
            OptionError: both or neither of models and pack, or loading arguments together with a pack.
        """
        loading: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        further = {"model_kwargs": model_kwargs, "quantization": quantization, "max_memory": max_memory}
        further |= {"engine": engine, "prepack": prepack or None}
        loading |= {name: value for name, value in further.items() if value is not None}
        if (models is None) == (pack is None):
            raise packllm.OptionError(f"{type(self).__name__} takes exactly one of models=[...] and pack=Pack")
        if pack is not None:
            if loading != {"dtype": "auto", "device_map": "auto", "trust_remote_code": False}:
                raise packllm.OptionError(f"{', '.join(LOADING)} go with models; a pack is loaded already")
            # The fields hold the effective options. So `llm.temperature` is correct, and configurable_fields, which
            # makes a new object from all fields of the old one, makes an equal model.
            fields = {**pack.options.model_dump(), **fields}
        super().__init__(**fields)
        if pack is None:  # loaded after the fields are checked, because it takes long
            options = {name: getattr(self, name) for name in OPTIONS if name in self.model_fields_set and name != "n"}
            pack = packllm.Pack.load(models, **loading, **options)
        else:
            pack.check(**{name: getattr(self, name) for name in OPTIONS})
        self.pack = pack

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name in fields if name not in cls.model_fields]
        if unknown:  # pydantic would refuse it too, but without the valid names
            valid = ["models", *LOADING, *cls.model_fields]
            near = difflib.get_close_matches(unknown[0], valid, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown field {unknown[0]!r}{hint} Valid fields: {', '.join(sorted(valid))}")
        if "stop" in fields:  # as in the core: also one string, or None
            stop = fields["stop"] or ()
            return {**fields, "stop": (stop,) if isinstance(stop, str) else stop}
        return fields

    @model_validator(mode="after")
    def _set_packllm_version(self) -> Self:
        self._add_version("packllm", packllm.__version__)
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Yes: a dump names what the models were loaded from. `load` loads it again, with the same trust as
        models=[...]."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The loading arguments, beside the fields."""
        return {name: _written(value) for name, value in (self.pack.recipe or {}).items()}

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """LangChain's dump: "not_implemented" if the pack was made from Member objects, which cannot be loaded
        again."""
        if self.pack.recipe is not None:
            return super().to_json()
        return SerializedNotImplemented(**{**self.to_json_not_implemented(), "name": self.get_name()})

    @property
    def model_name(self) -> str:
        """Name of the pack."""
        return self.pack.name

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """Everything that affects the answer; LangChain makes the cache key from it."""
        options = {name: getattr(self, name) for name in OPTIONS}
        identity = {"model_name": self.model_name, "pack_fingerprint": self.pack.fingerprint}
        return {**options, "stop": list(self.stop), **identity}

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` by the pack's tokenizer; get_num_tokens counts them."""
        return self.custom_get_token_ids(text) if self.custom_get_token_ids else self.pack.tokenize(text)

    def _options(self, stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The options of this object and of the call that differ from the pack's."""
        options = {name: getattr(self, name) for name in OPTIONS}
        options = {name: value for name, value in options.items() if value != getattr(self.pack.options, name)}
        return {**options, **kwargs} if stop is None else {**options, **kwargs, "stop": stop}


def told_logprobs(answer: packllm.Chunk | packllm.Generation) -> dict[str, Any]:
    """{"logprobs": ...} in OpenAI's format, with the members' too; {} if they were not requested."""
    if answer.logprobs is None:
        return {}
    return {"logprobs": {"content": [token.as_dict() for token in answer.logprobs]}}


def told_weights(last: packllm.Chunk | packllm.Generation) -> dict[str, Any]:
    """The weights of a complete answer, with its explanation if it was requested."""
    explanation = {} if last.explanation is None else {"explanation": last.explanation.as_dict()}
    return {**last.weights.as_dict(), **explanation}


def joint_usage(answers: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Sum the token counts of all answers to all prompts. Each prompt is read, and counted, once; servers' counts are
    summed completely."""
    joint: Counter[str] = Counter()
    servers: dict[str, Counter[str]] = {}
    for same_prompt in answers:
        for at, usage in enumerate(same_prompt):
            joint.update({name: count for name, count in usage.items() if name != "servers"})
            for name, counts in usage.get("servers", {}).items():
                servers.setdefault(name, Counter()).update(counts)
            if at:
                joint.subtract(dict.fromkeys(("prompt_tokens", "total_tokens"), usage["prompt_tokens"]))
                joint.subtract({"cached_tokens": usage["cached_tokens"]})
    return {**joint, "servers": {name: dict(counts) for name, counts in servers.items()}} if servers else dict(joint)


def _written(value: Any) -> Any:
    """A loading argument as JSON: torch's dtypes and devices by name."""
    if isinstance(value, Mapping):
        return {key: _written(inner) for key, inner in value.items()}
    return value if isinstance(value, str | int | float | list | None) else str(value).removeprefix("torch.")
