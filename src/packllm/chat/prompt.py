"""Encodes prompts (text or messages) as each member's token ids, and finds the ids that are scored."""

from __future__ import annotations

import json
import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from packllm.align.vocabulary import Vocabulary, tokenizer_json
from packllm.chat.formatted import Formatted, Tokens
from packllm.chat.messages import ROLES, Message, Prompt, check, check_unicode
from packllm.chat.rendering import PLAIN_TEMPLATE, Renderer, cut
from packllm.chat.traced import ASTRAY, TEMPLATE, Traced, content, runs_of
from packllm.errors import PromptError

__all__ = ["PLAIN_TEMPLATE", "ROLES", "Encoded", "Encoder", "Message", "Prompt", "check"]


@dataclass(frozen=True)
class Encoded:
    """A prompt in one member's tokens.

    Attributes:
        ids: token ids, including those that the tokenizer or template adds around the text.
        text: the scored text: the user's words, or the part of them that score_on names. It is the same for every
            member, whatever its template trims.
        positions: indices in `ids` of the scored text's tokens, except one at index 0.
        starts, ends: character offsets of these tokens in `text`.
    """

    ids: list[int]
    text: str
    positions: list[int]
    starts: list[int]
    ends: list[int]


LONG = 100_000
"""Characters of a text that takes so long to tokenize that other threads should run meanwhile."""


