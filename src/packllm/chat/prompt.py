"""From text or messages to each member's token ids, and which of them are scored."""

from __future__ import annotations

import json
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
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
        ids: token ids, with what the tokenizer or template puts before and around the text.
        text: the scored text: the user's words as given, or the part of them that score_on names. The same
            for every member, whatever its template trims.
        positions: indices into ids of the tokens of that text that have a token before them.
        starts, ends: character offsets of those tokens in `text`.
    """

    ids: list[int]
    text: str
    positions: list[int]
    starts: list[int]
    ends: list[int]


class TooLong(Exception):
    """A prompt is far longer than a window; `tokens` of it were counted before that was clear."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class Encoder:
    """One tokenizer's way from prompts to ids, safe for text that nobody vouches for.

    Control tokens, which are all that were added to the tokenizer but runs of white space, are renamed, in a copy of
    it, to names that cannot be guessed. Only what the chat template itself writes is given those names, so a control
    token spelled inside a message is encoded as the plain text it is, and everything else exactly as the tokenizer
    would.

    Attributes:
        template: source of the chat template, None without one.
        vocabulary: bytes of each token id.

    Raises:
        VocabularyError: the tokenizer has no `tokenizers` backend, or an odd one.
        LoadError: the chat template cannot be read, or does not end.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        data = tokenizer_json(tokenizer)
        self.vocabulary = Vocabulary.from_json(data, tokenizer)
        self._renderer = Renderer(tokenizer)
        self.template: str | None = self._renderer.template
        self._nonce = f"{secrets.randbits(64):020d}"  # digits: no normaliser changes their case
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
        # Some tokenizers add runs of white space as tokens: these are text. Any other is none, whatever its flags.
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
        data["post_processor"] = None  # it adds BOS and the like, which _prefix does, and trims offsets
        return alias

    @cached_property
    def _prefix(self) -> list[int]:
        """What the tokenizer puts before a text: BOS, or nothing."""
        bare = self._tokenizer("a", add_special_tokens=False).input_ids
        full = self._tokenizer("a").input_ids
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
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

        Text is encoded as the tokenizer does, BOS included where it adds one. Messages go through the chat
        template, with the mark that an answer follows; so do tools, where the template has a place for them. What
        it has no place for, leaves out or refuses is told in words (see convention.py), a JSON schema always.

        Args:
            prompt: text, or checked messages.
            score_on: the part of the user's text that is scored; None: all of it.
            tools: in OpenAI's form.
            json_schema: of the answer.
            template_kwargs: more variables of the chat template.
            window: tokens that the member reads. A prompt of far more is not encoded whole.

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
            prefix = [] if self.template else self._prefix  # a chat template writes its own BOS
            text = self._renderer.render(prompt, tools, json_schema, template_kwargs)
            check_unicode(text)
            words = {i: m.get("content") or "" for i, m in enumerate(prompt) if m["role"] == "user"}
        scored = places(words, score_on)
        if isinstance(prompt, Tokens) and (given := prompt.ids_in(self.vocabulary)) is not None:
            spans = _spans(scored, [(0, 0, 0, len(prompt))])
            return Encoded(list(given), scored_text(words, scored), *_positions(prompt.offsets, spans, 0))
        written, runs = self._written(text)
        if prefix and any(written.startswith(self._alias.get(self._spelling(i), "\0")) for i in prefix):
            prefix = []
        if window is not None:
            self._check_length(written, window)
        encoding = self._backend.encode(written, add_special_tokens=False)
        ids = [*prefix, *(self._real_id.get(i, i) for i in encoding.ids)]
        if not ids:
            raise PromptError("prompt comes to no tokens: the chat template or the tokenizer leaves nothing of it")
        spans = _spans(scored, runs)
        return Encoded(ids, scored_text(words, scored), *_positions(encoding.offsets, spans, len(prefix)))

    def _warn(self, prompt: str) -> None:
        """Say it where control tokens that were probably meant are taken as text."""
        if isinstance(prompt, Formatted) and not prompt.vouched and (found := self._find_control.search(prompt)):
            warnings.warn(
                f"the formatted prompt spells the control token {found[0]!r}, which is encoded as plain text: what is "
                f"the user's in it cannot be told. Give messages, so that the chat template writes control tokens",
                stacklevel=2,
            )

    def _spelling(self, token_id: int) -> str:
        return self.vocabulary.tokens[token_id].decode(errors="replace")

    def _written(self, text: Traced) -> tuple[str, list[tuple[int, int, int, int]]]:
        """The text with the control tokens that its template wrote renamed, and where its contents are in it:
        (source, start in the source, start in the text, length)."""
        pieces: list[str] = []
        runs: list[tuple[int, int, int, int]] = []
        at = size = 0
        for length, source, start in runs_of(text):
            piece = str.__getitem__(text, slice(at, at + length))
            if source == TEMPLATE:
                piece = self._find_control.sub(lambda found: self._alias[found[0]], piece)
            elif source >= 0 and start != ASTRAY:
                runs.append((source, start, size, length))
            pieces.append(piece)
            at += length
            size += len(piece)
        return "".join(pieces), runs

    def _check_length(self, text: str, window: int) -> None:
        """TooLong if the text is far longer than a window, found out piece by piece: a token that a cut makes or
        hides does not matter, for the bound is twice the window."""
        size = 4 * max(window, 1024)
        if len(text) <= 2 * size:
            return
        tokens = 0
        for at in range(0, len(text), size):
            tokens += len(self._backend.encode(text[at : at + size], add_special_tokens=False).ids)
            if tokens > 2 * window:
                raise TooLong(tokens)

    def plain(self, text: str) -> list[int]:
        """Ids of `text` alone: no BOS, no control tokens."""
        return [self._real_id.get(i, i) for i in self._backend.encode(text, add_special_tokens=False).ids]

    def continuation(self, text: str) -> list[int]:
        """Ids of `text` as it continues a prompt whose own ids stay as they are: without BOS, and without
        the space that some tokenizers put before a text."""
        for anchor in ("\n", ".", "a"):
            before, both = self.plain(anchor), self.plain(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.plain(text)

    @cached_property
    def has_words(self) -> bool:
        """Whether a pre-tokenizer splits text into words before it is split into tokens."""
        return len(set(self._backend.encode("a b c", add_special_tokens=False).word_ids)) > 1

    def starts(self, text: str) -> set[int]:
        """Character offsets at which the words of `text` start; its tokens, where the tokenizer has no words."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        words = [None, *encoding.word_ids]
        return {
            start
            for (start, _), word, before in zip(encoding.offsets, encoding.word_ids, words, strict=False)
            if word is None or word != before or not self.has_words
        }


