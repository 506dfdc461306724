"""Request bodies: OpenAI's fields, some of vLLM's, and `packllm`; and the pack's options that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from packllm.errors import OptionError, guess, shown
from packllm.options import Options

PACK = "pack"
"""Name of the model that consists of all members."""

SERVERS_OWN = frozenset({"fitted", "max_cache_mb", "prefix_cache_mb", "batch_size"})
"""Options of the server that requests cannot set: they name files of the server, or concern the whole pack."""

SAID_ELSEWHERE = frozenset(
    {"n", "tools", "tool_choice", "json_schema", "logprobs", "top_logprobs", "logprob_token_ids", "timeout"}
)
"""Options for which OpenAI has its own fields."""

REFUSED = {
    "audio": "the members generate text only",
    "functions": "use tools instead",
    "function_call": "use tool_choice instead",
    "web_search_options": "web search is not available",
    "suffix": "the members only continue texts",
    "use_beam_search": "use sampling, with n for several answers",
    "prompt_logprobs": "use /v1/completions",
    "echo": "use /v1/completions",
    "continue_final_message": "continuing a message is not supported; put its beginning into the question",
    "grammar": "use response_format with a JSON schema",
    "guided_json": "use response_format with a JSON schema",
    "guided_regex": "use response_format with a JSON schema",
    "guided_choice": "use response_format with a JSON schema that has an enum, or /v1/decisions",
    "guided_grammar": "use response_format with a JSON schema",
    "structured_outputs": "use response_format with a JSON schema",
    "allowed_token_ids": "use logit_bias",
    "bad_words": "use logit_bias",
    "stop_token_ids": "use stop, with the text of these tokens",
    "include_stop_str_in_output": "stop strings are never part of the text",
    "min_tokens": "answers end where the members end them",
    "ignore_eos": "answers end where the members end them; logit_bias can delay it",
    "truncate_prompt_tokens": "prompts are never truncated",
    "thinking_token_budget": "use max_tokens",
    "chat_template": "each member has its own template; use chat_template_kwargs",
    "documents": "put them into a message",
    "prompt_embeds": "each member has its own embeddings; send text or token ids",
    "n_predict": "use max_tokens",
    "repeat_penalty": "use repetition_penalty",
    "mirostat": "use temperature, top_p or min_p",
    "lora_adapter": "each member is a model of its own: use its name as model",
}
"""Unsupported fields that would change the answer. They are refused rather than ignored; each value says what to do
instead."""

Seconds = Annotated[float, Field(gt=0)]


class Body(BaseModel):
    """Fields of all requests. Fields that do not affect the answer (user, metadata, store, ...) are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str = PACK
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    timeout: Seconds | None = None
    packllm: dict[str, Any] = {}
    """Further options of the pack: weighting, pool, tau, ..."""

    def options(self) -> dict[str, Any]:
        """The pack's options that these fields stand for.

        Raises:
            OptionError: a field is not supported, or may not be set by requests.
        """
        for name in self.model_extra or ():
            if name in REFUSED and self.model_extra and self.model_extra[name] not in (None, False, [], {}):
                raise OptionError(f"{name}={shown(self.model_extra[name])} is not supported: {REFUSED[name]}")
        for name in self.packllm:
            if name not in Options.model_fields:
                valid = sorted(Options.model_fields.keys() - SERVERS_OWN - SAID_ELSEWHERE)
                raise OptionError(
                    f"packllm={{{shown(name)}: ...}} is not an option{guess(name, valid)} "
                    f"Valid options: {', '.join(valid)}"
                )
            if name in SERVERS_OWN or (name == "prior" and isinstance(self.packllm[name], str)):
                raise OptionError(f"packllm={{{name!r}: ...}} can only be set when the server is started")
            if name in SAID_ELSEWHERE:
                raise OptionError(f"packllm={{{name!r}: ...}} must be given as a field of the request")
        salt = {} if self.cache_salt is None else {"cache_salt": self.cache_salt}
        return {**self.packllm, **salt}


