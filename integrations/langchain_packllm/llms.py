"""PackLLM: a packllm.Pack as a LangChain LLM. Translate, iterate Pack.stream, translate back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from threading import Event
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict, Field, model_validator

import packllm

_OPTIONS = tuple(packllm.OptionFields.model_fields)
_FRAMEWORK_WORDS = ("tags", "metadata", "run_name", "run_id")  # keywords of BaseLLM.generate that are no options


class PackLLM(packllm.OptionFields, BaseLLM):
    """Several local language models answering as one LangChain LLM.

    ``PackLLM(models=["org/general", "org/medicine"], max_tokens=64)`` loads a pack;
    ``PackLLM(pack=pack, temperature=0.7)`` shares one. An option comes from the call, else from this object,
    else from the pack. Each answer says in ``generation_info["packllm"]`` what every member counted for.

    `batch` decodes its prompts together, so with `return_exceptions=True` one failure is every prompt's failure;
    `max_concurrency` cuts a batch into slices that run one after the other.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    pack: packllm.Pack = Field(default=cast(packllm.Pack, None), exclude=True, repr=False)
    """The pack that answers, given or loaded from `models`; `pack.close()` frees it."""

    def __init__(
        self,
        *,
        models: Sequence[Any] | None = None,
        pack: packllm.Pack | None = None,
        dtype: Any = "auto",
        device_map: Any = "auto",
        trust_remote_code: bool = False,
        **fields: Any,
    ) -> None:
        """Load `models`, or take `pack`: exactly one of the two.

        Args:
            models: hub ids, local folders or members, as for Pack.load.
            pack: a loaded pack; its options hold where `fields` says nothing.
            dtype: of the weights of `models`, as for Pack.load.
            device_map: where `models` go, as for Pack.load.
            trust_remote_code: whether code that comes with `models` may run.
            fields: packllm's options (see packllm.OptionFields) and LangChain's own fields (cache, tags, ...).

        Raises:
            ValidationError: a field is unknown (the valid ones are named) or out of range; nothing was loaded.
            OptionError: both or neither of models and pack, or words about loading beside a pack.
        """
        loading = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        if (models is None) == (pack is None):
            raise packllm.OptionError("PackLLM takes exactly one of models=[...] and pack=Pack")
        if pack is not None:
            if loading != {"dtype": "auto", "device_map": "auto", "trust_remote_code": False}:
                raise packllm.OptionError(f"{', '.join(loading)} go with models; a pack is loaded already")
            # The fields hold what is in force: `llm.temperature` is true, and configurable_fields, which
            # builds a new PackLLM from all fields of the old one, gets the same model.
            fields = {**pack.options.model_dump(), **fields}
        super().__init__(**fields)
        if pack is None:  # loaded after the fields were checked, for it takes long
            given = {name: getattr(self, name) for name in _OPTIONS if name in self.model_fields_set}
            pack = packllm.Pack.load(models or (), **loading, **given)
        else:
            pack.check(**{name: getattr(self, name) for name in _OPTIONS})
        self.pack = pack

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: dict[str, Any]) -> dict[str, Any]:
        unknown = [name for name in fields if name not in cls.model_fields]
        if unknown:  # pydantic would refuse it too, but without saying what there is
            valid = ["models", "dtype", "device_map", "trust_remote_code", *cls.model_fields]
            raise ValueError(f"unknown field {unknown[0]!r}. Valid fields: {', '.join(sorted(valid))}")
        if "stop" in fields:  # as lenient as the core: one string, or None
            stop = fields["stop"] or ()
            return {**fields, "stop": (stop,) if isinstance(stop, str) else stop}
        return fields

    @model_validator(mode="after")
    def _set_packllm_version(self) -> PackLLM:
        self._add_version("packllm", packllm.__version__)
        return self

    @property
    def _llm_type(self) -> str:
        return "packllm"

    @property
    def model_name(self) -> str:
        """Name of the pack."""
        return self.pack.name

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All that shapes the answer; LangChain makes the cache key of it."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        identity = {"model_name": self.model_name, "pack_fingerprint": self.pack.fingerprint}
        return {**options, "stop": list(self.stop), **identity}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(list(self.stop) if stop is None else stop, **kwargs)
        params["ls_provider"] = "packllm"
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of `text` by the pack's tokenizer; get_num_tokens counts them."""
        return self.custom_get_token_ids(text) if self.custom_get_token_ids else self.pack.tokenize(text)

    def _options(self, stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What this object and the call ask for beyond the pack's own options."""
        own = {name: getattr(self, name) for name in _OPTIONS}
        own = {name: value for name, value in own.items() if value != getattr(self.pack.options, name)}
        return {**own, **kwargs} if stop is None else {**own, **kwargs, "stop": stop}

    def _at_call(
        self, stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[PackLLM, list[str] | None, dict[str, Any]]:
        """This model with the options of one call as its own, the stop strings in force, LangChain's keywords.

        LangChain's cache key holds the model's parameters and the `stop` of the call, but no other keyword of the
        call (langchain #40403), and `stop=None` hides the model's own. Keys must differ where answers do.
        """
        words = {name: kwargs.pop(name) for name in _FRAMEWORK_WORDS if name in kwargs}
        checked = self.pack.options.override(self._options(stop, kwargs))
        llm = self.model_copy(update={name: getattr(checked, name) for name in _OPTIONS})
        return llm, list(llm.stop) or None, words

    def generate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """BaseLLM.generate with all options of the call in the cache key."""
        llm, stop, words = self._at_call(stop, kwargs)
        return super(PackLLM, llm).generate(prompts, stop, callbacks, **words)

    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """BaseLLM.agenerate with all options of the call in the cache key."""
        llm, stop, words = self._at_call(stop, kwargs)
        return await super(PackLLM, llm).agenerate(prompts, stop, callbacks, **words)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        cancelled: Event | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        texts = [""] * len(prompts)
        infos: list[dict[str, Any] | None] = [None] * len(prompts)
        with closing(self.pack.stream_batch(prompts, **self._options(stop, kwargs))) as pieces:
            for index, piece in pieces:
                if cancelled is not None and cancelled.is_set():
                    raise CancelledError("the task that waited for this answer was cancelled")
                chunk = self._chunk(piece)
                if run_manager and len(prompts) == 1:  # of a batch, LangChain hands over the first prompt's run only
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                texts[index] += chunk.text
                infos[index] = chunk.generation_info
        generations = [Generation(text=t, generation_info=i) for t, i in zip(texts, infos, strict=True)]
        usage: Counter[str] = Counter()
        for generation in generations:
            usage.update((generation.generation_info or {}).get("usage", {}))
        llm_output = {"token_usage": dict(usage), "model_name": self.model_name}
        return LLMResult(generations=[[generation] for generation in generations], llm_output=llm_output)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """BaseLLM's way (`_generate` in a thread), and the thread stops when the task is cancelled."""
        cancelled = Event()
        try:
            return await super()._agenerate(prompts, stop, run_manager, cancelled=cancelled, **kwargs)
        finally:
            cancelled.set()

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with closing(self.pack.stream(prompt, **self._options(stop, kwargs))) as pieces:  # closing stops the work
            for piece in pieces:
                chunk = self._chunk(piece)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _chunk(self, piece: packllm.Chunk) -> GenerationChunk:
        if piece.usage is None:  # adding chunks joins repeated strings and refuses repeated floats
            return GenerationChunk(text=piece.text)
        info = {
            "packllm": piece.weights.as_dict(),
            "finish_reason": piece.finish_reason,
            "model_name": self.model_name,
            "usage": piece.usage.as_dict(),
            "timings": piece.timings,
        }
        return GenerationChunk(text=piece.text, generation_info=info)
