"""Options of a request, frozen, each described beside itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator

from packllm.chat.tools import check_tools
from packllm.errors import OptionError, guess, shown


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not a boolean")
    return value


def _template_kwargs(value: Any) -> Any:
    if isinstance(value, str):  # as a shell gives it
        value = json.loads(value)
    if isinstance(value, Mapping):
        taken = next((name for name in TEMPLATE_OWN if name in value), None)
        if taken:
            raise ValueError(f"{taken!r} is what the pack itself gives to templates; leave it out")
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"expected JSON: {error}") from None
        value = dict(value)
    return value


def _biases(value: Any) -> Any:
    """As OpenAI's clients give it: ids may be strings, for JSON has no other keys."""
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if isinstance(key, bool) or not isinstance(key, int | str) or key == "" or (isinstance(key, int) and key < 0):
            raise ValueError(f"{shown(key)} is neither a token's id nor its text")
    ids = {int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k: v for k, v in value.items()}
    return ids or None


TEMPLATE_OWN = ("messages", "tools", "add_generation_prompt")
"""Variables of chat templates that are not a caller's."""


def _prior(value: Any, checked: Callable[[Any], Any]) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):  # as a shell gives it
        value = json.loads(value)
    found = checked(value)
    return value if hasattr(value, "fingerprints") else found  # a calibrated one knows whose it is


Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_no_bool)]
Scoring = Literal["log", "mixture", "perplexity"]


