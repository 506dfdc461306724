"""Structured output: answers that satisfy their schema, because decoding allows nothing else."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, TypeVar

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.llm import LLM
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.program import LLMTextCompletionProgram
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel

from packllm import schema_of_type

Model = TypeVar("Model", bound=BaseModel)

dispatcher = get_dispatcher(__name__)


class StructuredOutput(LLM):
    """Structured prediction with the JSON schema of the output class; needs the extra `structured`.

    This is pydantic_program_mode=DEFAULT; the other modes are LlamaIndex's own. LLM needs no extra: the prompt contains
    the schema, and the answer is parsed.
    """

    def structured_predict(
        self, output_cls: type[Model], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Model:
        if not self._constrains():
            return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        _announce(output_cls, prompt, prompt_args)
        output = self._program(output_cls, prompt)(_under(output_cls, llm_kwargs), **prompt_args)
        dispatcher.event(LLMStructuredPredictEndEvent(output=output))
        return output

    async def astructured_predict(
        self, output_cls: type[Model], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Model:
        if not self._constrains():
            return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        _announce(output_cls, prompt, prompt_args)
        output = await self._program(output_cls, prompt).acall(_under(output_cls, llm_kwargs), **prompt_args)
        dispatcher.event(LLMStructuredPredictEndEvent(output=output))
        return output

    def _structured_stream_call(
        self, output_cls: type[Model], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        if not self._constrains():
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        return self._program(output_cls, prompt).stream_call(llm_kwargs=_under(output_cls, llm_kwargs), **prompt_args)

    async def _structured_astream_call(
        self, output_cls: type[Model], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        if not self._constrains():
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        program = self._program(output_cls, prompt)
        return await program.astream_call(llm_kwargs=_under(output_cls, llm_kwargs), **prompt_args)

    def _constrains(self) -> bool:
        return self.pydantic_program_mode is PydanticProgramMode.DEFAULT

    def _program(self, output_cls: type[Model], prompt: BasePromptTemplate) -> LLMTextCompletionProgram[Model]:
        parser = _Valid if self.metadata.is_chat_model else PydanticOutputParser
        # The program stores its parser in the prompt, which belongs to the caller: hence a copy.
        return LLMTextCompletionProgram(parser(output_cls), output_cls, prompt.model_copy(), self)


class _Valid(PydanticOutputParser):
    """Parser of valid JSON. The schema is not added to the user's message, because the weights are computed from it:
    the pack adds it to the system message."""

    def format(self, query: str) -> str:
        return query

    def parse(self, text: str) -> Any:
        return self.output_cls.model_validate_json(text)


def _under(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The pack's options for an answer of this class; tools are off, so that it is not a call."""
    return {"json_schema": schema_of_type(output_cls), "tools": (), "tool_choice": None, **(llm_kwargs or {})}


def _announce(output_cls: type[BaseModel], prompt: Any, prompt_args: dict[str, Any]) -> None:
    event = LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
    dispatcher.event(event)
