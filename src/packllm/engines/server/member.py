"""Members that run on an OpenAI-compatible server. Each can be an author, through chat completions; it is a judge too
if the server's log-probabilities of prompts are correct (judge.py)."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from packllm.align.vocabulary import Vocabulary
from packllm.chat import convention
from packllm.chat.formatted import Formatted
from packllm.chat.prompt import Encoder, Prompt, places, scored_text
from packllm.engines.member import Author
from packllm.engines.server.address import Address
from packllm.engines.server.answers import TextLogprobs, first_choice
from packllm.engines.server.http import Endpoint, Gate, Retries, ServerError, TransientError, no_gate
from packllm.engines.server.judge import Asked, Judge
from packllm.engines.server.steps import MOST, Steps
from packllm.engines.server.tops import Tops
from packllm.errors import LoadError, guess, loading, unquoted
from packllm.results import Bill

log = logging.getLogger("packllm")

_COUNTED = ({"include_usage": True, "continuous_usage_stats": True}, {"include_usage": True}, None)
"""Values of stream_options, tried in order. The first reports usage with each piece (vLLM), so that it is known for
dropped streams too; the second reports it at the end; the last does not report it."""

_DISPENSABLE = ("seed", "min_p", "top_k", "top_p", "temperature")
_SOME = 8  # at least one of this many tokens should be visible text
_NO_CHAT = (400, 404, 405, 422, 501)
_CONTINUED: tuple[dict[str, Any], ...] = ({"continue_final_message": True, "add_generation_prompt": False}, {})
_GO_ON = "Go on with your last answer exactly where it stops. Do not repeat any of it, and do not comment."


def connect(spec: str) -> ServerMember:
    """Connect to a server and create the member of a spec.

    Raises:
        LoadError: the spec is invalid, the server cannot be reached, refuses the key, or does not have the model.
    """
    address = Address.of(spec)
    with loading(f"the model on {address.url}"):
        endpoint = Endpoint(address.url, address.key(), address.timeout)
        return ServerMember(replace(address, model=_model(endpoint, address)), endpoint)


def _tokenizer(source: str) -> Encoder:
    """The encoder of a hub id, a folder, or a .gguf file, whose weights are not read."""
    from transformers import AutoTokenizer

    from packllm.engines.transformers.gguf_header import check_parts, parts
    from packllm.engines.transformers.gguf_tokenizer import tokenizer_of

    what = f"tokenizer {source!r}"
    with loading(what):
        if source.endswith(".gguf"):
            _, header = check_parts(parts(Path(source)))
            return Encoder(tokenizer_of(header.metadata, what))
        return Encoder(AutoTokenizer.from_pretrained(source))


def _model(endpoint: Endpoint, address: Address) -> str:
    """The model's name on the server, checked against the server's list of models."""
    try:
        answer = endpoint.ask("/models", attempts=3, silence=10.0)
    except ServerError as error:
        if not address.model or error.status in (None, 401, 403):
            raise
        log.info("%s does not list its models (%s); using %r unchecked", endpoint.url, error, address.model)
        return address.model
    listed = answer.get("data")
    listed = listed if isinstance(listed, list) else []
    names = [str(one["id"]) for one in listed if isinstance(one, Mapping) and one.get("id")]
    if address.model is None:
        if len(names) == 1:
            return names[0]
        raise LoadError(f"{address.url} has {len(names)} models; choose one: {address.url}#MODEL{_of(names)}")
    if not names or address.model in names:
        return address.model
    same = [name for name in names if name in (f"{address.model}:latest",) or os.path.basename(name) == address.model]
    if len(same) == 1:
        return same[0]
    raise LoadError(f"{address.url} has no model {address.model!r}{guess(address.model, names)}{_of(names)}")


def _of(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f" Its models: {shown}{', …' if len(names) > 20 else ''}" if names else " It lists no models"


class ServerEncoder(Encoder):
    """Converts prompts into a server's requests.

    Args:
        known: the encoder of the server's tokenizer, if known. Without it the tokens are unknown, and words end before
            white space, after line breaks, and between two scripts.
    """

    end_of_turn = None
    has_words = False

    def __init__(self, known: Encoder | None = None) -> None:
        self._known = known
        self.template = "the server's own"
        self.vocabulary = Vocabulary([], {}, frozenset(), frozenset())
        if known is not None:
            self.template, self.vocabulary, self.end_of_turn = known.template, known.vocabulary, known.end_of_turn
            self.has_words = known.has_words

    def encode(
        self,
        prompt: Prompt,
        score_on: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        json_schema: Mapping[str, Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        window: int | None = None,
    ) -> Asked:
        """As Encoder.encode. Tools and the JSON schema are described in the system message, because servers differ in
        whether and how they support tool calls."""
        variables = dict(template_kwargs or {})
        if isinstance(prompt, str):
            words = prompt.words if isinstance(prompt, Formatted) else {0: prompt}
            contents, messages = {i: str.__str__(text) for i, text in words.items()}, None
        else:
            instructions = [convention.tools_text(tools)] if tools else []
            if documents := variables.pop("documents", None):
                instructions.append(convention.documents_text(documents))
            instructions += [] if json_schema is None else [convention.schema_text(json_schema)]
            conversation = convention.with_system(convention.written_out(prompt), "\n\n".join(instructions))
            messages = tuple(
                {"role": _role(m["role"]), "content": str.__str__(m.get("content") or "")} for m in conversation
            )
            contents = {i: m.get("content") or "" for i, m in enumerate(prompt) if m["role"] == "user"}
        parts = places(contents, score_on)
        marked = tuple(
            (text, tuple((part.start, part.stop) for part in parts if part.source == i)) for i, text in contents.items()
        )
        whole = str.__str__(prompt) if isinstance(prompt, str) else ""
        asked = Asked([], scored_text(contents, parts), [], [], [], messages, whole, marked, variables)
        if self._known is None:
            return asked
        encoded = self._known.encode(prompt, score_on, tools, json_schema, template_kwargs, window)
        return replace(asked, ids=encoded.ids, positions=encoded.positions, starts=encoded.starts, ends=encoded.ends)

    def plain(self, text: str) -> list[int]:
        return [] if self._known is None else self._known.plain(text)

    def continuation(self, text: str) -> list[int]:
        return [] if self._known is None else self._known.continuation(text)

    def starts(self, text: str) -> set[int]:
        return set(range(len(text))) if self._known is None else self._known.starts(text)


def _role(role: str) -> str:
    return "system" if role == "developer" else str.__str__(role)


class ServerMember(Author):
    """A model on an OpenAI-compatible server; `connect` creates it.

    Attributes:
        address: the parsed spec; it does not contain the key.
        endpoint: the server's API.
        model: the model's name on the server.
        tops: reads the most likely next tokens, if the tokenizer is known and the server reports them.
        why: a sentence that says why the member is a judge or only an author.
    """

    def __init__(self, address: Address, endpoint: Endpoint) -> None:
        self.address, self.endpoint, self.model = address, endpoint, address.model or ""
        self.name = address.called
        known = None if address.tokenizer is None else _tokenizer(address.tokenizer)
        self.encoder = ServerEncoder(known)
        self.vocabulary, self.context_window = self.encoder.vocabulary, None
        self.vocabulary_size = len(self.vocabulary)
        ends = {self.vocabulary.special.get("eos"), self.encoder.end_of_turn}
        self.end_ids = frozenset(i for i in ends if i is not None)
        self._lock = threading.Lock()
        self._dropped: set[str] = set()
        self._counted = 0
        self._limit = "max_tokens"
        self._continued = self._how_continued()
        self.tops, tops_reason = None, ""
        if known is not None:
            self.tops, tops_reason = Tops.of(endpoint, self.model, known)
        self._judge: Judge | Steps | None
        self._judge, self.why = Judge.of(endpoint, self.model, known if self.tops else None)
        if self._judge is None and self.tops is not None and self.tops.wide:
            self._judge = Steps(self.tops, self.encoder, self.end_ids)
            self.why += f"; it judges texts of at most {MOST} tokens, one token per request"
        self.why += f"; {tops_reason}" * bool(tops_reason)
        self.kind = "author" if self._judge is None else "judge"
        log.info("%r", self)

    def __repr__(self) -> str:
        return f"ServerMember({self.name!r}, {self.model!r} on {self.address.url}: {self.kind}; {self.why})"

    def __copy__(self) -> ServerMember:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> ServerMember:
        return copy.copy(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Only the address is pickled."""
        return connect, (replace(self.address, name=self.name).spec,)

    @property
    def fingerprint(self) -> str:
        """Hash of the URL and the model's name. It does not change when the server changes the weights."""
        return hashlib.sha256(f"{self.address.url} {self.address.model}".encode()).hexdigest()

    def _how_continued(self) -> dict[str, Any] | None:
        """Fields of a request with which the server continues the last assistant message. None if it starts a new
        message instead, or does not support conversations.

        This is inferred from the number of prompt tokens: a closed message and the start of another one add more
        tokens than the message's single word."""
        user = {"role": "user", "content": "Say a word."}
        try:
            alone = self._prompt_tokens([user], {})
        except ServerError as error:
            if error.status not in _NO_CHAT:
                raise
            body = {"model": self.model, "prompt": "Say", **self._amount(1)}
            first_choice(self.endpoint.ask("/completions", body, attempts=2))
            self.encoder.template = None
            log.info("member %r continues texts only: %s", self.name, error)
            return None
        for fields in _CONTINUED:
            try:
                size = self._prompt_tokens([user, {"role": "assistant", "content": "a"}], fields)
            except ServerError:
                continue
            if size is not None and alone is not None and 1 <= size - alone <= 2:
                return fields
        return None

    def _prompt_tokens(self, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> int | None:
        body = {"model": self.model, "messages": messages, **self._amount(1), **fields}
        try:
            answer = self.endpoint.ask("/chat/completions", body, attempts=2)
        except ServerError as error:
            if not self._adapted(error, body):
                raise
            return self._prompt_tokens(messages, fields)
        first_choice(answer)
        size = (answer.get("usage") or {}).get("prompt_tokens")
        return size if isinstance(size, int) else None

    def _amount(self, tokens: int) -> dict[str, int]:
        return {self._limit: tokens}

    # Writing

    def write(
        self, asked: Asked, text: str, budget: int, options: Mapping[str, Any], bill: Bill, gate: Gate = no_gate
    ) -> Iterator[str | None]:
        """Generate the answer after `text`, its beginning. A stream that breaks off is requested again from there.

        Args:
            budget: most tokens to generate.
            options: fields of the request, such as temperature.
            bill: counts tokens.

        Yields:
            Pieces of text; then None if the answer ends within the budget.

        Raises:
            ServerError: the server refused the request, or all attempts failed.
        """
        tries, left = Retries(gate), budget
        while left > 0:
            path, body = self._body(asked, text, left, options)
            joint = Joint(text) if "messages" in body and self._continued is None else None
            try:
                reason, sent = None, bill.add()
                with closing(self.endpoint.send(path, body, gate)) as call:
                    for event in call:
                        sent.usage = event.get("usage") or sent.usage
                        piece, finish = _piece(event)
                        reason = finish or reason
                        piece = joint.push(piece) if joint is not None and piece else piece
                        if piece:
                            tries.reset()
                            sent.pieces += 1
                            text, left = text + piece, left - 1
                            yield piece
                if joint is not None and (piece := joint.finish()):
                    text += piece
                    yield piece
                if reason == "length":
                    if not sent.pieces and left >= _SOME:
                        raise ServerError(
                            f"{self.endpoint.url} generated no text within {left} tokens: it may reason for longer "
                            f"than that, or its context is full; raise max_tokens"
                        )
                    return
                if reason == "content_filter":
                    raise ServerError(f"{self.endpoint.url} withheld the rest of the answer (content_filter)")
                if reason is not None:
                    yield None
                    return
                raise TransientError(f"{self.endpoint.url}{path} ended in the middle of an answer")
            except TransientError as error:
                failed = error
            except ServerError as error:
                if not self._adapted(error, body):
                    raise
                continue
            tries.wait(failed)

    def _body(self, asked: Asked, text: str, budget: int, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        body = {"model": self.model, "stream": True, **options}
        if counted := _COUNTED[self._counted]:
            body["stream_options"] = counted
        body = {name: value for name, value in body.items() if name not in self._dropped} | self._amount(budget)
        if asked.messages is None or self.encoder.template is None:
            if asked.ids and self.tops is not None:
                return "/completions", {**body, "prompt": [*asked.ids, *self.encoder.continuation(text)]}
            return "/completions", {**body, "prompt": asked.plain(text)[0]}
        if asked.variables:
            body["chat_template_kwargs"] = dict(asked.variables)
        messages = list(asked.messages)
        if text:
            messages.append({"role": "assistant", "content": text})
            if self._continued is None:
                messages.append({"role": "user", "content": _GO_ON})
            else:
                body |= self._continued
        return "/chat/completions", {**body, "messages": messages}

    def _adapted(self, error: ServerError, body: Mapping[str, Any]) -> bool:
        """Whether the server refused a field that is not essential; later requests omit that field."""
        if error.status not in (400, 422):
            return False
        message = str(error)
        with self._lock:
            if "max_completion_tokens" in message and "max_completion_tokens" not in body:
                self._limit = "max_completion_tokens"
                return True
            if "stream_options" in message and "stream_options" in body:
                self._counted = min(self._counted + 1, len(_COUNTED) - 1)
                return True
            refused = [name for name in _DISPENSABLE if name in body and name in message]
            self._dropped |= set(refused)
        if refused:
            log.warning(
                "member %r: its server refuses %s, which later requests omit: %s", self.name, refused, unquoted(error)
            )
        return bool(refused)

    # Judging

    def score(self, asked: Asked, bill: Bill, gate: Gate = no_gate) -> TextLogprobs | None:
        """Log-probabilities of the scored text of a prompt; None if they are not available."""
        return None if self._judge is None else self._judge.score(asked, bill, gate)

    def judge(
        self, asked: Asked, text: str, ends: Sequence[str], bill: Bill, gate: Gate = no_gate
    ) -> list[TextLogprobs | None]:
        """Log-probabilities of each of several texts that may follow `text`; None where they are not available."""
        return [None] * len(ends) if self._judge is None else self._judge.judge(asked, text, ends, bill, gate)


class Joint:
    """Joins a text and an answer of a server that cannot continue a message: text that the answer repeats is omitted.

    Args:
        text: the text so far.
    """

    def __init__(self, text: str) -> None:
        self._text, self._held, self._met = text, "", not text

    def push(self, piece: str) -> str:
        if self._met:
            return piece
        self._held += piece
        if self._text.startswith(self._held):
            return ""
        return self.finish()

    def finish(self) -> str:
        """Text that was still withheld."""
        if self._met or not self._held:
            return ""
        self._met, withheld = True, self._held
        if withheld.startswith(self._text):
            return withheld[len(self._text) :]
        apart = self._text[-1].isspace() or not withheld[0].isalnum()
        return withheld if apart else " " + withheld


def _piece(event: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text of an event or of a complete answer, and its finish reason."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    if not isinstance(choice, Mapping):
        raise TransientError("the server's answer has no choices")
    delta = choice.get("delta") or choice.get("message") or choice
    text = delta.get("content", delta.get("text")) if isinstance(delta, Mapping) else None
    finish = choice.get("finish_reason")
    return text if isinstance(text, str) else "", finish if isinstance(finish, str) else None
