"""The options of a request: frozen, each with its description."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    WrapValidator,
)
from pydantic_core import core_schema

from packllm.chat.tools import check_tools
from packllm.errors import OptionError, guess, shown


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not a boolean")
    return value


def _template_kwargs(value: Any) -> Any:
    if isinstance(value, str):  # from the command line
        value = json.loads(value)
    if isinstance(value, Mapping):
        reserved = next((name for name in TEMPLATE_OWN if name in value), None)
        if reserved:
            raise ValueError(f"{reserved!r} is set by the pack itself; leave it out")
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"expected JSON: {error}") from None
        value = dict(value)
    return value


def _biases(value: Any) -> Any:
    """Accept OpenAI's format, in which ids are strings, because JSON has no other keys."""
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if isinstance(key, bool) or not isinstance(key, int | str) or key == "" or (isinstance(key, int) and key < 0):
            raise ValueError(f"{shown(key)} is neither a token's id nor its text")
    ids = {int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k: v for k, v in value.items()}
    return ids or None


TEMPLATE_OWN = ("messages", "tools", "add_generation_prompt")
"""Variables of chat templates that callers cannot set."""


def _prior(value: Any, checked: Callable[[Any], Any]) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):  # from the command line
        value = json.loads(value)
    validated = checked(value)
    return value if hasattr(value, "fingerprints") else validated  # a calibrated prior keeps its members' fingerprints


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "tuple", "dict"):
            schema["fail_fast"] = True
        schema = list(schema.values())
    for part in schema if isinstance(schema, list) else ():
        _fail_fast(part)


