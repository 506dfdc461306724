"""ChatPackLLM: a packllm.Pack as a LangChain chat model. Translate, iterate Pack.stream, translate back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import closing
from operator import itemgetter
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.output_parsers import (
    BaseOutputParser,
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

import packllm
from langchain_packllm.base import PackModel
from langchain_packllm.cancel import Cancelled
from langchain_packllm.messages import call_chunk, pack_messages, tool_calls

METHODS = ("json_schema", "function_calling", "json_mode")
_FOR_TRACES = ("ls_structured_output_format", "structured_output_format", "stream")  # no options of an answer


class ChatPackLLM(PackModel, BaseChatModel):
    """Several local language models answering as one LangChain chat model.

    ``ChatPackLLM(models=["org/general", "org/medicine"], max_tokens=64)`` loads a pack;
    ``ChatPackLLM(pack=pack, temperature=0.7)`` shares one. An option comes from the call, else from this object,
    else from the pack; ``model="medicine"`` at the call lets one member answer alone. Each answer says in
    ``response_metadata["packllm"]`` what every member counted for.

    Tools reach each member through its own chat template, or in words where that has no place for them. With
    ``tool_choice`` "any" or a name, and with structured output, the form of the answer is guaranteed: that needs
    ``packllm[structured]``.
    """

    streaming: bool = False
    """Whether `invoke` streams too, so that its callbacks see the tokens."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if self.profile is None:  # LangChain asked before the pack was there
            self.profile = self._resolve_model_profile()

    @property
    def _llm_type(self) -> str:
        return "packllm-chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # In the cache key, LangChain puts the stop strings of the call in the place of the model's own.
        return {**super()._identifying_params, "default_stop": list(self.stop)}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache key. LangChain's, for what can be dumped, is the dump: the same for all packs of Member objects,
        and for a folder whatever lies in it. The parameters name the members' contents."""
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
            strict: in the tools' description; a call that is demanded fits its schema in any case.
            response_format: a schema that answers in text must have (OpenAI's dict, or what
                with_structured_output takes).
            kwargs: options of the calls.
        """
        if tools:
            kwargs["tools"] = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        if isinstance(tool_choice, bool):
            tool_choice = "any" if tool_choice else "none"
        if isinstance(tool_choice, dict):
            tool_choice = tool_choice.get("function", tool_choice).get("name")
        if tool_choice is not None and (tools or tool_choice not in ("auto", "none")):
            kwargs["tool_choice"] = tool_choice
        if response_format is not None:
            kwargs["json_schema"] = _schema_of(response_format)
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
        """This model with answers of a schema; they always parse.

        Args:
            schema: pydantic class, TypedDict, JSON schema or OpenAI function.
            method: "json_schema": the answer is JSON of the schema; "function_calling": it is a call of a tool with
                such arguments; "json_mode": as json_schema.
            include_raw: give {"raw": message, "parsed": ..., "parsing_error": ...}.
            strict: in the tool's description, for function_calling; the form is guaranteed in any case.
            kwargs: options of the calls.
        """
        if method not in METHODS:
            raise packllm.OptionError(f"method={method!r} is none of {', '.join(METHODS)}")
        as_class: Any = schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None
        traced = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema}}
        parser: Any
        if method == "function_calling":
            tool = convert_to_openai_tool(schema)
            name = tool["function"]["name"]
            llm = self.bind_tools([schema], tool_choice=name, strict=strict, **traced, **kwargs)
            parser = (
                PydanticToolsParser(tools=[as_class], first_tool_only=True)
                if as_class
                else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
            )
        else:
            llm = self.bind(json_schema=_schema_of(schema), **traced, **kwargs)
            parser = PydanticOutputParser(pydantic_object=as_class) if as_class else JsonOutputParser()
        return _with_raw(llm, parser) if include_raw else llm | parser

    def _request(self, stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[Any]]:
        """The options of a call, and the tools whose calls are to be read out of the answer."""
        options = self._options(stop, {name: value for name, value in kwargs.items() if name not in _FOR_TRACES})
        model = options.pop("model", self.model_name)
        if model != self.model_name:
            options["weighting"] = {model: 1.0}
        return options, self.pack.check(**options).offered_tools

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        cancelled: Cancelled | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options, tools = self._request(stop, kwargs)
        text = ""
        with closing(self.pack.stream(pack_messages(messages), **options)) as pieces:
            for piece in cancelled.watch(pieces) if cancelled else pieces:
                text += piece.text
        answer = packllm.parse_tool_calls(text, tools)
        calls, refused = tool_calls(answer)
        usage, info = self._ending(piece, kwargs)
        message = AIMessage(
            answer.content,
            tool_calls=calls,
            invalid_tool_calls=refused,
            usage_metadata=usage,
            response_metadata={"model_provider": "packllm"},
        )
        llm_output = {"token_usage": info["usage"], "model_name": info["model_name"]}
        return ChatResult(generations=[ChatGeneration(message=message, generation_info=info)], llm_output=llm_output)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        """BaseChatModel's way (`_generate` in a thread), and the thread stops when the task is cancelled."""
        cancelled = Cancelled()
        try:
            return await super()._agenerate(messages, stop, run_manager, cancelled=cancelled, **kwargs)
        finally:
            cancelled.set()

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        cancelled: Cancelled | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options, tools = self._request(stop, kwargs)
        parts = packllm.ToolStream(tools)
        with closing(self.pack.stream(pack_messages(messages), **options)) as pieces:  # closing stops the work
            for piece in cancelled.watch(pieces) if cancelled else pieces:
                for part in parts.feed(piece.text):
                    yield _chunk(part)
        for part in parts.finish():
            yield _chunk(part)
        usage, info = self._ending(piece, kwargs)
        metadata = {"model_provider": "packllm"}
        last = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata, chunk_position="last")
        yield ChatGenerationChunk(message=last, generation_info=info)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        """BaseChatModel's way (`_stream` in a thread), and the thread stops when the task is cancelled."""
        cancelled = Cancelled()
        try:
            async for chunk in super()._astream(messages, stop, run_manager, cancelled=cancelled, **kwargs):
                yield chunk
        finally:
            cancelled.set()

    def _ending(self, last: packllm.Chunk, kwargs: Mapping[str, Any]) -> tuple[UsageMetadata, dict[str, Any]]:
        """What the last chunk tells of the whole answer: token counts, and what callbacks and messages carry."""
        assert last.usage is not None
        usage = UsageMetadata(
            input_tokens=last.usage.prompt_tokens,
            output_tokens=last.usage.completion_tokens,
            total_tokens=last.usage.total_tokens,
        )
        return usage, {
            "packllm": last.weights.as_dict(),
            "finish_reason": last.finish_reason,
            "model_name": kwargs.get("model", self.model_name),
            "usage": last.usage.as_dict(),
            "timings": last.timings,
        }


def _chunk(part: str | packllm.CallPart) -> ChatGenerationChunk:
    if isinstance(part, str):
        return ChatGenerationChunk(message=AIMessageChunk(content=part))
    return ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[call_chunk(part)]))


def _schema_of(given: Any) -> dict[str, Any]:
    """The JSON schema of a class, an OpenAI function, or OpenAI's response_format."""
    if isinstance(given, Mapping) and given.get("type") == "json_schema":
        return dict(given["json_schema"]["schema"])
    if isinstance(given, Mapping) and given.get("type") == "json_object":
        return {"type": "object"}
    return convert_to_json_schema(given)


def _with_raw(llm: Runnable[LanguageModelInput, AIMessage], parser: BaseOutputParser) -> Runnable:
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | parsed.with_fallbacks([failed], exception_key="parsing_error")
