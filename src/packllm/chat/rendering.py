"""Renders a conversation with a member's chat template, and makes sure that no part of it is lost.

The template first gets the messages as transformers would give them. Some templates refuse parts or silently leave them
out (a system message, tools, calls). Then other forms of the messages are tried in turn, the last one plain text (see
convention.py); the first form that shows everything is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packllm.chat import convention
from packllm.chat.messages import ROLES, Message
from packllm.chat.template import Template, TooMuchWork
from packllm.chat.traced import UNKNOWN, Traced, content, own, runs_of
from packllm.errors import LoadError, PromptError

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The template of a member without one: one line a message, "User: ..."."""

TOOL_NAMES = ("xml_tools", "json_tools", "custom_tools", "available_tools", "functions", "python_tools")
"""Other variables in which templates expect tools."""

_COMMAND = re.compile(r"/(no_?)?think\b")  # a command that some templates follow and do not show

SHOWN = 200  # maximum length of a quotation in an error message

Tools = Sequence[Mapping[str, Any]]


def cut(text: Any) -> str:
    """A text shortened for quotation in an error message."""
    text = str.__str__(text) if isinstance(text, str) else str(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


class Renderer:
    """Renders messages with a tokenizer's chat templates.

    Attributes:
        template: the template's source; if there are several by name and none is "default", all of them. None if there
            is none.

    Raises:
        LoadError: a template cannot be compiled.
    """

    def __init__(self, tokenizer: Any) -> None:
        templates = getattr(tokenizer, "chat_template", None) or None
        templates = templates if isinstance(templates, Mapping) or templates is None else {"default": templates}
        self.template: str | None = (
            None if templates is None else templates.get("default") or "".join(templates.values())
        )
        try:
            tokens = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
            self._named = {
                name: Template(source, tokens) for name, source in (templates or {"default": PLAIN_TEMPLATE}).items()
            }
        except Exception as error:  # jinja's errors, and any other that a malformed template raises
            raise LoadError(f"the chat template cannot be read: {cut(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        schema: Mapping[str, Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Traced:
        """The text of checked messages, with the generation prompt at its end. The content of message i is source i.

        Raises:
            PromptError: the template refuses the messages in any form, leaves out a part, or does not terminate; or
                the arguments of a call, a tool or a variable are nested too deeply.
        """
        try:
            return self._rendered(_Inputs.of(messages, tools, variables or {}), schema)
        except RecursionError:
            raise PromptError(
                "prompt with tool calls, tools or chat_template_kwargs that are nested too deeply; make them flatter"
            ) from None

    def _rendered(self, inputs: _Inputs, schema: Mapping[str, Any] | None) -> Traced:
        refusal: PromptError | None = None
        lost: str | None = None
        for shape, tool_variables, system_text in self._ways(inputs, schema):
            try:
                text = self._apply(inputs, shape(convention.with_system(inputs.messages, system_text)), tool_variables)
            except PromptError as error:
                refusal = refusal or error
                if isinstance(error.__cause__, TooMuchWork):
                    raise
                continue
            lost = inputs.lost(text, system_text, bool(tool_variables))
            if lost is None:
                return text
        raise refusal or PromptError(f"the chat template leaves out {lost} in every form; use another chat_template")

    def after_answer(self) -> str:
        """What the template writes after an assistant's first answer; "" if unknown.

        Raises:
            LoadError: the template does not terminate.
        """
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        inputs = _Inputs.of(turn, (), {})
        try:
            text = self._apply(inputs, inputs.messages, {}, answer_follows=False)
        except PromptError as error:
            if isinstance(error.__cause__, TooMuchWork):
                raise LoadError(str(error)) from error.__cause__
            return ""
        at, after = 0, ""
        for length, source, _ in runs_of(text):
            at += length
            if source == 1:
                after = str(text[at:])
        return after.lstrip()

    def _ways(
        self, inputs: _Inputs, schema: Mapping[str, Any] | None
    ) -> Iterator[tuple[Callable[[Sequence[Message]], Sequence[Message]], dict[str, Any], str]]:
        """The forms to try: how messages are arranged, the variables with tools, more text of the system message."""
        form = "" if schema is None else convention.schema_text(schema)
        documents = inputs.variables.get("documents")
        variables_used = self._choose(bool(inputs.tools)).variables
        if documents and "documents" not in variables_used:
            form = "\n\n".join(filter(None, (convention.documents_text(documents), form)))
        system_text = "\n\n".join(filter(None, (convention.tools_text(inputs.tools) if inputs.tools else "", form)))
        native: list[dict[str, Any]] = [{}]
        if inputs.tools:
            native = [{"tools": inputs.tools}]
            native += [{"tools": inputs.tools, name: inputs.tools} for name in TOOL_NAMES if name in variables_used]
        shapes: list[Callable[[Sequence[Message]], Sequence[Message]]] = [list]
        if inputs.calls:
            shapes.append(convention.written_arguments)
        if any(message["role"] == "developer" for message in inputs.messages):
            shapes.append(convention.system_for_developer)
        shapes.append(convention.folded)
        for shape in shapes:
            for names in native:
                yield shape, names, form
        if inputs.tools:
            if inputs.calls:
                for names in native:
                    yield convention.written_calls, names, form
            for shape in shapes:
                yield shape, {}, system_text
        yield convention.written_out, {}, system_text
        yield convention.alternating, {}, system_text

    def _choose(self, tools: bool) -> Template:
        """The template that transformers would choose among those with names."""
        name = "tool_use" if tools and "tool_use" in self._named else "default"
        return self._named.get(name) or next(iter(self._named.values()))

    def _apply(
        self, inputs: _Inputs, messages: Sequence[Message], tools: Mapping[str, Any], answer_follows: bool = True
    ) -> Traced:
        messages = [_with_thinking({k: v for k, v in message.items() if v is not None}) for message in messages]
        values = {"tools": None, "documents": None, **inputs.variables, **tools}
        values |= {"messages": messages, "add_generation_prompt": answer_follows}
        try:
            return self._choose(bool(tools)).render(inputs.size, values)
        except Exception as error:  # templates raise any error that their authors chose
            roles = ", ".join(str(message["role"]) for message in messages)
            problem = f"the chat template refuses messages with roles [{cut(roles)}]: {cut(error)}"
            # A cause that quotes the prompt would put all of it into logs.
            raise PromptError(problem) from (error if len(str(error)) <= SHOWN else None)


@dataclass
class _Inputs:
    """The input of a template, with its strings numbered by their source: a message, a call or a tool.

    Attributes:
        messages, tools, variables: copies, of plain types, with traced strings.
        calls: sources of each message's calls. It suffices if a template shows one call of a message.
        offered: sources of the tools.
        named: names of tools and calls, by source.
        size: number of characters in total.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    variables: dict[str, Any]
    calls: list[list[int]] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    named: dict[int, str] = field(default_factory=dict)
    size: int = 0

    @classmethod
    def of(cls, messages: Sequence[Message], tools: Tools, variables: Mapping[str, Any]) -> _Inputs:
        self_ = cls([], [], {})
        self_.variables = {name: self_._plain(value) for name, value in variables.items()}
        source = len(messages)
        for i, message in enumerate(messages):
            other_fields = self_._plain(
                {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")}
            )
            fields: dict[str, Any] = {}
            for key, value in message.items():  # in the caller's order, which templates may show
                if key == "role":
                    fields[key] = own(value) if value in (*ROLES, "developer") else str(value)
                elif key == "content" and isinstance(value, str):
                    fields[key] = content(value, i)
                    self_.size += len(value)
                elif key == "tool_calls" and value and message["role"] == "assistant":
                    self_.calls.append(list(range(source, source + len(value))))
                    self_.named |= {source + j: call["function"]["name"] for j, call in enumerate(value)}
                    fields[key] = [self_._plain(call, source + j) for j, call in enumerate(value)]
                    source += len(value)
                else:
                    fields[key] = other_fields.get(key, value)
            self_.messages.append(fields)
        for tool in tools:
            self_.offered.append(source)
            self_.named[source] = tool.get("function", tool).get("name", "")
            self_.tools.append(self_._plain(tool, source))
            source += 1
        return self_

    def _plain(self, value: Any, source: int = UNKNOWN) -> Any:
        """The value in JSON's types, as transformers gives it to a template; its strings get this source."""
        if isinstance(value, str):
            self.size += len(value)
            return content(str.__str__(value), source) if source >= 0 else str.__str__(value)
        if value is None or isinstance(value, bool | int | float):
            self.size += 1
            return value
        if isinstance(value, Mapping):
            return {self._plain(key, source): self._plain(inner, source) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(inner, source) for inner in value]
        return f"<{type(value).__name__}>"

    def lost(self, text: Traced, system_text: str, tools: bool) -> str | None:
        """The first part of the input that a text does not show, in words; None if it shows everything: messages, added
        text of the system message, tools.

        Many templates leave out text beside calls and earlier reasoning: that is accepted.
        """
        if system_text not in text:
            return "the system message's text about tools and the form of the answer"
        shown_sources = {source for _, source, _ in runs_of(text)}
        missing = [
            (f"message {i} ({message['role']})", [spelling, json.dumps(spelling, ensure_ascii=False)[1:-1]])
            for i, message in enumerate(self.messages)
            if i not in shown_sources and (spelling := _words(message))
        ]
        for sources in [*self.calls, *([source] for source in self.offered if tools)]:
            if not shown_sources.intersection(sources):
                name = self.named[sources[0]]
                missing.append((f"the tool {cut(name)!r}", [json.dumps(name, ensure_ascii=False), repr(name)]))
        if not missing:
            return None
        unknown_text = _unplaced(text).replace(system_text or "\0", "")
        return next(
            (what for what, spellings in missing if not any(spelling in unknown_text for spelling in spellings)), None
        )


def _words(message: Message) -> str:
    """The part of a message that must be shown."""
    words = _COMMAND.sub("", str.__str__(message.get("content") or "")).strip()
    by_design = message["role"] == "assistant" and (message.get("tool_calls") or "</think>" in words)
    return "" if by_design else words


def _unplaced(text: Traced) -> str:
    """The parts of a text with unknown source."""
    at, parts = 0, []
    for length, source, _ in runs_of(text):
        if source == UNKNOWN:
            parts.append(str.__getitem__(text, slice(at, at + length)))
        at += length
    return "\n".join(parts)


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under every key by which templates look for it."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