class FirstErrors(BaseModel):
    """A model that reports only the first wrong item of a list or mapping. To report a million of them would keep
    Python busy for minutes."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_no_bool)]
Scoring = Literal["log", "mixture", "perplexity"]


class OptionFields(BaseModel):
    """The options that a caller may set per pack (as defaults) and per request. The adapters inherit these fields."""

    max_tokens: Count | None = Field(None, ge=1)
    """Maximum number of tokens to generate. None: 256, or the rest of the context window if that is less."""
    temperature: Number = Field(0.0, ge=0.0)
    """0 is greedy; above 0 the fused distribution is sharpened (<1) or flattened (>1), then sampled."""
    top_p: Number = Field(1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens whose total probability reaches this."""
    top_k: Count | None = Field(None, ge=1)
    """Sample only from the k most likely tokens."""
    min_p: Number = Field(0.0, ge=0.0, le=1.0)
    """Sample only from tokens at least min_p times as likely as the most likely one; 0: from all."""
    repetition_penalty: Number = Field(1.0, gt=0.0, le=10.0)
    """Factor on the log-probabilities of tokens that the prompt or the answer contains: above 1 they become less
    likely, below 1 more likely. (arXiv 1909.05858 uses logits, which members do not have in common.)"""
    presence_penalty: Number = Field(0.0, ge=-2.0, le=2.0)
    """Nats subtracted from tokens that the answer contains."""
    frequency_penalty: Number = Field(0.0, ge=-2.0, le=2.0)
    """Nats subtracted from tokens for each time that the answer contains them. With a penalty or logit_bias there are
    no draft tokens. Penalties need tokens that all members share: not decoding="cool" or "lazy"."""
    logit_bias: Annotated[
        dict[int | str, Annotated[Number, Field(ge=-100.0, le=100.0)]] | None, BeforeValidator(_biases)
    ] = None
    """Nats added to tokens: {id or text of one token: bias}. Ids are the first member's, as Pack.tokenize returns them;
    a text of digits only is an id. 100 practically forces a token, -100 practically excludes it."""
    seed: Count | None = Field(None, ge=0, lt=2**64)
    """Seed of the sampler; the same seed and prompt give the same text, alone or in a batch. (To guarantee this there
    are no draft tokens, unless draft_tokens asks for them.)"""
    generation_config: bool = False
    """Use the models' own generation_config (sampling, repetition penalty, suppressed tokens) for options that are not
    set; each value comes from the first member that has one."""
    n: Count | None = Field(None, ge=1, le=128)
    """Number of answers to a prompt, which is read once; for requests only, not for packs. Answer i (from 0) is the one
    of seed + i. generate() then returns a list, and generate_batch() a list of lists."""
    logprobs: bool | None = None
    """Whether chunks and answers have each token's log-probabilities, the pack's and each member's (see TokenLogprob).
    None: only if top_logprobs or logprob_token_ids is set. With decoding="lazy" all members then read all tokens."""
    top_logprobs: Count | None = Field(None, ge=0, le=20)
    """Number of most likely tokens to report at each position."""
    logprob_token_ids: tuple[Annotated[Count, Field(ge=0)], ...] = Field((), max_length=128)
    """Tokens to report at each position instead of the most likely ones: ids of the first member, as Pack.tokenize
    returns them."""
    explain: bool | None = None
    """Whether weigh() and answers have an `explanation` (see Explanation): each member's perplexity and share of every
    message and marked passage, and its share of every token of the answer. None: only if `passages` is set. With
    decoding="lazy" all members then read all tokens."""
    passages: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts in the user's part of the prompt that an explanation lists separately: retrieved passages, word for word.
    A text that does not occur raises PromptError."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end the text; they are never part of it."""
    weighting: str | dict[str, Number] = "em"
    """Name of a weighting (packllm.weights.WEIGHTINGS) or fixed weights {member name: weight}."""
    pool: Literal["linear", "log"] | None = None
    """How members are fused: mixture (linear) or product (log). None: the pool that the weighting is for."""
    min_weight: Number = Field(0.01, ge=0.0, lt=1.0)
    """Members with a smaller weight do not run; the other weights are renormalised."""
    race: Count = Field(0, ge=0)
    """Only weighting `em`: read prompts in chunks, the first of so many tokens; members that cannot reach min_weight
    stop reading. 0: all members read everything."""
    tau: Number = Field(0.1, gt=0.0)
    """Temperature of the weightings `sim` and `cbtm`."""
    alpha: Number = Field(1.0, ge=0.0)
    """Dirichlet prior of `em`, in observed tokens; strength of the expert in `dexperts`."""
    prior: Annotated[Annotated[str, Field(min_length=1)] | dict[str, Number] | None, WrapValidator(_prior)] = None
    """Prior weights of `em`: a file of `packllm calibrate`, or {member name: weight}, none negative, that sum to 1; a
    member that is missing has 0. None: uniform, with the strength of `alpha` tokens."""
    prior_strength: Literal["prompt"] | Annotated[Number, Field(ge=0.0)] = "prompt"
    """Strength of `prior` in observed tokens. prompt: the number of tokens in the prompt, so that both count alike."""
    beta: Number = Field(1.0, ge=0.0)
    """Strength of the uniform prior in `map`."""
    fitted: str | None = Field(None, min_length=1)
    """File of the weightings `cbtm` and `router`, written by packllm.weights.cbtm.fit or router.fit."""
    unit: Literal["token", "byte"] | None = None
    """The unit of perplexities. None: token for one vocabulary, byte (`em`: word) for several."""
    decoding: str = "auto"
    """How members decode together (packllm.decode.DECODINGS). tokens: token by token, in one vocabulary; lazy: the
    same, but each token comes from one member, drawn by weight (linear pool, temperature 1); cool: segment by segment,
    with any vocabularies (Cool-Fusion); cool+rerank: the best of cool's answer and each member's own answer; mined:
    token by token in the top member's vocabulary, with the others' mapped to it; auto: tokens if the vocabularies are
    the same, otherwise cool."""
    draft_tokens: Count | None = Field(None, ge=1)
    """Token by token: how many tokens the top member drafts before the others read them in one pass. None: as many as
    save time; 1: no drafts. Answers are the same; sampled ones have the same distribution."""
    adapt: bool | None = None
    """Whether weights adapt to the answer while it is written (linear pool; `cool`: with scoring="mixture"). None: if
    the weighting computes a mixture from the prompt, as `em` does."""
    sleep: Number = Field(0.0, ge=0.0, lt=1.0)
    """Token by token, with adaptive weights: members below this weight at the start of a block of 8 tokens do not run
    in it, and read the block afterwards. 0: all run."""
    weight_path: bool = False
    """Record the weights at the start of every 16 tokens, in Weights.path."""
    scoring: Scoring = "log"
    """How `cool` rates segments. log, mixture: likelihood per byte under the weights, in the log or the linear pool;
    perplexity: average perplexity per token, with equal weights (as in the paper)."""
    align: bool = True
    """`cool`: end segments at word boundaries of all tokenizers (False: of their author's tokenizer only)."""
    chat_template: bool | None = None
    """Whether a text prompt becomes a user message in each member's chat template, to be answered. None: if all members
    have a template; False: the text is continued as it is. (`score` and `rerank` treat None as False.)"""
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_template_kwargs)] = None
    """More variables of the chat templates, such as {"enable_thinking": False} or documents; JSON-safe."""
    score_on: str | None = Field(None, min_length=1)
    """Part of the prompt to score (say, the question); None: all of the user's text."""
    timeout: Number | None = Field(None, gt=0.0)
    """Seconds that an answer may take, from the start of its prefill; otherwise AnswerTimeout. It is checked after each
    pass, so a running pass is finished. None: no limit."""
    on_member_error: Literal["raise", "drop"] = "raise"
    """When a member fails, end the request (raise) or continue without it (drop)."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools to offer, in OpenAI's format: {"type": "function", "function": {"name", "description", "parameters"}}."""
    tool_choice: str | None = None
    """auto (None): a call or text; any: one call; a tool's name: one call of it; none: text, and tools are not shown.
    any and a name need the extra `structured`."""
    json_schema: dict[str, Any] | None = None
    """The answer is JSON of this schema, or, with tools and tool_choice auto, a call. Needs the extra `structured`.
    It is complete and valid for every max_tokens: near the limit only tokens that leave room for a completion are
    allowed, and if that excluded a token, the finish reason is "length". If even the shortest answer does not fit, an
    OptionError says how many tokens it needs, before decoding starts. `stop` has no effect on such an answer.
    Formats are exact (a date exists); unknown formats are ignored. Keywords that no grammar can express (uniqueItems,
    not, if, contains, bounds beyond 64 bits ...) are checked when the answer is complete, so streams give it in one
    piece. An answer that violates them is drawn again, once and at random; then StructureError is raised."""
    batch_size: Count = Field(8, ge=1)
    """How many prompts generate_batch decodes together, at most."""
    max_cache_mb: Count | None = Field(None, ge=1)
    """Upper bound of the KV caches of all requests in flight, in MiB; an option of packs. A request that would exceed
    it waits, first come first served; one that needs more than that runs alone. None: no bound."""
    prefix_cache_mb: Count = Field(1024, ge=0)
    """Size of the cache of recent prompts' KV caches, in MiB, so that the next prompt with the same context or
    conversation reads only what is new; an option of packs. 0, also in a request: do not store and do not reuse."""
    cache_salt: str | None = Field(None, min_length=1)
    """Separates users: cached prompts are reused only by requests with the same salt, so that neither response times
    nor cached_tokens reveal another user's prompts. None is a salt too."""


