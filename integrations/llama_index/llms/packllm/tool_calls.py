"""LlamaIndex's function-calling interface, for chat methods that take the pack's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.agent.react import ReActChatFormatter, ReActOutputParser
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from packllm import OptionError, PackError


class NoToolCallError(PackError, ValueError):
    """The model had to call a tool, but its answer has no call, or none that can be parsed."""


class ToolCalling(FunctionCallingLLM):
    """Turns the tools of a request into options of the pack, and calls in an answer into LlamaIndex's selections."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the chat methods."""
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        arguments: dict[str, Any] = {"messages": messages, **kwargs}
        if tools:
            arguments |= {"tools": [_described(tool) for tool in tools]}
            arguments |= {"allow_parallel_tool_calls": allow_parallel_tool_calls}
        choice = _choice(tool_choice, tool_required)
        return arguments if choice is None else arguments | {"tool_choice": choice}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls in an answer.

        Raises:
            NoToolCallError: there is none, and error_on_no_tool_call is True.
        """
        message = response.message
        calls = [
            ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=block.tool_kwargs)
            for block in message.blocks
            if isinstance(block, ToolCallBlock) and isinstance(block.tool_kwargs, dict)
        ]
        if not calls and error_on_no_tool_call:
            malformed = message.additional_kwargs.get("invalid_tool_calls") or ()
            reasons = "".join(f"; call of {call['name']!r} cannot be read: {call['error']}" for call in malformed)
            raise NoToolCallError(
                f"the model called no tool{reasons}. It said {message.content or ''!r}; "
                f"tool_required=True makes it call one"
            )
        return calls

    def predict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> Any:
        return super().predict_and_call(tools, *args, **self._with_react(kwargs))

    async def apredict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> Any:
        return await super().apredict_and_call(tools, *args, **self._with_react(kwargs))

    def _with_react(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """For models without a chat template LlamaIndex makes a ReAct agent, and needs a formatter for it."""
        if self.metadata.is_function_calling_model:
            return kwargs
        return {"react_chat_formatter": ReActChatFormatter(), "output_parser": ReActOutputParser(), **kwargs}


def _described(tool: BaseTool) -> dict[str, Any]:
    description = tool.metadata.to_openai_tool(skip_length_check=True)
    # LlamaIndex replaces characters that OpenAI refuses, but then does not find the tool by the new name.
    description["function"]["name"] = tool.metadata.get_name()
    return description


def _choice(choice: str | Mapping[str, Any] | None, required: bool) -> str | None:
    """tool_choice in the pack's format; OpenAI's {"type": "function", "function": {"name": ...}} names a tool."""
    function = choice.get("function", choice) if isinstance(choice, Mapping) else {}
    name = choice
    if isinstance(choice, Mapping):
        name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str | None) or (name is None and choice is not None):
        raise OptionError(f"tool_choice={choice!r} names no tool; give a tool's name, 'auto', 'any' or 'none'")
    if required and name in ("auto", "none"):
        raise OptionError(f"tool_required=True contradicts tool_choice={name!r}; leave one of them out")
    return "any" if required and name is None else name
