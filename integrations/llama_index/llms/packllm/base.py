"""A pack of models as a LlamaIndex LLM: it converts requests for `Pack.stream`, and converts the results back."""

from __future__ import annotations

import difflib
import functools
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW, DEFAULT_NUM_OUTPUTS
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from pydantic import PrivateAttr

from llama_index.llms.packllm.messages import ChatReply, CompletionReply, from_message, log_probs
from llama_index.llms.packllm.streams import streaming
from llama_index.llms.packllm.structured import StructuredOutput
from llama_index.llms.packllm.tool_calls import ToolCalling
from packllm import Chunk, Formatted, Generation, OptionError, OptionFields, Options, Pack, PackError

Response = TypeVar("Response", CompletionResponse, ChatResponse)
# (piece of text, raw, whether it is the last, piece of reasoning) -> response
Reply = Callable[[str, dict[str, Any], bool, str], Response]

LOADING = (
    *("dtype", "device_map", "trust_remote_code", "model_kwargs"),
    *("quantization", "max_memory", "engine", "prepack"),
)
Prompt = str | list[dict[str, Any]]
HERE_ONLY = {"callback_manager", "rate_limiter"}  # specific to the process, so not part of to_dict()


class PackLLM(CustomLLM, StructuredOutput, ToolCalling, OptionFields):
    """Several local models that answer as one.

    Takes the `models` to load or a loaded `pack`, and any option of `packllm.Options`. Options of a call override those
    set here, which override the pack's. With `Settings.tokenizer = llm.pack.tokenize`, LlamaIndex counts tokens like
    the pack.

    Examples:
        ```python
        llm = PackLLM(models=["general-model", "medical-model"], weighting="em", max_tokens=200)
        response = llm.complete("Aspirin is")
        response.text, response.raw["packllm"]["weights"]
        ```
    """

    models: list[str] | None = None
    """Hub names, local folders, .gguf files or "base+adapter"; None for a pack made from Member objects."""
    dtype: Any = "auto"
    """Number format of the weights, as in Pack.load."""
    device_map: Any = "auto"
    """Devices of the models, as in accelerate."""
    trust_remote_code: bool = False
    """Whether to run code that comes with a model."""
    model_kwargs: dict[str, Any] | None = None
    """Further arguments of transformers' from_pretrained."""
    quantization: Any = None
    """Quantization of the weights on an accelerator, as in Pack.load."""
    max_memory: Any = None
    """Limit on the memory of the weights, as in Pack.load."""
    engine: str | None = None
    """Engine of .gguf files, as in Pack.load."""
    prepack: bool = False
    """Whether linear layers are held in a second, faster layout, as in Pack.load."""

    _pack: Pack = PrivateAttr()

    def __init__(self, models: Any = None, *, pack: Pack | None = None, **fields: Any) -> None:
        unknown = [name for name in fields if name not in type(self).model_fields]
        if unknown:
            valid = ["pack", *type(self).model_fields]
            near = difflib.get_close_matches(unknown[0], valid, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise OptionError(f"unknown name {unknown[0]!r}{hint} Valid names: {', '.join(valid)}")
        if (models is None) == (pack is None):
            raise OptionError("PackLLM takes either models=[...] to load or a loaded pack=, one of the two")
        given = {name: fields.pop(name) for name in list(fields) if name in Options.model_fields}
        options = _one_answer(Options.model_validate({}).override(given).model_dump(exclude_unset=True))
        loading = {name: fields[name] for name in LOADING if name in fields}
        if pack is None:
            pack = Pack.load(models, **loading, **options)
        elif loading:
            raise OptionError(f"{next(iter(loading))} belongs to models=[...]; the given pack is already loaded")
        pack.check(**options)
        others = {name: value for name, value in fields.items() if name not in LOADING}
        super().__init__(**(pack.recipe or {}), **others, **options)
        self._pack = pack

    @classmethod
    def class_name(cls) -> str:
        return "PackLLM"

    @property
    def pack(self) -> Pack:
        """The pack that answers."""
        return self._pack

    @property
    def metadata(self) -> LLMMetadata:
        """The metadata with which LlamaIndex splits prompts.

        context_window leaves out what the members' chat templates write around a system's and a user's message, for
        LlamaIndex fills the window with text, counted without them. num_output, where max_tokens is not set, is a
        quarter of a small window (64 tokens, as far as half of it has them): refining needs room for two answers.
        LlamaIndex's modes refine and compact themselves keep 500 tokens free for the answer so far; for a window below
        some 1,000 tokens, give them less: CompactAndRefine(llm=llm, response_padding_size=100).
        """
        window = self._pack.context_window or DEFAULT_CONTEXT_WINDOW
        if self._pack.context_window and self._pack.has_chat_template:
            window = max(1, window - self._pack.template_tokens)
        little = min(64, window // 2)
        return LLMMetadata(
            context_window=window,
            # Prompts are cut to window - num_output.
            num_output=self._set_options().get("max_tokens") or min(DEFAULT_NUM_OUTPUTS, max(window // 4, little)),
            is_chat_model=self._pack.has_chat_template,
            is_function_calling_model=self._pack.has_chat_template,
            model_name=self._pack.name,
        )

    # Each public method emits one event, so none calls another.

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return self._answer(CompletionReply(), *self._text_request(prompt, formatted, kwargs))

    @streaming(llm_completion_callback())
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return self._stream(CompletionReply(), *self._text_request(prompt, formatted, kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return await self._aanswer(CompletionReply(), *self._text_request(prompt, formatted, kwargs))

    @streaming(llm_completion_callback())
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return await self._astream(CompletionReply(), *self._text_request(prompt, formatted, kwargs))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages. Calls of the tools in `tools=` are in the blocks and in additional_kwargs["tool_calls"]."""
        return self._answer(*self._chat_request(messages, **kwargs))

    @streaming(llm_chat_callback())
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._stream(*self._chat_request(messages, **kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await self._aanswer(*self._chat_request(messages, **kwargs))

    @streaming(llm_chat_callback())
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return await self._astream(*self._chat_request(messages, **kwargs))

    def _answer(self, reply: Reply[Response], prompt: Prompt, options: dict[str, Any]) -> Response:
        return _whole(reply, self._pack.generate(prompt, **options))

    async def _aanswer(self, reply: Reply[Response], prompt: Prompt, options: dict[str, Any]) -> Response:
        return _whole(reply, await self._pack.agenerate(prompt, **options))

    def _stream(self, reply: Reply[Response], prompt: Prompt, options: dict[str, Any]) -> Generator[Response]:
        chunks = self._pack.stream(prompt, **options)  # invalid options raise here, not at the first iteration

        def responses() -> Generator[Response]:
            respond = _responder(reply)
            with closing(chunks):
                for chunk in chunks:
                    yield respond(chunk)

        return responses()

    async def _astream(
        self, reply: Reply[Response], prompt: Prompt, options: dict[str, Any]
    ) -> AsyncGenerator[Response]:
        self._pack.check(**options)  # as above

        async def responses() -> AsyncGenerator[Response]:
            respond = _responder(reply)
            async with aclosing(self._pack.astream(prompt, **options)) as chunks:
                async for chunk in chunks:
                    yield respond(chunk)

        return responses()

    def _chat_request(
        self,
        messages: Sequence[ChatMessage],
        *,
        allow_parallel_tool_calls: bool = True,
        parallel_tool_calls: bool = True,
        **kwargs: Any,
    ) -> tuple[ChatReply, Prompt, dict[str, Any]]:
        """(function that makes responses from pieces, the prompt for the pack, the options)."""
        options = self._call_options(kwargs)
        parallel = allow_parallel_tool_calls and parallel_tool_calls  # LlamaIndex's and OpenAI's names
        reply = ChatReply(self._pack.check(**options).offered_tools, parallel)
        if self.messages_to_prompt in (None, generic_messages_to_prompt):  # not set: the chat templates are used
            return reply, [from_message(message) for message in messages], options
        return reply, _formatted(messages, self.messages_to_prompt), self._as_it_is(options)

    def _text_request(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> tuple[Prompt, dict[str, Any]]:
        options = self._call_options(kwargs)
        if formatted:
            return Formatted.whole(prompt), self._as_it_is(options)
        if self.completion_to_prompt in (None, default_completion_to_prompt):  # not set
            return prompt, options
        write = self.completion_to_prompt
        return Formatted.by(lambda texts: write(texts[0]), [prompt]), options

    def _call_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return _one_answer({name: getattr(self, name) for name in self._own_options()} | kwargs)

    def _as_it_is(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options for a prompt that is formatted already: without the members' chat templates."""
        wrapped = options.get("chat_template", self._pack.options.chat_template)
        return options | {"chat_template": False} if wrapped else options

    def _own_options(self) -> list[str]:
        return [name for name in Options.model_fields if name in self.model_fields_set]

    def _set_options(self) -> dict[str, Any]:
        """The options that are set here or on the pack; those set here have priority."""
        return self._pack.options.model_dump(exclude_unset=True) | {n: getattr(self, n) for n in self._own_options()}

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """A description that `from_dict` can load. Options that are not set are left out, so they stay unset."""
        described = super().to_dict(**kwargs)
        return {name: v for name, v in described.items() if name not in Options.model_fields} | self._set_options()

    def __reduce__(self) -> tuple[Any, ...]:
        # LlamaIndex's own method deletes fields that cannot be pickled from this instance. Weights are not pickled:
        # the other process loads them again.
        if self._pack.recipe is None:
            raise PackError("a pack made from Member objects cannot be pickled; load it by names or folders instead")
        fields = {name: getattr(self, name) for name in self.model_fields_set - HERE_ONLY}
        return functools.partial(type(self), **(fields | self._set_options())), ()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> PackLLM:
        memo = {} if memo is None else memo
        memo[id(self._pack)] = self._pack  # copies share the loaded models
        return super().__deepcopy__(memo)


def _one_answer(options: dict[str, Any]) -> dict[str, Any]:
    """The options without n. Raise OptionError if they ask for several answers."""
    if (n := options.pop("n", None)) not in (None, 1):
        raise OptionError(f"n={n}: a response of LlamaIndex's is one answer; call pack.generate(prompt, n={n})")
    return options


def _formatted(messages: Sequence[ChatMessage], write: Callable[[Sequence[ChatMessage]], str]) -> Formatted:
    """The messages as text, made by a formatter."""
    users = [at for at, message in enumerate(messages) if message.role == MessageRole.USER]
    texts = [message.content for message in messages]
    if any(text is None for text in texts):
        return Formatted.whole(write(messages))

    def written(contents: list[str]) -> str:
        pairs = zip(messages, contents, strict=True)
        return write([m if m.content == c else m.model_copy(update={"blocks": [TextBlock(text=c)]}) for m, c in pairs])

    return Formatted.by(written, [text or "" for text in texts], users)


def _raw(generation: Generation) -> dict[str, Any]:
    """JSON-safe values: `usage` for LlamaIndex's TokenCountingHandler, and `packllm` with all data of the answer."""
    raw = generation.as_dict()
    told = {**raw["weights"], "usage": raw["usage"], "timings": raw["timings"]}
    if generation.explanation is not None:
        told["explanation"] = raw["explanation"]
    return {**raw, "packllm": told}


def _whole(reply: Reply[Response], generation: Generation) -> Response:
    response = reply(generation.text, _raw(generation), True, generation.reasoning)
    response.delta = None
    response.logprobs = log_probs(generation.logprobs)
    return response


def _responder(reply: Reply[Response]) -> Callable[[Chunk], Response]:
    """A function that makes responses from the chunks of one stream, called in order."""
    so_far: list[Chunk] = []
    told: list[Any] = []

    def respond(chunk: Chunk) -> Response:
        so_far.append(chunk)
        last = chunk.finish_reason is not None
        raw = _raw(Generation.from_chunks(so_far)) if last else {"packllm": chunk.weights.as_dict()}
        response = reply(chunk.text, raw, last, chunk.reasoning)
        told.extend(log_probs(chunk.logprobs) or ())
        response.logprobs = list(told) or None
        return response

    return respond
