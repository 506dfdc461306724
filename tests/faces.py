"""The adapters behind one set of verbs, so that one test asks the same of each: `ask`, `stream`, `aask`, `astream`,
`batch` and, for those that chat, `converse`. Each verb does what a user of that framework would type."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any

import langchain_core.messages as lc
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock

import langchain_packllm
import llama_index.llms.packllm as llama_index_packllm
from packllm import Pack

Message = dict[str, Any]  # as Pack has it: role, content; tool_calls, tool_call_id


class Face:
    """One adapter over a pack.

    Attributes:
        chat: whether the prompt travels as a user's message.
        llm: the adapter.
    """

    name: str
    chat = False

    def __init__(self, pack: Pack, **options: Any) -> None:
        self.pack, self.llm = pack, self.make(pack=pack, **options)

    def prompt(self, text: str) -> str | list[Message]:
        """What Pack is to be asked for the same answer."""
        return [{"role": "user", "content": text}] if self.chat else text

    def batch(self, texts: Sequence[str], **options: Any) -> list[str]:
        return [self.ask(text, **options) for text in texts]


class LangChain(Face):
    name = "langchain"
    make = langchain_packllm.PackLLM

    @staticmethod
    def _text(answer: Any) -> str:
        return answer if isinstance(answer, str) else answer.text

    def ask(self, text: str, **options: Any) -> str:
        return self._text(self.llm.invoke(text, **options))

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        with closing(self.llm.stream(text, **options)) as pieces:
            for piece in pieces:
                yield self._text(piece)

    async def aask(self, text: str, **options: Any) -> str:
        return self._text(await self.llm.ainvoke(text, **options))

    async def astream(self, text: str, **options: Any) -> AsyncIterator[str]:
        async with aclosing(self.llm.astream(text, **options)) as pieces:
            async for piece in pieces:
                yield self._text(piece)

    def batch(self, texts: Sequence[str], **options: Any) -> list[str]:
        return [self._text(answer) for answer in self.llm.batch(list(texts), **options)]


class LangChainChat(LangChain):
    name = "langchain-chat"
    chat = True

    make = langchain_packllm.ChatPackLLM

    def converse(self, messages: Sequence[Message], tools: Sequence[dict] = (), **options: Any) -> str:
        llm = self.llm.bind_tools(list(tools)) if tools else self.llm
        return self._text(llm.invoke([self._message(message) for message in messages], **options))

    @staticmethod
    def _message(message: Message) -> lc.BaseMessage:
        content = message["content"]
        if message["role"] == "tool":
            return lc.ToolMessage(content, tool_call_id=message["tool_call_id"])
        if message["role"] == "assistant":
            calls = [
                {"id": call["id"], "name": call["function"]["name"], "args": call["function"]["arguments"]}
                for call in message.get("tool_calls", ())
            ]
            return lc.AIMessage(content, tool_calls=calls)
        return {"user": lc.HumanMessage, "system": lc.SystemMessage}[message["role"]](content)


class LlamaIndex(Face):
    name = "llama-index"
    make = llama_index_packllm.PackLLM

    def ask(self, text: str, **options: Any) -> str:
        return self.llm.complete(text, **options).text

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        with closing(self.llm.stream_complete(text, **options)) as steps:
            for step in steps:
                yield step.delta

    async def aask(self, text: str, **options: Any) -> str:
        return (await self.llm.acomplete(text, **options)).text

    async def astream(self, text: str, **options: Any) -> AsyncIterator[str]:
        async with aclosing(await self.llm.astream_complete(text, **options)) as steps:
            async for step in steps:
                yield step.delta


class LlamaIndexChat(Face):
    name = "llama-index-chat"
    chat = True
    make = llama_index_packllm.PackLLM

    def ask(self, text: str, **options: Any) -> str:
        return self.llm.chat([ChatMessage(text)], **options).message.content or ""

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        with closing(self.llm.stream_chat([ChatMessage(text)], **options)) as steps:
            for step in steps:
                yield step.delta

    async def aask(self, text: str, **options: Any) -> str:
        return (await self.llm.achat([ChatMessage(text)], **options)).message.content or ""

    async def astream(self, text: str, **options: Any) -> AsyncIterator[str]:
        async with aclosing(await self.llm.astream_chat([ChatMessage(text)], **options)) as steps:
            async for step in steps:
                yield step.delta

    def converse(self, messages: Sequence[Message], tools: Sequence[dict] = (), **options: Any) -> str:
        options = {**options, "tools": list(tools)} if tools else options
        answer = self.llm.chat([self._message(message) for message in messages], **options)
        return answer.message.content or ""

    @staticmethod
    def _message(message: Message) -> ChatMessage:
        content = message["content"]
        if not isinstance(content, str):
            content = [TextBlock(text=part["text"]) for part in content]
        if message["role"] == "tool":
            return ChatMessage(content, role="tool", additional_kwargs={"tool_call_id": message["tool_call_id"]})
        answer = ChatMessage(content, role=message["role"])
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            answer.blocks.append(ToolCallBlock(tool_call_id=call["id"], tool_name=name, tool_kwargs=arguments))
        return answer


FACES: list[type[Face]] = [LangChain, LangChainChat, LlamaIndex, LlamaIndexChat]
CHATTING = [face for face in FACES if face.chat]


def call(name: str, arguments: dict[str, Any], id: str = "call_1") -> dict[str, Any]:
    """A tool call as messages carry it."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
