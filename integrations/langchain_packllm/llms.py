"""PackLLM: a packllm.Pack as a LangChain LLM. Translate, iterate Pack.stream, translate back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM, LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

import packllm
from langchain_packllm.base import OPTIONS, PackModel, joint_usage, told_logprobs, told_weights
from langchain_packllm.errors import typed

_FRAMEWORK_WORDS = (
    "tags",
    "metadata",
    "run_name",
    "run_id",
)  # keywords of BaseLLM.generate that are no options of the pack


class PackLLM(PackModel, BaseLLM):
    """Several local language models answering as one LangChain LLM.

    ``PackLLM(models=["org/general", "org/medicine"], max_tokens=64)`` loads a pack;
    ``PackLLM(pack=pack, temperature=0.7)`` shares one. An option comes from the call, otherwise from this object,
    otherwise from the pack. Each answer has the members' weights in ``generation_info["packllm"]``.

    `batch` decodes its prompts together. So with `return_exceptions=True` one failure is every prompt's failure.
    `max_concurrency` cuts a batch into slices that run one after the other.
    """

    @property
    def _llm_type(self) -> str:
        return "packllm"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(list(self.stop) if stop is None else stop, **kwargs)
        params["ls_provider"] = "packllm"
        return params

    def _at_call(
        self, stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[PackLLM, list[str] | None, dict[str, Any]]:
        """This model with the options of one call as its own, its stop strings, and LangChain's keywords.

        LangChain's cache key has the model's parameters and the `stop` of the call, but no other keyword of the call
        (langchain #40403), and `stop=None` hides the model's own. Keys must differ if answers may.
        """
        keywords = {name: kwargs.pop(name) for name in _FRAMEWORK_WORDS if name in kwargs}
        with typed():
            options_ = self.pack.options.override(self._options(stop, kwargs))
        llm = self.model_copy(update={name: getattr(options_, name) for name in OPTIONS})
        return llm, list(llm.stop) or None, keywords

    def generate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """BaseLLM.generate with all options of the call in the cache key."""
        llm, stop, keywords = self._at_call(stop, kwargs)
        return super(PackLLM, llm).generate(prompts, stop, callbacks, **keywords)

    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """BaseLLM.agenerate with all options of the call in the cache key."""
        llm, stop, keywords = self._at_call(stop, kwargs)
        return await super(PackLLM, llm).agenerate(prompts, stop, callbacks, **keywords)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        options = self._options(stop, kwargs)
        with typed():
            n = self.pack.check(**options).n or 1
        answers: list[list[GenerationChunk]] = [[] for _ in range(len(prompts) * n)]
        with typed(), closing(self.pack.stream_batch(prompts, **options)) as pieces:
            for index, piece in pieces:
                answers[index].append(chunk := self._chunk(piece))
                if (
                    run_manager and len(answers) == 1
                ):  # for a batch LangChain passes only the first prompt's run manager
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        return self._result(answers, len(prompts))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        options = self._options(stop, kwargs)
        with typed():
            n = self.pack.check(**options).n or 1
            answers: list[list[GenerationChunk]] = [[] for _ in range(len(prompts) * n)]
            async with aclosing(self.pack.astream_batch(prompts, **options)) as pieces:
                async for index, piece in pieces:
                    answers[index].append(chunk := self._chunk(piece))
                    if run_manager and len(answers) == 1:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        return self._result(answers, len(prompts))

    def _result(self, answers: list[list[GenerationChunk]], prompts: int) -> LLMResult:
        joined = [sum(chunks[1:], chunks[0]) for chunks in answers]
        n = len(joined) // prompts if prompts else 1
        generations = [
            [Generation(text=one.text, generation_info=one.generation_info) for one in joined[at : at + n]]
            for at in range(0, len(joined), n)
        ]
        usage = joint_usage([[(one.generation_info or {})["usage"] for one in each] for each in generations])
        llm_output = {"token_usage": usage, "model_name": self.model_name}
        return LLMResult(generations=generations, llm_output=llm_output)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with typed(), closing(self.pack.stream(prompt, **self._options(stop, kwargs))) as pieces:
            for piece in pieces:  # closing stops the work
                chunk = self._chunk(piece)
                if run_manager:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        with typed():
            async with aclosing(self.pack.astream(prompt, **self._options(stop, kwargs))) as pieces:
                async for piece in pieces:
                    chunk = self._chunk(piece)
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def _chunk(self, piece: packllm.Chunk) -> GenerationChunk:
        logprobs = told_logprobs(piece)
        if piece.usage is None:  # not in every chunk: adding chunks joins strings and refuses floats
            return GenerationChunk(text=piece.text, generation_info=logprobs or None)
        info = {
            "packllm": told_weights(piece),
            "finish_reason": piece.finish_reason,
            "model_name": self.model_name,
            "usage": piece.usage.as_dict(),
            "timings": piece.timings,
            **logprobs,
        }
        return GenerationChunk(text=piece.text, generation_info=info)
