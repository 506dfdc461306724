"""A conversation as one member's chat template writes it, with nothing of it lost in silence.

The template is given the messages as transformers gives them. What it refuses, or leaves out without a word (a system
message, tools, calls), is put to it another way: the ways go from what the template was written for to words alone
(see convention.py), and the first that shows everything is taken.
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
"""How messages are put to a member without a chat template: one line a message, "User: ..."."""

TOOL_NAMES = ("xml_tools", "json_tools", "custom_tools", "available_tools", "functions", "python_tools")
"""Other names under which templates take tools."""

_COMMAND = re.compile(r"/(no_?)?think\b")  # what some templates obey, and leave out

SHOWN = 200  # most characters of anything that an error quotes

Tools = Sequence[Mapping[str, Any]]


def cut(text: Any) -> str:
    """What an error may quote of a text."""
    text = str.__str__(text) if isinstance(text, str) else str(text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


class Renderer:
    """What a tokenizer's chat templates make of messages.

    Attributes:
        template: the template's source, all of them where there are several by name; None without any.

    Raises:
        LoadError: a template that cannot be compiled.
    """

    def __init__(self, tokenizer: Any) -> None:
        named = getattr(tokenizer, "chat_template", None) or None
        named = named if isinstance(named, Mapping) or named is None else {"default": named}
        self.template: str | None = None if named is None else named.get("default") or "".join(named.values())
        try:
            tokens = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
            self._named = {
                name: Template(source, tokens) for name, source in (named or {"default": PLAIN_TEMPLATE}).items()
            }
        except Exception as error:  # jinja's own errors, and whatever odd sources raise
            raise LoadError(f"the chat template cannot be read: {cut(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools = (),
        schema: Mapping[str, Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Traced:
        """The text of checked messages, with the mark that an answer follows. The content of message i is source i.

        Raises:
            PromptError: the template refuses the messages in any form, or leaves a part out, or does not end.
        """
        given = _Given.of(messages, tools, variables or {})
        refusal: PromptError | None = None
        lost: str | None = None
        for shape, shown_as, said in self._ways(given, schema):
            try:
                text = self._apply(given, shape(convention.with_system(given.messages, said)), shown_as)
            except PromptError as error:
                refusal = refusal or error
                if isinstance(error.__cause__, TooMuchWork):
                    raise
                continue
            lost = given.lost(text, said, bool(shown_as))
            if lost is None:
                return text
        raise refusal or PromptError(f"the chat template leaves out {lost}, whatever way it is put")

    def after_answer(self) -> str:
        """What the template writes after an assistant's answer, in a first exchange; "" where it cannot be told.

        Raises:
            LoadError: the template does not end.
        """
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        given = _Given.of(turn, (), {})
        try:
            text = self._apply(given, given.messages, {}, answer_follows=False)
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
        self, given: _Given, schema: Mapping[str, Any] | None
    ) -> Iterator[tuple[Callable[[Sequence[Message]], Sequence[Message]], dict[str, Any], str]]:
        """How the messages are arranged, under which names tools are given, what the system message says more."""
        form = "" if schema is None else convention.schema_text(schema)
        documents = given.variables.get("documents")
        known = self._choose(bool(given.tools)).variables
        if documents and "documents" not in known:
            form = "\n\n".join(filter(None, (convention.documents_text(documents), form)))
        words = "\n\n".join(filter(None, (convention.tools_text(given.tools) if given.tools else "", form)))
        native: list[dict[str, Any]] = [{}]
        if given.tools:
            native = [{"tools": given.tools}]
            native += [{"tools": given.tools, name: given.tools} for name in TOOL_NAMES if name in known]
        shapes: list[Callable[[Sequence[Message]], Sequence[Message]]] = [list]
        if given.calls:
            shapes.append(convention.written_arguments)
        if any(message["role"] == "developer" for message in given.messages):
            shapes.append(convention.system_for_developer)
        shapes.append(convention.folded)
        for shape in shapes:
            for names in native:
                yield shape, names, form
        if given.tools:
            if given.calls:
                for names in native:
                    yield convention.written_calls, names, form
            for shape in shapes:
                yield shape, {}, words
        yield convention.written_out, {}, words
        yield convention.alternating, {}, words

    def _choose(self, tools: bool) -> Template:
        """As transformers chooses among templates with names."""
        name = "tool_use" if tools and "tool_use" in self._named else "default"
        return self._named.get(name) or next(iter(self._named.values()))

    def _apply(
        self, given: _Given, messages: Sequence[Message], tools: Mapping[str, Any], answer_follows: bool = True
    ) -> Traced:
        messages = [_with_thinking({k: v for k, v in message.items() if v is not None}) for message in messages]
        values = {"tools": None, "documents": None, **given.variables, **tools}
        values |= {"messages": messages, "add_generation_prompt": answer_follows}
        try:
            return self._choose(bool(tools)).render(given.size, values)
        except Exception as error:  # jinja raises what the template's author chose
            roles = ", ".join(str(message["role"]) for message in messages)
            problem = f"the chat template refuses messages with roles [{cut(roles)}]: {cut(error)}"
            # A cause that quotes the prompt would carry all of it into logs.
            raise PromptError(problem) from (error if len(str(error)) <= SHOWN else None)


@dataclass
class _Given:
    """What a template is given, its strings numbered by what they belong to.

    Attributes:
        messages, tools, variables: copies, of plain types, with traced strings.
        calls: sources of the calls of each message that makes some. A template that shows the first alone is let.
        offered: sources of the tools.
        named: names of tools and of what is called, by source.
        size: characters in all of it.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    variables: dict[str, Any]
    calls: list[list[int]] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    named: dict[int, str] = field(default_factory=dict)
    size: int = 0

    @classmethod
    def of(cls, messages: Sequence[Message], tools: Tools, variables: Mapping[str, Any]) -> _Given:
        given = cls([], [], {})
        given.variables = {name: given._plain(value) for name, value in variables.items()}
        source = len(messages)
        for i, message in enumerate(messages):
            kept = given._plain({k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")})
            fields: dict[str, Any] = {}
            for key, value in message.items():  # in the caller's order: templates may show it
                if key == "role":
                    fields[key] = own(value) if value in (*ROLES, "developer") else str(value)
                elif key == "content" and isinstance(value, str):
                    fields[key] = content(value, i)
                    given.size += len(value)
                elif key == "tool_calls" and value and message["role"] == "assistant":
                    given.calls.append(list(range(source, source + len(value))))
                    given.named |= {source + j: call["function"]["name"] for j, call in enumerate(value)}
                    fields[key] = [given._plain(call, source + j) for j, call in enumerate(value)]
                    source += len(value)
                else:
                    fields[key] = kept.get(key, value)
            given.messages.append(fields)
        for tool in tools:
            given.offered.append(source)
            given.named[source] = tool.get("function", tool).get("name", "")
            given.tools.append(given._plain(tool, source))
            source += 1
        return given

    def _plain(self, value: Any, source: int = UNKNOWN) -> Any:
        """The value in JSON's types, as transformers hands it to a template; its strings are of this source."""
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

    def lost(self, text: Traced, said: str, tools: bool) -> str | None:
        """What a text does not show, in words; None if nothing: of the messages, of what the system message says
        more, and of the tools.

        Words beside calls and in an assistant's earlier reasoning are left out by design in many templates.
        """
        if said not in text:
            return "what it is told of tools and of the answer's form"
        seen = {source for _, source, _ in runs_of(text)}
        missing = [
            (f"message {i} ({message['role']})", [words, json.dumps(words, ensure_ascii=False)[1:-1]])
            for i, message in enumerate(self.messages)
            if i not in seen and (words := _words(message))
        ]
        for sources in [*self.calls, *([source] for source in self.offered if tools)]:
            if not seen.intersection(sources):
                name = self.named[sources[0]]
                missing.append((f"the tool {cut(name)!r}", [json.dumps(name, ensure_ascii=False), repr(name)]))
        if not missing:
            return None
        rest = _unplaced(text).replace(said or "\0", "")
        return next((what for what, spellings in missing if not any(words in rest for words in spellings)), None)


def _words(message: Message) -> str:
    """What of a message must be shown."""
    words = _COMMAND.sub("", str.__str__(message.get("content") or "")).strip()
    by_design = message["role"] == "assistant" and (message.get("tool_calls") or "</think>" in words)
    return "" if by_design else words


def _unplaced(text: Traced) -> str:
    """The parts of a text of which nothing is known."""
    at, parts = 0, []
    for length, source, _ in runs_of(text):
        if source == UNKNOWN:
            parts.append(str.__getitem__(text, slice(at, at + length)))
        at += length
    return "\n".join(parts)


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each of the names by which templates ask for it."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