class StreamOptions(BaseModel):
    include_usage: bool = False


class Sampled(Body):
    """Fields of all requests that generate text."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    best_of: int | None = None
    response_format: dict[str, Any] | None = None
    logprob_token_ids: Annotated[list[StrictInt], Field(min_length=1)] | None = None

    def options(self) -> dict[str, Any]:
        options = super().options()
        if self.best_of not in (None, 1):
            raise OptionError(f"best_of={self.best_of} is not supported; use n, and choose among the answers")
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


class Chat(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None

    def options(self) -> dict[str, Any]:
        options = super().options()
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        if self.tools:
            options["tools"] = self.tools
        choice = self._choice()
        if choice is not None and (self.tools or choice not in ("auto", "none")):
            options["tool_choice"] = choice
        if self.top_logprobs is not None and not self.logprobs:
            raise OptionError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        if self.logprobs:
            options |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        variables = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        if variables | (self.chat_template_kwargs or {}):
            options["chat_template_kwargs"] = variables | (self.chat_template_kwargs or {})
        return options

    def _choice(self) -> str | None:
        """OpenAI's tool_choice in the pack's terms: auto, none, any, or a tool's name."""
        if not isinstance(self.tool_choice, dict):
            return "any" if self.tool_choice == "required" else self.tool_choice
        function = self.tool_choice.get("function", self.tool_choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise OptionError(
                f"tool_choice={shown(self.tool_choice)} names no tool; use auto, none, required or "
                f'{{"type": "function", "function": {{"name": ...}}}}'
            )
        return name


class Completion(Sampled):
    """POST /v1/completions."""

    prompt: str | Annotated[list[StrictInt] | list[str] | list[list[StrictInt]], Field(min_length=1)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    return_tokens_as_token_ids: bool = False

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
        if self.stream and self.prompt_logprobs is not None:
            raise OptionError(f"prompt_logprobs={self.prompt_logprobs} cannot be streamed; remove stream")
        if self.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": self.logprobs}
        return options

    def spelled(self, token: str, token_id: int | None) -> str:
        """A token's name in the answer: its text, or its id if the request asks for ids."""
        return f"token_id:{token_id}" if self.return_tokens_as_token_ids and token_id is not None else token


class Score(Body):
    """POST /v1/score: log-likelihood of each text_2 after a text_1, in nats."""

    text_1: str | Annotated[list[str], Field(min_length=1)]
    text_2: str | Annotated[list[str], Field(min_length=1)]

    @staticmethod
    def texts(value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value


class Document(BaseModel):
    text: str


class Rerank(Body):
    """POST /v1/rerank."""

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
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


class Responses(Body):
    """POST /v1/responses."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    stream: bool = False

    def options(self) -> dict[str, Any]:
        for name in ("previous_response_id", "conversation", "background", "prompt"):
            if self.model_extra and self.model_extra.get(name):
                raise OptionError(
                    f"{name}={shown(self.model_extra[name])} is not supported: the server stores no responses"
                )
        wants_logprobs = "message.output_text.logprobs" in (self.include or ()) or bool(self.top_logprobs)
        chat = Chat(
            model=self.model,
            messages=[{}],
            cache_salt=self.cache_salt,
            packllm=self.packllm,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=wants_logprobs or None,
            top_logprobs=self.top_logprobs if wants_logprobs else None,
            tools=None if self.tools is None else [_nested(tool) for tool in self.tools],
            tool_choice=self.tool_choice,
            response_format=(self.text or {}).get("format"),
            reasoning_effort=(self.reasoning or {}).get("effort"),
        )
        return {**super().options(), **chat.options()}


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """Convert a tool of /v1/responses to the format of chats.

    Raises:
        OptionError: it is not a function.
    """
    if tool.get("type") != "function":
        raise OptionError(f"tools: {shown(tool)} is not a function; the server has no built-in tools")
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
