"""ChatPackLLM: a packllm.Pack as a LangChain chat model. Translate, iterate Pack.stream, translate back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from langchain_core.tools import BaseTool

import packllm
from langchain_packllm.base import PackModel, joint_usage, told_logprobs, told_weights
from langchain_packllm.errors import typed
from langchain_packllm.messages import call_chunk, pack_messages, tool_calls
from langchain_packllm.structured import schema_of, structured_output, tool_of

_FOR_TRACES = ("ls_structured_output_format", "structured_output_format", "stream")  # no options of the pack


class ChatPackLLM(PackModel, BaseChatModel):
    """Several local language models answering as one LangChain chat model.

    ``ChatPackLLM(models=["org/general", "org/medicine"], max_tokens=64)`` loads a pack;
    ``ChatPackLLM(pack=pack, temperature=0.7)`` shares one. An option comes from the call, otherwise from this object,
    otherwise from the pack. ``model="medicine"`` in a call lets this member answer alone. Each answer has the members'
    weights in ``response_metadata["packllm"]``.

    Reasoning before an answer is in ``additional_kwargs["reasoning_content"]`` and, in LangChain 1, in
    ``content_blocks``. It is no part of the content, and tool calls in it are ignored.

    Each member gets tools through its own chat template, or as text if the template does not support them. With
    ``tool_choice`` "any" or a name, and with structured output, the form of the answer is guaranteed: this needs
    ``packllm[structured]``.
    """

    streaming: bool = False
    """Whether `invoke` also streams, so that its callbacks get the tokens."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if self.profile is None:  # LangChain asked for it before the pack was loaded
            self.profile = self._resolve_model_profile()

    @property
    def _llm_type(self) -> str:
        return "packllm-chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # In the cache key, LangChain replaces the model's stop strings by those of the call.
        return {**super()._identifying_params, "default_stop": list(self.stop)}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache key. LangChain uses the dump of a serialisable model. This is the same for all packs of Member
        objects, and for whatever a folder contains. The parameters here include the members' fingerprints."""
        return str(sorted({**self._get_invocation_params(stop=stop, **kwargs), **kwargs}.items()))

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(list(self.stop) if stop is None else stop, **kwargs)
        params["ls_provider"] = "packllm"
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        if self.pack is None:
            return None
        profile = ModelProfile(
            name=self.model_name,
            text_inputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            text_outputs=True,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
        )
        if self.pack.context_window is not None:
            profile["max_input_tokens"] = self.pack.context_window
        return profile

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools to call.

        Args:
            tools: anything that LangChain can make a tool of.
            tool_choice: "auto" or None: a call or text; "any", "required" or True: one call; a tool's name (or
                OpenAI's dict of it): a call of that tool; "none" or False: text.
            strict: passed into the tools' description; a required call satisfies its schema in any case.
            response_format: a schema that answers in text must have (OpenAI's dict, or what
                with_structured_output takes).
            kwargs: options of the calls; parallel_tool_calls=False: at most one call an answer.
        """
        if tools:
            kwargs["tools"] = [tool_of(tool, strict) for tool in tools]
        if isinstance(tool_choice, bool):
            tool_choice = "any" if tool_choice else "none"
        if isinstance(tool_choice, dict):
            tool_choice = _choice(tool_choice)
        if tool_choice is not None and (tools or tool_choice not in ("auto", "none")):
            kwargs["tool_choice"] = tool_choice
        if response_format is not None:
            kwargs["json_schema"] = schema_of(response_format)
        return self.bind(**kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: str = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """This model with answers that satisfy a schema, and so always parse.

        Args:
            schema: pydantic class, dataclass, enumeration, TypedDict, JSON schema (any, it is passed through) or
                OpenAI function.
            method: "json_schema": the answer is JSON of the schema; "function_calling": it is a call of a tool with
                such arguments; "json_mode": as json_schema.
            include_raw: give {"raw": message, "parsed": ..., "parsing_error": ...}.
            strict: passed into the tool's description, for function_calling; the form is guaranteed in any case.
            kwargs: options of the calls.
        """
        return structured_output(self.bind, schema, method, include_raw, strict, kwargs)

    def _request(
        self, stop: Sequence[str] | None, kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Callable[[], packllm.ToolStream]]:
        """The options of a call, and a factory of parsers for its answers."""
        options = self._options(stop, {name: value for name, value in kwargs.items() if name not in _FOR_TRACES})
        model = options.pop("model", self.model_name)
        if not isinstance(model, str):
            raise packllm.OptionError(f"model={model!r} must be the name of a member")
        if model != self.model_name:
            options["weighting"] = {model: 1.0}
        parallel = options.pop("parallel_tool_calls", True)
        tools = self.pack.check(**options).offered_tools
        return options, partial(packllm.ToolStream, tools, parallel=parallel is not False)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with typed():
            options, make_parser = self._request(stop, kwargs)
            prompt, n = pack_messages(messages), self.pack.check(**options).n or 1
            options.pop("n", None)
            if n > 1:
                return self._result(self.pack.generate(prompt, n=n, **options), make_parser, kwargs)
            return self._result([self.pack.generate(prompt, **options)], make_parser, kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with typed():
            options, make_parser = self._request(stop, kwargs)
            prompt, n = pack_messages(messages), self.pack.check(**options).n or 1
            options.pop("n", None)
            if n > 1:
                return self._result(await self.pack.agenerate(prompt, n=n, **options), make_parser, kwargs)
            return self._result([await self.pack.agenerate(prompt, **options)], make_parser, kwargs)

    def _result(
        self,
        answers: Sequence[packllm.Generation],
        make_parser: Callable[[], packllm.ToolStream],
        kwargs: Mapping[str, Any],
    ) -> ChatResult:
        generations = [self._generation(answer, make_parser(), kwargs) for answer in answers]
        usage = joint_usage([[answer.usage.as_dict() for answer in answers]])
        llm_output = {"token_usage": usage, "model_name": kwargs.get("model", self.model_name)}
        return ChatResult(generations=generations, llm_output=llm_output)

    def _generation(
        self, answer: packllm.Generation, parts: packllm.ToolStream, kwargs: Mapping[str, Any]
    ) -> ChatGeneration:
        parts.feed(answer.text)
        parts.finish()
        calls, invalid = tool_calls(parts.answer)
        reasoning = answer.reasoning + parts.answer.reasoning
        usage, info = self._ending(answer, kwargs)
        message = AIMessage(
            parts.answer.content,
            additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
            tool_calls=calls,
            invalid_tool_calls=invalid,
            usage_metadata=usage,
            response_metadata={"model_provider": "packllm"},
        )
        return ChatGeneration(message=message, generation_info=info)

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answers to several inputs, `batch_size` of them at a time, or `max_concurrency` if that is less.

        Each input is a separate run, with its own callbacks, cache entry and errors; concurrent runs share the members'
        passes.
        """
        configs = self._bounded(len(inputs), config, kwargs)
        return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """As batch."""
        configs = self._bounded(len(inputs), config, kwargs)
        return await super().abatch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def _bounded(
        self, count: int, config: RunnableConfig | list[RunnableConfig] | None, kwargs: Mapping[str, Any]
    ) -> list[RunnableConfig]:
        """Configurations of `count` runs, of which at most batch_size run at a time."""
        call_options = {name: kwargs[name] for name in ("batch_size",) if name in kwargs}
        with typed():
            size = self.pack.check(**self._options(None, call_options)).batch_size
        return [
            RunnableConfig(**{**one, "max_concurrency": min(size, one.get("max_concurrency") or size)})
            for one in get_config_list(config, count)
        ]

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with typed():
            options, make_parser = self._request(stop, kwargs)
            parts = make_parser()
            with closing(self.pack.stream(pack_messages(messages), **options)) as pieces:  # closing stops the work
                for piece in pieces:
                    yield from self._translated(piece, parts, kwargs)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with typed():
            options, make_parser = self._request(stop, kwargs)
            parts = make_parser()
            async with aclosing(self.pack.astream(pack_messages(messages), **options)) as pieces:
                async for piece in pieces:
                    for chunk in self._translated(piece, parts, kwargs):
                        yield chunk

    def _translated(
        self, piece: packllm.Chunk, parts: packllm.ToolStream, kwargs: Mapping[str, Any]
    ) -> Iterator[ChatGenerationChunk]:
        """Translate a piece; after the last one add the facts about the whole answer."""
        chunks = [_chunk(packllm.ReasoningPart(piece.reasoning))] if piece.reasoning else []
        chunks += map(_chunk, parts.feed(piece.text))
        if piece.finish_reason is None:
            if piece.logprobs:
                chunks = chunks or [_chunk("")]
                chunks[0].generation_info = told_logprobs(piece)
            yield from chunks
            return
        yield from chunks
        yield from map(_chunk, parts.finish())
        usage, info = self._ending(piece, kwargs)
        metadata = {"model_provider": "packllm"}
        last = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata, chunk_position="last")
        yield ChatGenerationChunk(message=last, generation_info=info)

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[dict[str, Any] | type | Callable | BaseTool] | None = None
    ) -> int:
        """Tokens of the prompt with these messages and tools, in the pack's first member, however many they are."""
        offered = [tool_of(tool, None) for tool in tools or ()]
        options = self._options(None, {"tools": offered} if offered else {})
        with typed():
            return self.pack.count_tokens(pack_messages(messages), **options)

    def _ending(
        self, last: packllm.Chunk | packllm.Generation, kwargs: Mapping[str, Any]
    ) -> tuple[UsageMetadata, dict[str, Any]]:
        """Facts about a complete answer: token counts, and what callbacks and messages carry."""
        assert last.usage is not None
        usage = UsageMetadata(
            input_tokens=last.usage.prompt_tokens,
            output_tokens=last.usage.completion_tokens,
            total_tokens=last.usage.total_tokens,
            output_token_details={"reasoning": last.usage.reasoning_tokens},
        )
        return usage, {
            "packllm": told_weights(last),
            "finish_reason": last.finish_reason,
            "model_name": kwargs.get("model", self.model_name),
            "usage": last.usage.as_dict(),
            "timings": last.timings,
            **told_logprobs(last),
        }


def _chunk(part: str | packllm.ReasoningPart | packllm.CallPart) -> ChatGenerationChunk:
    if isinstance(part, str):
        message = AIMessageChunk(content=part)
    elif isinstance(part, packllm.ReasoningPart):
        message = AIMessageChunk(content="", additional_kwargs={"reasoning_content": part.text})
    else:
        message = AIMessageChunk(content="", tool_call_chunks=[call_chunk(part)])
    return ChatGenerationChunk(message=message)


def _choice(tool_choice: Mapping[str, Any]) -> str:
    """OpenAI's or Anthropic's dict of a tool choice as a tool's name, or "any", "auto" or "none"."""
    function = tool_choice.get("function", tool_choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    choice = name if name is not None else tool_choice.get("type")
    if not isinstance(choice, str):
        raise packllm.OptionError(f"tool_choice={tool_choice!r} names no tool; give its name, 'auto', 'any' or 'none'")
    return choice
