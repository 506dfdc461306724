"""Request bodies: OpenAI's fields, some of vLLM's, and the pack's options that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, StrictInt, model_validator

from packllm.errors import OptionError, shown
from packllm.options import Count, Number
from packllm.serve.body import Body, plain
from packllm.serve.unsupported import check_supported


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False

    _plain = model_validator(mode="before")(plain)


class Sampled(Body):
    """Fields of all requests that generate text."""

    NAMES: ClassVar = {"json_schema": "response_format"}

    max_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Count | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    seed: Count | None = None
    stop: str | list[str] | None = None
    n: Annotated[Count, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    best_of: Count | None = None
    response_format: dict[str, Any] | None = None
    logprob_token_ids: Annotated[list[StrictInt], Field(min_length=1)] | None = None
    prompt_logprobs: Annotated[Count, Field(ge=0)] | None = None
    return_tokens_as_token_ids: bool = False

    def options(self) -> dict[str, Any]:
        options = super().options()
        if self.best_of not in (None, 1):
            raise OptionError(f"best_of={self.best_of} is not supported; use n, and choose among the answers")
        if self.stream_options is not None and not self.stream:
            raise OptionError("stream_options={...} needs stream=true; a whole answer always has its usage")
        if self.stream_options is not None and self.stream_options.continuous_usage_stats:
            raise OptionError("stream_options={'continuous_usage_stats': true} is not supported; use include_usage")
        if self.stream and self.prompt_logprobs is not None:
            raise OptionError(f"prompt_logprobs={self.prompt_logprobs} cannot be streamed; remove stream")
        passed = "max_tokens temperature top_p min_p presence_penalty frequency_penalty repetition_penalty stop"
        for name in passed.split():
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if self.top_k is not None and self.top_k > 0:  # 0 and -1 mean all tokens in vLLM and llama-server
            options["top_k"] = self.top_k
        if self.logit_bias:
            options["logit_bias"] = self.logit_bias
        if self.logprob_token_ids is not None:
            if getattr(self, "logprobs", None) is None or getattr(self, "logprobs", None) is False:
                raise OptionError("logprob_token_ids need logprobs")
            options["logprob_token_ids"] = self.logprob_token_ids
        if (schema := schema_of(self.response_format)) is not None:
            options["json_schema"] = schema
        if self.seed is not None:
            options["seed"] = self.seed % 2**64  # OpenAI's seeds are signed
        return options

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def spelled(self, token: str, token_id: int | None) -> str:
        """A token's name in the answer: its text, or its id if the request asks for ids."""
        return f"token_id:{token_id}" if self.return_tokens_as_token_ids and token_id is not None else token


class Chat(Sampled):
    """POST /v1/chat/completions."""

    MORE: ClassVar = {"add_special_tokens": ("each member's template adds its own; use /v1/completions", ())}

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    modalities: list[Literal["text"]] | None = None

    def named(self, option: str) -> str | None:
        if option == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return super().named(option)

    def options(self) -> dict[str, Any]:
        options = super().options()
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        tools, choice = self._offered()
        if tools:
            options["tools"] = tools
        if choice is not None and (tools or choice not in ("auto", "none")):
            options["tool_choice"] = choice
            if choice not in ("auto", "none"):  # a demanded call has no text of its own to format, as with OpenAI
                options.pop("json_schema", None)
        if self.top_logprobs and not self.logprobs:
            raise OptionError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        if self.logprobs:
            options |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        variables = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        if variables | (self.chat_template_kwargs or {}):
            options["chat_template_kwargs"] = variables | (self.chat_template_kwargs or {})
        return options

    def _offered(self) -> tuple[list[dict[str, Any]] | None, str | None]:
        """The tools that may be called, and OpenAI's tool_choice in the pack's terms: auto, none, any, or a name."""
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return self.tools, "any" if choice == "required" else choice
        if choice.get("type") == "allowed_tools":
            return self._allowed(choice.get("allowed_tools", choice))
        name = _name_in(choice)
        if name is None:
            raise OptionError(
                f"tool_choice={shown(choice)} names no function; use auto, none, required or "
                f'{{"type": "function", "function": {{"name": ...}}}}'
            )
        return self.tools, name

    def _allowed(self, allowed: Any) -> tuple[list[dict[str, Any]], str]:
        mode, listed = (allowed.get("mode"), allowed.get("tools")) if isinstance(allowed, Mapping) else (None, None)
        names = {_name_in(one) for one in listed} if isinstance(listed, list) else set()
        tools = [tool for tool in self.tools or () if _name_in(tool) in names]
        if mode not in ("auto", "required") or not names or len(tools) < len(names):
            raise OptionError(
                f"tool_choice={shown(self.tool_choice)} must have the mode auto or required, and list some of the tools"
            )
        return tools, "any" if mode == "required" else "auto"