class OptionFields(BaseModel):
    """What a caller may set per pack (as defaults) and per request. The adapters inherit these fields."""

    max_tokens: Count | None = Field(None, ge=1)
    """Most tokens to generate. None: 256, or what the context window leaves if that is less."""
    temperature: Number = Field(0.0, ge=0.0)
    """0 is greedy; above 0 the fused distribution is sharpened (<1) or flattened (>1), then sampled."""
    top_p: Number = Field(1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: Count | None = Field(None, ge=1)
    """Sample from the k most likely tokens only."""
    min_p: Number = Field(0.0, ge=0.0, le=1.0)
    """Sample from tokens only that are at least this times as likely as the likeliest; 0: from all."""
    repetition_penalty: Number = Field(1.0, gt=0.0, le=10.0)
    """What the log-probabilities of tokens are multiplied by that the prompt or the answer holds: above 1 they are
    taken less often, below 1 more often. (arXiv 1909.05858 has logits, which members do not have in common.)"""
    presence_penalty: Number = Field(0.0, ge=-2.0, le=2.0)
    """Nats taken off tokens that the answer holds."""
    frequency_penalty: Number = Field(0.0, ge=-2.0, le=2.0)
    """Nats taken off tokens for each time that the answer holds them. While any of the three penalties or logit_bias is
    in force nothing is drafted. They need tokens that all members share: not decoding="cool" or "lazy"."""
    logit_bias: Annotated[
        dict[int | str, Annotated[Number, Field(ge=-100.0, le=100.0)]] | None, BeforeValidator(_biases)
    ] = None
    """Nats added to tokens: {id or text of one token: bias}. Ids are the first member's, as Pack.tokenize gives them; a
    text of digits alone is an id. 100 all but forces a token, -100 all but rules it out."""
    seed: Count | None = Field(None, ge=0, lt=2**64)
    """Seed of the sampler; the same seed and prompt give the same text, alone or in a batch. (So nothing is drafted,
    unless draft_tokens asks for it.)"""
    generation_config: bool = False
    """Whether options that nobody sets are what the models' own generation_config asks for (sampling, repetition
    penalty, suppressed tokens): each is taken from the first member that asks for it."""
    n: Count | None = Field(None, ge=1, le=128)
    """How many answers to give to a prompt, which is read once; of a request alone, not of a pack. Answer i (from 0) is
    the one that seed + i gives. generate() then returns a list, generate_batch() a list of lists."""
    logprobs: bool | None = None
    """Whether chunks and answers tell what each token was given by the pack and by each member (see TokenLogprob).
    None: where top_logprobs asks for it. With decoding="lazy" all members then read all tokens."""
    top_logprobs: Count | None = Field(None, ge=0, le=20)
    """How many of the likeliest tokens to tell at each place."""
    explain: bool | None = None
    """Whether weigh() and answers have an `explanation` (see Explanation): what members gave each message and marked
    passage, and who carried each token. None: where `passages` marks some. As with logprobs, lazy decoding then lets
    all members read all tokens."""
    passages: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts in the user's part of the prompt that an explanation tells of one by one: the passages that were retrieved,
    word for word. One that is not there is a PromptError."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end the text; never part of it."""
    weighting: str | dict[str, Number] = "em"
    """Name of a weighting (packllm.weights.WEIGHTINGS) or fixed weights {member name: weight}."""
    pool: Literal["linear", "log"] | None = None
    """How members fuse: mixture (linear) or product (log). None: the pool the weighting is meant for."""
    min_weight: Number = Field(0.01, ge=0.0, lt=1.0)
    """Members below this weight are not run; the others are renormalised."""
    race: Count = Field(0, ge=0)
    """Weighting `em`: prompts are read in chunks of so many tokens, and members that the text so far rules out to reach
    min_weight stop reading. 0: all read all."""
    tau: Number = Field(0.1, gt=0.0)
    """Temperature of the weightings `sim` and `cbtm`."""
    alpha: Number = Field(1.0, ge=0.0)
    """Dirichlet prior of `em`, in observed tokens; strength of the expert in `dexperts`."""
    prior: Annotated[Annotated[str, Field(min_length=1)] | dict[str, Number] | None, WrapValidator(_prior)] = None
    """What members are worth before `em` has seen a prompt: a file of `packllm calibrate`, or {member name: weight},
    none negative, that sum to 1; who is not named has 0. None: all the same, `alpha` tokens strong."""
    prior_strength: Literal["prompt"] | Annotated[Number, Field(ge=0.0)] = "prompt"
    """How many observed tokens `prior` counts for. prompt: as many as the prompt has, so that both count alike."""
    beta: Number = Field(1.0, ge=0.0)
    """Strength of the uniform prior in `map`."""
    fitted: str | None = Field(None, min_length=1)
    """File of what the weightings `cbtm` and `router` learnt (packllm.weights.cbtm.fit, router.fit)."""
    unit: Literal["token", "byte"] | None = None
    """What perplexity is counted per. None: token for one vocabulary, byte (`em`: word) for several."""
    decoding: str = "auto"
    """How members decode together (packllm.decode.DECODINGS). tokens: token by token, in one vocabulary; lazy: so too,
    each token drawn from one member that is drawn by weight (linear pool, temperature 1); cool: segment by segment, in
    any vocabularies (Cool-Fusion); cool+rerank: the best of that and of each member's own answer; mined: token by token
    in the top member's vocabulary, the others' mapped to it; auto: tokens where the vocabularies are the same, else
    cool."""
    draft_tokens: Count | None = Field(None, ge=1)
    """Token by token: how many tokens the top member is ahead of the others, which read them in one pass. None: as
    many as pay; 1: all members take every step together. The answers are the same, or distributed the same."""
    adapt: bool | None = None
    """Weights go on learning while the answer is written (linear pool; `cool`: with scoring="mixture"). None: they do
    where the weighting finds a mixture on the prompt, as `em` does."""
    sleep: Number = Field(0.0, ge=0.0, lt=1.0)
    """Token by token, where weights adapt: members below this weight at the start of 8 tokens do not run in them, and
    read them afterwards. 0: all run."""
    weight_path: bool = False
    """Tell how the weights moved: those at the start of every 16 tokens, in Weights.path."""
    scoring: Scoring = "log"
    """How `cool` rates segments. log, mixture: likelihood per byte under the weights, in the log or the linear pool;
    perplexity: average perplexity per token, every member counting alike (the paper's)."""
    align: bool = True
    """`cool`: segments end at word boundaries of all tokenizers (False: of their author's alone)."""
    chat_template: bool | None = None
    """Whether a prompt given as text goes into each member's chat template, as one user message, to be answered. None:
    it does where all members have a template; False: the text is continued as it is. (`score` and `rerank` take None as
    False.)"""
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_template_kwargs)] = None
    """More variables of the chat templates, such as {"enable_thinking": False} or documents; JSON-safe."""
    score_on: str | None = Field(None, min_length=1)
    """Part of the prompt to score (say, the question); None: all of the user's text."""
    timeout: Number | None = Field(None, gt=0.0)
    """Seconds that an answer may take, from reading its prompt on; AnswerTimeout if it is not whole by then. Looked at
    after each pass, so a pass under way is finished. None: as long as it takes."""
    on_member_error: Literal["raise", "drop"] = "raise"
    """A failing member ends the request (raise), or the others go on without it (drop)."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tools to offer, in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""
    tool_choice: str | None = None
    """auto (None): a call or text; any: one call; a tool's name: one call of it; none: text, tools are not shown.
    any and a name need the extra `structured`."""
    json_schema: dict[str, Any] | None = None
    """The answer is JSON of this schema, or, with tools and tool_choice auto, a call. Needs the extra `structured`.
    It is whole and valid for every max_tokens: shortly before the limit only tokens are taken that leave room for the
    rest, and where one had to give way, the answer ends by "length". Where not even the shortest answer fits, an
    OptionError says how many tokens that takes, before any is decoded. Strings in `stop` do not cut such an answer.
    Formats are exact (a date exists); unknown ones are notes. What no grammar can say (uniqueItems, not, if, contains,
    bounds beyond 64 bits ...) is checked once the answer is whole: it is held back until then, streams give it in one
    piece; one that violates its schema is drawn anew, once and at random, and then StructureError is raised."""
    batch_size: Count = Field(8, ge=1)
    """Most prompts that generate_batch decodes together."""
    max_cache_mb: Count | None = Field(None, ge=1)
    """Most MiB that the keys and values of all requests in flight may grow to, a property of the pack: who would exceed
    it waits for its turn, first come first served; who needs more than that runs alone. None: no bound."""
    prefix_cache_mb: Count = Field(1024, ge=0)
    """Most MiB of keys and values of recent prompts that the pack keeps, so that the next prompt over the same
    context or conversation reads only what is new; a property of the pack. 0, also of a request: keep and use none."""
    cache_salt: str | None = Field(None, min_length=1)
    """Whose request it is: what is kept of recent prompts is used for those of the same salt alone, so that neither the
    time of an answer nor cached_tokens tells one user what another asked. None is a salt of its own."""


class Options(OptionFields):
    """The options of one request, checked and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def offered_tools(self) -> tuple[dict[str, Any], ...]:
        """The tools that the members are told of."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def tells_logprobs(self) -> bool:
        """Whether log-probabilities of tokens are asked for."""
        return self.top_logprobs is not None if self.logprobs is None else self.logprobs

    @property
    def explains(self) -> bool:
        """Whether an explanation is asked for."""
        return bool(self.passages) if self.explain is None else self.explain

    @property
    def records(self) -> bool:
        """Whether log-probabilities of tokens are kept, to be told or explained."""
        return self.tells_logprobs or self.explains

    @property
    def penalises(self) -> bool:
        """Whether the tokens of an answer change what may come next, or a bias does."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)

    def seed_of(self, row: int) -> int | None:
        """The seed of one of the n answers to each of several prompts."""
        return None if self.seed is None else (self.seed + row % (self.n or 1)) % 2**64

    def override(self, changes: Mapping[str, Any]) -> Options:
        """These options with `changes`, validated; OptionError names what is wrong and what is valid."""
        return make_options({**self.model_dump(exclude_unset=True), **changes}) if changes else self


def make_options(values: Mapping[str, Any], beside: Sequence[str] = ()) -> Options:
    """Options from keyword arguments.

    Args:
        beside: other names that are valid where these were given, to guess what a misspelt one means.

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
    first = [one for one in errors if one["loc"][0] == name][-1]  # of several types, the last tells most
    message = first["msg"].removeprefix("Value error, ")
    described = f"{name}={shown(first['input'])}: {message[:1].lower()}{message[1:]}"
    if name == "stop":
        return f"{described}; stop takes non-empty strings, an empty one would end every text at once"
    if name == "weighting":
        return f"{described}; weighting takes a name or numbers {{member name: weight}}"
    return described
