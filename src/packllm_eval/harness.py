"""A pack as a model of lm-evaluation-harness, so that each of its tasks runs on a pack.

    python -m packllm_eval.harness run --model packllm --model_args "models=./base;./base+./law" --tasks arc_easy

Weights come from each request's context only, as always. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from packllm.chat.prompt import Prompt
from packllm.errors import ExtraError, OptionError
from packllm.pack import Pack
from packllm_eval.methods import one_vocabulary
from packllm_eval.reading import cut_after

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError:
    raise ExtraError("the harness adapter", "lm-evaluation-harness", "lm-eval") from None

CHAT = "\ue000packllm messages\ue001"
"""Prefix of a context that contains messages as JSON: each member renders them with its own template."""

START = "\n"
"""Replaces an empty context: a pack must read something before it can predict."""

SEGMENT = 32
"""Tokens of a text's first segment in loglikelihood_rolling; each later segment is twice as long."""

_GENERATION = {"max_gen_toks": "max_tokens", "max_new_tokens": "max_tokens", "max_length": None, "until": "stop"}


@register_model("packllm")
class PackLM(LM):
    """The model `packllm`.

    Args:
        pack: the pack; None: load one with the arguments below.
        models: specs, as a list or separated by semicolons; none: the starter pack.
        device: as device_map; None: "auto".
        batch_size, max_batch_size: arguments of the harness, ignored: requests are done one by one.
        options: other arguments of Pack.load: dtype, weighting, pool, ...
    """

    def __init__(
        self,
        pack: Pack | None = None,
        models: str | Sequence[str] | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if pack is None:
            if device:
                options["device_map"] = device
            specs = models.split(";") if isinstance(models, str) else models
            pack = Pack.load(specs, **options) if specs else Pack.starter(**options)
        elif models or options:
            raise OptionError("give either pack or models with options, not both")
        self.pack = pack

    @property
    def _as_text(self) -> dict[str, Any]:
        """Options with which a text context is continued, not answered, unless the pack's options say otherwise."""
        return {"chat_template": bool(self.pack.options.chat_template)}

    @property
    def tokenizer_name(self) -> str:
        return self.pack.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name for the log: each member uses its own template."""
        return "each member's own"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as a context for the methods below."""
        if not add_generation_prompt:
            raise OptionError("the pack cannot continue an assistant message; leave out the prefill")
        return CHAT + json.dumps(chat_history)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The fused log-likelihood of each continuation in nats, and whether greedy decoding gives it."""
        by_context: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            by_context.setdefault(request.args[0], []).append(at)
        results: dict[int, tuple[float, bool]] = {}
        for context, places in tqdm(by_context.items(), desc="Contexts", disable=disable_tqdm or None):
            continuations = [requests[at].args[1] for at in places]
            prompt = _prompt(context)
            scores = self.pack.score(prompt, continuations)
            greedy = self._greedy(prompt, continuations)
            for at, score, same in zip(places, scores, greedy, strict=True):
                results[at] = (score, same)
                self.cache_hook.add_partial("loglikelihood", requests[at].args, results[at])
        return [results[at] for at in range(len(requests))]

    def _greedy(self, prompt: Prompt, continuations: Sequence[str]) -> list[bool]:
        """Which continuations greedy decoding gives; it stops when its text begins none of them."""
        encoder = self.pack.members[0].encoder
        longest = max(len(encoder.continuation(text)) for text in continuations)
        matches, text = [False] * len(continuations), ""
        tokenwise = one_vocabulary(self.pack, range(len(self.pack.members)))
        stream = self.pack.stream(prompt, max_tokens=longest, temperature=0.0, **self._as_text)
        for chunk in stream:
            text += chunk.text
            # Segments are longer than tokens, so they may go beyond a continuation.
            wrote = text.__eq__ if tokenwise else text.startswith
            matches = [same or wrote(continuation) for same, continuation in zip(matches, continuations, strict=True)]
            if not any(continuation.startswith(text) for continuation in continuations):
                break
        stream.close()
        return matches

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each whole text, segment by segment. The weights of a segment come from the
        text before it, so no token influences the weights that predict it."""
        results = []
        for request in tqdm(requests, desc="Texts", disable=disable_tqdm or None):
            results.append(self._whole(request.args[0]))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def _whole(self, text: str) -> float:
        encoder, window = self.pack.members[0].encoder, self.pack.context_window or 2**31
        total, at, size = 0.0, 0, SEGMENT
        while at < len(text):
            size = min(size, window // 4)
            end = max(at + 1, at + cut_after(encoder, text[at:], size))
            context = text[:at]
            # The rest of the window, with room for tokenizers that need more tokens than the first member's.
            tokens = encoder.encode(context).starts if context else []
            if len(tokens) > window // 2:
                context = context[tokens[-(window // 2)] :]
            total += self.pack.score(context or START, [text[at:end]])[0]
            at, size = end, 2 * size
        return total

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The pack's answers, greedy unless do_sample.

        Raises:
            OptionError: an argument that corresponds to no option of the pack.
        """
        results = []
        for request in tqdm(requests, desc="Answers", disable=disable_tqdm or None):
            context, arguments = request.args
            options = {**generation_options(arguments), **self._as_text}
            results.append(self.pack.generate(_prompt(context), **options).text)
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results


def generation_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The harness's generation arguments as options of the pack."""
    options: dict[str, Any] = {}
    sampled = bool(arguments.get("do_sample", arguments.get("temperature", 0)))
    for name, value in arguments.items():
        mapped = _GENERATION.get(name, name)
        if mapped is not None and name != "do_sample" and value is not None:
            options[mapped] = value
    stop = options.get("stop") or ()
    options["stop"] = tuple(s for s in ((stop,) if isinstance(stop, str) else stop) if s)
    if not sampled:
        options["temperature"] = 0.0
    return {"max_tokens": 256, **options}


def _prompt(context: str) -> Prompt:
    return json.loads(context.removeprefix(CHAT)) if context.startswith(CHAT) else context or START


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