class TooLong(Exception):
    """A prompt is far longer than a window; at least `tokens` tokens were counted."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


def check_length(text: str, window: int, plain: Callable[[str], list[int]]) -> None:
    """Raise TooLong if the text is far longer than a window. The text is tokenized in pieces; tokens that change at the
    cuts do not matter, because the limit is twice the window.

    Args:
        plain: the encoder's method.
    """
    size = 4 * max(window, 1024)
    if len(text) <= 2 * size:
        return
    tokens = 0
    for at in range(0, len(text), size):
        tokens += len(plain(text[at : at + size]))
        if tokens > 2 * window:
            raise TooLong(tokens)


class Encoder:
    """Encodes prompts with one tokenizer; safe for untrusted text.

    Control tokens are all tokens that were added to the tokenizer, except runs of white space. A copy of the tokenizer
    knows them by names that nobody can guess, and only text of the chat template itself is translated to these names.
    So a control token that is spelled in a message is encoded as plain text, and all other text as the tokenizer
    encodes it.

    Attributes:
        template: source of the chat template; None if there is none.
        vocabulary: the bytes of each token id.

    Raises:
        VocabularyError: the tokenizer has no `tokenizers` backend, or a malformed one.
        LoadError: the chat template is invalid, or does not terminate.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        data = tokenizer_json(tokenizer)
        self.vocabulary = Vocabulary.from_json(data, tokenizer)
        self._renderer = Renderer(tokenizer)
        self.template: str | None = self._renderer.template
        self._nonce = f"{secrets.randbits(64):020d}"  # digits, because normalisers may change the case of letters
        self._alias = self._rename(data)
        self._backend = Tokenizer.from_str(json.dumps(data))
        self._backend.no_padding()
        self._backend.no_truncation()
        self._real_id = {
            self._backend.token_to_id(self._alias[token["content"]]): token["id"] for token in self._control
        }
        self._find_control = re.compile(
            "|".join(re.escape(content) for content in sorted(self._alias, key=len, reverse=True)) or r"(?!)"
        )
        if self.end_of_turn is not None:
            self.vocabulary = self.vocabulary.with_role("end_of_turn", self.end_of_turn)

    def _rename(self, data: dict[str, Any]) -> dict[str, str]:
        # Some tokenizers add runs of white space as tokens: these are text. All other added tokens are control tokens.
        self._control = [dict(t) for t in data["added_tokens"] if self.vocabulary.tokens[t["id"]].strip()]
        alias = {t["content"]: f"\ue000{self._nonce}{i:x}\ue001" for i, t in enumerate(self._control)}
        for token in data["added_tokens"]:
            token["content"] = alias.get(token["content"], token["content"])
        model = data["model"]
        if isinstance(model["vocab"], dict):
            if "merges" in model and alias.keys() & model["vocab"].keys():
                model["merges"] = [pair for pair in model["merges"] if not _merge_pieces(pair) & alias.keys()]
            model["vocab"] = {alias.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[alias.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in alias:
            model["unk_token"] = alias[model["unk_token"]]
        data["post_processor"] = None  # it would trim offsets, and add BOS, which _prefix does
        return alias

    @cached_property
    def _prefix(self) -> list[int]:
        """The ids that the tokenizer puts before a text: BOS or none."""
        plain = self._tokenizer("a", add_special_tokens=False).input_ids
        full = self._tokenizer("a").input_ids
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return full[:at]

    @cached_property
    def end_of_turn(self) -> int | None:
        """The control token that the chat template writes after an assistant's answer."""
        after = None if self.template is None else self._find_control.match(self._renderer.after_answer())
        return self._ids_of_control[after[0]] if after else None

    @cached_property
    def _ids_of_control(self) -> dict[str, int]:
        return {token["content"]: token["id"] for token in self._control}

    def encode(
        self,
        prompt: Prompt,
        score_on: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        json_schema: Mapping[str, Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        window: int | None = None,
    ) -> Encoded:
        """Token ids of a checked prompt.

        Text is encoded as the tokenizer does, with BOS if it adds one. Messages go through the chat template, and the
        text ends with its generation prompt. The template also gets the tools, if it supports them. Parts that it does
        not support, leaves out or refuses become text of the system message (see convention.py); a JSON schema always
        does.

        Args:
            prompt: text, or checked messages.
            score_on: the part of the user's text that is scored; None: all of it.
            tools: in OpenAI's format.
            json_schema: schema of the answer.
            template_kwargs: more variables of the chat template.
            window: the member's context window in tokens; a prompt that is far longer is not encoded completely.

        Raises:
            PromptError: the template refuses the messages or leaves out a part of them, or score_on does not
                occur in the user's text.
            TooLong: the prompt has more than twice as many tokens as the window.
        """
        if isinstance(prompt, str):
            text = prompt if isinstance(prompt, Formatted) else content(prompt, 0)
            words = prompt.words if isinstance(prompt, Formatted) else {0: prompt}
            prefix = self._prefix
            self._warn(prompt)
        else:
            prefix = [] if self.template else self._prefix  # a chat template adds BOS itself
            text = self._renderer.render(prompt, tools, json_schema, template_kwargs)
            check_unicode(text)
            words = {i: m.get("content") or "" for i, m in enumerate(prompt) if m["role"] == "user"}
        scored = places(words, score_on)
        if isinstance(prompt, Tokens) and (known_ids := prompt.ids_in(self.vocabulary)) is not None:
            spans = _spans(scored, [(0, 0, 0, len(prompt))])
            return Encoded(list(known_ids), scored_text(words, scored), *_positions(prompt.offsets, spans, 0))
        spelled, runs = self._renamed(text)
        if prefix and any(spelled.startswith(self._alias.get(self._spelling(i), "\0")) for i in prefix):
            prefix = []
        if window is not None:
            check_length(spelled, window, self.plain)
        encoding = self._tokens(spelled)
        ids = [*prefix, *(self._real_id.get(i, i) for i in encoding.ids)]
        if not ids:
            raise PromptError(
                "prompt has no tokens: the chat template or the tokenizer drops all of it; give other text"
            )
        spans = _spans(scored, runs)
        return Encoded(ids, scored_text(words, scored), *_positions(encoding.offsets, spans, len(prefix)))

    def _warn(self, prompt: str) -> None:
        """Warn if control tokens of a formatted prompt, which were probably intended, are encoded as text."""
        if isinstance(prompt, Formatted) and not prompt.vouched and (control := self._find_control.search(prompt)):
            warnings.warn(
                f"the formatted prompt spells the control token {control[0]!r}, which is encoded as plain text: "
                f"the user's part of the prompt is unknown. Give messages: then the chat template adds control tokens",
                stacklevel=2,
            )

    def _spelling(self, token_id: int) -> str:
        return self.vocabulary.tokens[token_id].decode(errors="replace")

    def _renamed(self, text: Traced) -> tuple[str, list[tuple[int, int, int, int]]]:
        """The text with the template's control tokens renamed, and the places of its contents:
        (source, start in the source, start in the text, length)."""
        pieces: list[str] = []
        runs: list[tuple[int, int, int, int]] = []
        at = size = 0
        for length, source, start in runs_of(text):
            piece = str.__getitem__(text, slice(at, at + length))
            if source == TEMPLATE:
                piece = self._find_control.sub(lambda match: self._alias[match[0]], piece)
            elif source >= 0 and start != ASTRAY:
                runs.append((source, start, size, length))
            pieces.append(piece)
            at += length
            size += len(piece)
        return "".join(pieces), runs

    def _tokens(self, text: str) -> Any:
        if len(text) < LONG:
            return self._backend.encode(text, add_special_tokens=False)
        # encode() holds Python's lock all the time, a batch does not.
        return self._backend.encode_batch([text], add_special_tokens=False)[0]

    def plain(self, text: str) -> list[int]:
        """Ids of `text` alone, without BOS and control tokens."""
        return [self._real_id.get(i, i) for i in self._tokens(text).ids]

    def continuation(self, text: str) -> list[int]:
        """Ids of `text` as the continuation of a prompt whose ids do not change: without BOS, and without the space
        that some tokenizers put before a text."""
        for anchor in ("\n", ".", "a"):
            before, both = self.plain(anchor), self.plain(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.plain(text)

    @cached_property
    def has_words(self) -> bool:
        """Whether the tokenizer has a pre-tokenizer that splits text into words."""
        return len(set(self._backend.encode("a b c", add_special_tokens=False).word_ids)) > 1

    def starts(self, text: str) -> set[int]:
        """Character offsets at which the words of `text` start; those of its tokens if the tokenizer has no words."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        words = [None, *encoding.word_ids]
        return {
            start
            for (start, _), word, before in zip(encoding.offsets, encoding.word_ids, words, strict=False)
            if word is None or word != before or not self.has_words
        }


class Place(NamedTuple):
    """A scored part of a user message."""

    source: int
    start: int
    stop: int


def places(words: Mapping[int, str], score_on: str | None) -> list[Place]:
    """The scored parts of the user's messages.

    Raises:
        PromptError: score_on does not occur in them.
    """
    if score_on is None:
        return [Place(i, 0, len(text)) for i, text in words.items()]
    find = re.compile(re.escape(score_on))
    results = [Place(i, at.start(), at.end()) for i, text in words.items() for at in find.finditer(text)]
    if not results:
        raise PromptError(f"score_on={cut(score_on)!r} does not occur in the user's text of the prompt")
    return results


def scored_text(words: Mapping[int, str], scored: Sequence[Place]) -> str:
    """The scored parts, joined."""
    return "".join(words[place.source][place.start : place.stop] for place in scored)


def _spans(places: Sequence[Place], runs: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int]]:
    """Spans of a rendered text that show scored parts, in order: (start, stop, difference to the offset in the scored
    text).

    If a message is shown twice, the first time counts. A message that is shown before an earlier one does not count.
    """
    by_source: dict[int, list[tuple[int, int, int, int]]] = {}
    for run in runs:
        by_source.setdefault(run[0], []).append(run)
    spans: list[tuple[int, int, int]] = []
    text_end = base = 0
    at = 0
    while at < len(places):
        source = places[at].source
        last = at
        while last < len(places) and places[last].source == source:
            last += 1
        done = 0  # end of what was shown of this message
        for _, start, shown, length in by_source.get(source, ()):
            low, high = max(start, done), start + length
            if shown < text_end or low >= high:
                continue
            done = high
            text_end = shown + length
            while at < last:
                place = places[at]
                begin, end = max(low, place.start), min(high, place.stop)
                if begin < end:
                    move = shown - start
                    spans.append((begin + move, end + move, base - place.start - move))
                if place.stop > high:
                    break
                base += place.stop - place.start
                at += 1
        base += sum(place.stop - place.start for place in places[at:last])
        at = last
    return spans


def _positions(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, int]], prefix: int
) -> tuple[list[int], list[int], list[int]]:
    """The tokens inside the spans, except one at index 0, with their offsets in the scored text."""
    positions: list[int] = []
    starts: list[int] = []
    ends: list[int] = []
    which = 0
    for at, (start, stop) in enumerate(offsets, prefix):
        while which < len(spans) and spans[which][1] <= start:
            which += 1
        if which == len(spans):
            break
        low, high, move = spans[which]
        if at > 0 and low <= start < stop <= high:
            positions.append(at)
            starts.append(start + move)
            ends.append(stop + move)
    return positions, starts, ends


def _merge_pieces(pair: str | Sequence[str]) -> set[str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return {left, right, left + right}