class Place(NamedTuple):
    """A part of a user's content that is scored."""

    source: int
    start: int
    stop: int


def places(words: Mapping[int, str], score_on: str | None) -> list[Place]:
    """What is scored of the user's contents.

    Raises:
        PromptError: score_on does not occur in them.
    """
    if score_on is None:
        return [Place(i, 0, len(text)) for i, text in words.items()]
    find = re.compile(re.escape(score_on))
    found = [Place(i, at.start(), at.end()) for i, text in words.items() for at in find.finditer(text)]
    if not found:
        raise PromptError(f"score_on={cut(score_on)!r} does not occur in the user's text of the prompt")
    return found


def scored_text(words: Mapping[int, str], scored: Sequence[Place]) -> str:
    """The scored parts, one after the other."""
    return "".join(words[place.source][place.start : place.stop] for place in scored)


def _spans(places: Sequence[Place], runs: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int]]:
    """Where a text shows what is scored, in order: (start, stop, from an offset in it to one in the scored text).

    A content that is shown twice counts where it is shown first; one that is shown before an earlier one, nowhere.
    """
    by_source: dict[int, list[tuple[int, int, int, int]]] = {}
    for run in runs:
        by_source.setdefault(run[0], []).append(run)
    spans: list[tuple[int, int, int]] = []
    reached = base = 0
    at = 0
    while at < len(places):
        source = places[at].source
        last = at
        while last < len(places) and places[last].source == source:
            last += 1
        told = 0  # of the content, up to here
        for _, start, shown, length in by_source.get(source, ()):
            low, high = max(start, told), start + length
            if shown < reached or low >= high:
                continue
            told = high
            reached = shown + length
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
    """Tokens inside the spans that have a token before them, and their offsets in the scored text."""
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