def _name_in(function: Any) -> str | None:
    """The name of a function in a tool or a tool_choice, with OpenAI's nesting or without; None if it has none."""
    if not isinstance(function, Mapping) or function.get("type", "function") != "function":
        return None
    inner = function.get("function", function)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


class Completion(Sampled):
    """POST /v1/completions."""

    NAMES: ClassVar = {**Sampled.NAMES, "messages": "prompt"}
    MORE: ClassVar = {"add_special_tokens": ("send token ids", (True,))}

    prompt: str | Annotated[list[StrictInt] | list[str] | list[list[StrictInt]], Field(min_length=1)]
    echo: bool = False
    logprobs: Annotated[Count, Field(ge=0)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return [*self.prompt]
        return [self.prompt]

    def options(self) -> dict[str, Any]:
        options = super().options()
        if self.max_tokens == 0:
            if not self.echo and self.prompt_logprobs is None:
                raise OptionError("max_tokens=0 needs echo or prompt_logprobs; otherwise the answer would be empty")
            del options["max_tokens"]
        if self.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": self.logprobs}
        return options


class Score(Body):
    """POST /v1/score: log-likelihood of each text_2 after a text_1, in nats."""

    NAMES: ClassVar = {"messages": "text_1", "continuations": "text_2"}

    text_1: str | Annotated[list[str], Field(min_length=1)]
    text_2: str | Annotated[list[str], Field(min_length=1)]

    @staticmethod
    def texts(value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value


class Document(BaseModel):
    text: str


class Rerank(Body):
    """POST /v1/rerank."""

    NAMES: ClassVar = {"messages": "query", "continuations": "documents"}

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1)]
    top_n: Annotated[Count, Field(ge=0)] = 0
    """Number of documents to return; 0: all."""
    return_documents: bool = True

    @property
    def documents_as_texts(self) -> list[str]:
        return [one if isinstance(one, str) else one.text for one in self.documents]


class Decide(Body):
    """POST /v1/decisions: the label with which the pack would answer."""

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    choices: list[str]
    calibrated: bool = False


class Tokenize(Body):
    """POST /tokenize: the ids of a text, or of messages in the first member's chat template."""

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenize(Body):
    """POST /detokenize."""

    tokens: list[StrictInt]


class Responses(Sampled):
    """POST /v1/responses."""

    NAMES: ClassVar = {
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "json_schema": "text",
        "response_format": "text",
        "reasoning_effort": "reasoning",
        "logprobs": "include",
    }
    MORE: ClassVar = {
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), ("use max_output_tokens", ())),
        **dict.fromkeys(("previous_response_id", "conversation", "background"), ("the server stores no responses", ())),
        "prompt": ("the server stores no prompts; use instructions and input", ()),
        "messages": ("use input", ()),
        "response_format": ("use text, with a format", ()),
        "logprobs": ("use include, with message.output_text.logprobs", ()),
        "prompt_logprobs": ("use /v1/chat/completions", ()),
        "return_tokens_as_token_ids": ("log-probabilities have the ids beside the tokens", ()),
        "n": ("a response is one answer; use /v1/chat/completions", (1,)),
    }

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def options(self) -> dict[str, Any]:
        check_supported(self.model_dump(include=set(self.MORE)), self.MORE)
        wants_logprobs = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        shared = self.model_dump(include=Sampled.model_fields.keys() & self.model_fields_set, exclude=set(self.MORE))
        chat = Chat(
            **shared,
            messages=[{}],
            max_completion_tokens=self.max_output_tokens,
            logprobs=wants_logprobs or None,
            top_logprobs=self.top_logprobs if wants_logprobs else None,
            tools=None if self.tools is None else [nested(tool) for tool in self.tools],
            tool_choice=self.tool_choice,
            response_format=(self.text or {}).get("format"),
            reasoning_effort=(self.reasoning or {}).get("effort"),
            chat_template_kwargs=self.chat_template_kwargs,
        )
        return {**super().options(), **chat.options()}


def nested(tool: dict[str, Any]) -> dict[str, Any]:
    """Convert a tool of /v1/responses to the format of chats.

    Raises:
        OptionError: it is not a function.
    """
    if tool.get("type") != "function":
        raise OptionError(f"tools={shown(tool)} is not a function; the server has no built-in tools")
    if "function" in tool:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def schema_of(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema of a response_format; None if it allows any text."""
    kind = "text" if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = response_format.get("json_schema", response_format)  # /v1/responses has no inner json_schema
    schema = inner.get("schema") if kind == "json_schema" and isinstance(inner, Mapping) else None
    if not isinstance(schema, dict):
        raise OptionError(
            f"response_format={shown(response_format)}: use text, json_object, or "
            f'{{"type": "json_schema", "json_schema": {{"name": ..., "schema": ...}}}}'
        )
    return schema