class Options(OptionFields, FirstErrors):
    """The options of one request, checked and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def offered_tools(self) -> tuple[dict[str, Any], ...]:
        """The tools that the members see."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def tells_logprobs(self) -> bool:
        """Whether log-probabilities of tokens are requested."""
        requested = self.top_logprobs is not None or bool(self.logprob_token_ids)
        return requested if self.logprobs is None else self.logprobs

    @property
    def explains(self) -> bool:
        """Whether an explanation is requested."""
        return bool(self.passages) if self.explain is None else self.explain

    @property
    def records(self) -> bool:
        """Whether log-probabilities of tokens are recorded, to report or to explain them."""
        return self.tells_logprobs or self.explains

    @property
    def penalises(self) -> bool:
        """Whether penalties or biases change the fused distribution."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)

    def seed_of(self, row: int) -> int | None:
        """The seed of row `row`, where each of several prompts has n rows."""
        return None if self.seed is None else (self.seed + row % (self.n or 1)) % 2**64

    def override(self, changes: Mapping[str, Any]) -> Options:
        """These options with `changes`, validated; OptionError names the invalid one and the valid values."""
        return make_options({**self.model_dump(exclude_unset=True), **changes}) if changes else self


def make_options(values: Mapping[str, Any], beside: Sequence[str] = ()) -> Options:
    """Options from keyword arguments.

    Args:
        values: options by name.
        beside: other names that the caller accepts, for the guess at a misspelt name.

    Raises:
        OptionError: an unknown name (with the valid names) or a value out of range (with the range).
    """
    unknown = [name for name in values if name not in Options.model_fields]
    if unknown:
        valid = [*Options.model_fields, *beside]
        raise OptionError(f"unknown option {unknown[0]!r}{guess(unknown[0], valid)} Valid options: {', '.join(valid)}")
    values = dict(values)
    stop, choice = values.get("stop"), values.get("tool_choice")
    if isinstance(stop, str):
        values["stop"] = (stop,)
    elif stop is None:
        values.pop("stop", None)
    if values.get("tools", ()) is None:
        values.pop("tools")
    if isinstance(choice, str) and choice == "required":  # OpenAI's word
        values["tool_choice"] = "any"
    try:
        options = Options(**values)
    except ValidationError as error:
        raise OptionError(_describe(error)) from None
    except (RecursionError, TypeError, ValueError) as error:  # values whose own methods fail
        raise OptionError(f"options cannot be read: {error}") from error
    check_tools(options.tools, options.tool_choice, options.json_schema)
    return options


def _describe(error: ValidationError) -> str:
    errors = error.errors()
    name = str(errors[0]["loc"][0])
    first = [one for one in errors if one["loc"][0] == name][-1]  # of several types, the last one's message says most
    message = first["msg"].removeprefix("Value error, ")
    fault = f"{name}={shown(first['input'])}: {message[:1].lower()}{message[1:]}"
    if name == "stop":
        return f"{fault}; stop takes non-empty strings, an empty one would end every text at once"
    if name == "passages":
        return f"{fault}; passages takes a list of texts, none empty"
    if name == "weighting":
        return f"{fault}; weighting takes a name or numbers {{member name: weight}}"
    return fault
